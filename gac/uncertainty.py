"""Standard errors of a step's estimates, from how they differ between successive steps."""

from __future__ import annotations

import torch
from torch import Tensor

HALF_LIFE = 30.0
"""Measured steps after which a squared difference counts half: about 60 degrees of freedom for each standard error."""


class SuccessiveDifferences:
    """Standard errors of several estimates, each measured anew in every step.

    Two successive steps draw their data independently, so half the expected squared difference of an estimate between
    them is its variance (von Neumann 1941): ``SE^2 = average of (e_t - e_{t-1})^2 / 2``, here a bias-corrected
    exponential average. Nothing is assumed about the distribution of gradients, and every source of error is in it:
    few contributions, the choice of prompts, correlation within a step. Only what changes within one step adds to it
    (a drift of ``d`` a step adds ``d^2 / 2``), so a trend of many steps counts for little. Estimates that share data
    between steps, as several optimizer steps on one batch of rollouts do, make it too small. The sketch's own error is
    nearly the same in successive steps and is not in it.

    State: ``last``, ``average`` and ``weight``, each ``[n]``.
    """

    def __init__(self, n: int, device: torch.device, dtype: torch.dtype) -> None:
        zeros = torch.zeros(3, n, dtype=dtype, device=device)
        self.state: dict[str, Tensor] = {"last": zeros[0].fill_(float("nan")), "average": zeros[1], "weight": zeros[2]}

    def update(self, estimates: Tensor, healthy: Tensor) -> Tensor:
        """Takes in a step's estimates.

        Args:
            estimates: ``[n]``; NaN where one was not measured, which leaves its average alone.
            healthy: 0-dim bool; False leaves everything alone.

        Returns:
            ``[n]``: their standard errors; NaN before the second measurement.
        """
        last, average, weight = self.state["last"], self.state["average"], self.state["weight"]
        estimates = estimates.to(last.dtype)
        use = torch.isfinite(estimates) & healthy
        squared = (estimates - last).square() / 2
        pair = use & torch.isfinite(squared)
        keep = 0.5 ** (1.0 / HALF_LIFE)
        self.state = {
            "last": torch.where(use, estimates, last),
            "average": torch.where(pair, torch.lerp(squared, average, keep), average),
            "weight": torch.where(pair, keep * weight + (1 - keep), weight),
        }
        return (self.state["average"] / self.state["weight"]).sqrt()

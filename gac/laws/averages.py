"""Averages of several measured numbers over steps, with standard errors: a long one of each, and a short one."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gac.state import MAX, Range

SHORT, LONG = 7.0, 69.0
"""Half-lives in steps, those of law ``gac``."""

SURPRISE = 3.0
"""Standard errors between the two averages at which the short one counts half: something has changed."""


class Averages:
    """Moving averages of ``n`` numbers, of two half-lives, in a law's state.

    A measurement's weight halves with the steps since then, whatever was measured in between. An average with the
    weights ``w_k`` of independent measurements has the variance ``sum w_k^2 SE_k^2 / (sum w_k)^2``; one of unknown
    standard error counts with the average of the known ones. Where the two averages differ by ``z`` standard errors of
    the short one, it has the weight ``1 / (1 + exp(-2(z - 3)))``: half of it at three, 0.2% where both agree.

    State: ``sums`` ``[2, 2, n]`` (short and long; of ``w*value`` and of ``w``), ``squares`` ``[2, 3, n]`` (of
    ``w^2 SE^2``, of ``w^2`` with a known standard error, of ``w^2``), ``waiting`` ``[n]`` (updates since it was
    measured).
    """

    RANGES = {  # noqa: RUF012 - read only
        "sums": Range(low=((-MAX,), (0.0,))),
        "squares": Range(0.0, math.inf),
        "waiting": Range(0.0, whole=True),
    }
    """Of a state that was saved."""

    def __init__(self, state: dict[str, Tensor], n: int) -> None:
        state["sums"] = torch.zeros(2, 2, n, dtype=torch.float64)
        state["squares"] = torch.zeros(2, 3, n, dtype=torch.float64)
        state["waiting"] = torch.zeros(n, dtype=torch.float64)
        self._rates = torch.tensor([math.log(2) / SHORT, math.log(2) / LONG], dtype=torch.float64).view(2, 1, 1)

    def to(self, like: Tensor) -> None:
        """Moves what is no state to where ``like`` is."""
        self._rates = self._rates.to(like)

    def take(self, state: dict[str, Tensor], values: Tensor, errors: Tensor, healthy: Tensor) -> None:
        """Takes ``[n]`` values with their standard errors in; one that is NaN leaves its averages alone.

        ``waiting`` must have counted this step. ``healthy``, 0-dim bool: False leaves everything alone.
        """
        use, sure = torch.isfinite(values) & healthy, torch.isfinite(errors)
        one = torch.ones_like(values)
        keep, new = torch.exp(-self._rates * state["waiting"]), -torch.expm1(-self._rates)
        sums = torch.addcmul(new * torch.stack([values, one]), keep, state["sums"])
        known = torch.stack([torch.where(sure, errors.square(), 0.0), sure.to(one), one])
        squares = torch.addcmul(new.square() * known, keep.square(), state["squares"])
        state["sums"] = torch.where(use, sums, state["sums"])
        state["squares"] = torch.where(use, squares, state["squares"])
        state["waiting"] = torch.where(use, 0.0, state["waiting"])

    @staticmethod
    def read(state: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """``[n]`` averages and ``[n]`` standard errors of them; NaN where unknown."""
        total, weight = state["sums"].unbind(1)
        known, weights, every = state["squares"].unbind(1)
        mean, error = total / weight, (known * every / weights).sqrt() / weight
        apart = (mean[0] - mean[1]).abs() / error[0]
        follows = torch.where(torch.isfinite(apart), torch.sigmoid(2 * (apart - SURPRISE)), 0.0)
        return torch.lerp(mean[1], mean[0], follows), torch.lerp(error[1], error[0], follows)

"""Noise of a branch that has one contribution in a step: no replicate inside the step, so time serves as one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gac.observe.ledger import Ledger
from gac.state import Numbers, Range, Table
from gac.statistics.branch import Branch
from gac_kernels.arguments import accumulator_dtype

DECAY = 0.9
"""Of the moving mean; a longer memory lowers the estimate's variance a little and counts more drift as noise."""


class MovingMeans:
    """A moving mean of each branch's gradient sketch on one device, made on first use.

    With ``M`` the bias-corrected mean of the gradients before step ``t`` and ``rho`` its decay,
    ``|S G_t - M|^2 / (1 + v)`` estimates the noise of ``G_t``, where ``v = (1-rho)(1+rho^t) / ((1+rho)(1-rho^t))`` is
    the variance of ``M`` in units of the gradient's (``1/(1+v)`` tends to ``(1+rho)/2``). Unbiased while the expected
    gradient stands still; its drift counts as noise, which makes the estimate an upper bound.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.state: dict[str, Tensor] = {}

    def noise(self, branch: Branch, gradient: Tensor) -> Tensor:
        """The estimate, 0-dim; NaN before the second step. ``gradient`` is ``[m]``, the branch's sketch."""
        if f"{branch.value}.mean" not in self.state:
            return torch.full((), float("nan"), dtype=accumulator_dtype(self.device), device=self.device)
        mean, weight = self.state[f"{branch.value}.mean"], self.state[f"{branch.value}.weight"]
        v = (1 - DECAY) * (2 - weight) / ((1 + DECAY) * weight)  # rho^t is 1 - weight
        difference = gradient.to(weight.dtype) - mean.to(weight.dtype) / weight
        return torch.dot(difference, difference) / (1 + v)

    def update(self, branch: Branch, gradient: Tensor, healthy: Tensor) -> None:
        """Takes the step's gradient in where ``healthy`` (0-dim bool) is true."""
        mean = self.state.setdefault(f"{branch.value}.mean", torch.zeros_like(gradient))
        zero = torch.zeros((), dtype=accumulator_dtype(self.device), device=self.device)
        weight = self.state.setdefault(f"{branch.value}.weight", zero)
        mean.copy_(torch.where(healthy, torch.lerp(gradient, mean, DECAY), mean))
        self.state[f"{branch.value}.weight"] = torch.where(healthy, DECAY * weight + (1 - DECAY), weight)

    @staticmethod
    def entries(device: torch.device, size: int | None) -> Table:
        """What a saved :attr:`state` may hold: of each branch both entries or none.

        Args:
            device: where it is kept.
            size: of the sketch; None where any will do.
        """
        dtype = accumulator_dtype(device)
        mean = Numbers((size,), torch.float32, device, Range())
        weight = Numbers((), dtype, device, Range(0.0, 1.0))
        names = {branch: (f"{branch.value}.mean", f"{branch.value}.weight") for branch in Branch}
        entries = {name: entry for pair in names.values() for name, entry in zip(pair, (mean, weight), strict=True)}
        return Table(entries, together=[frozenset(pair) for pair in names.values()])


def noise_from_time(
    branch: Branch, ledgers: Sequence[Ledger], means: Sequence[MovingMeans], device: torch.device
) -> Tensor:
    """The noise of a branch's gradient on this rank, 0-dim on ``device``; what ranks share counts once."""
    parts = (m.noise(branch, x.totals[branch]) / x.copies for x, m in zip(ledgers, means, strict=True))
    return torch.stack([part.to(device, non_blocking=True) for part in parts]).sum()


def take_in(branch: Branch, ledgers: Sequence[Ledger], means: Sequence[MovingMeans], healthy: Tensor) -> None:
    """Makes a branch's gradient part of the means where ``healthy`` (0-dim bool) is true."""
    for ledger, mean in zip(ledgers, means, strict=True):
        mean.update(branch, ledger.totals[branch], healthy.to(ledger.device, non_blocking=True))

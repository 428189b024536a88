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

    With ``M = sum_k w_k G_k`` the mean of the gradients measured before, ``sum w_k = 1`` and ``w_k`` halving with the
    steps since then (``rho`` a step, whatever lay between two measurements), ``|S G_t - M|^2 / (1 + v)`` estimates the
    noise of ``G_t``, where ``v = sum w_k^2`` is the variance of ``M`` in units of the gradient's. Where every step is
    measured ``v = (1-rho)(1+rho^t) / ((1+rho)(1-rho^t))`` and ``1/(1+v)`` tends to ``(1+rho)/2``. Unbiased while the
    expected gradient stands still; its drift counts as noise, which makes the estimate an upper bound.

    State of each branch: ``mean`` and ``weight``, sums of ``w G`` and ``w`` before they are normalised, ``square``,
    that of ``w^2``, and ``step``, that of the newest.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.state: dict[str, Tensor] = {}

    def noise(self, branch: Branch, gradient: Tensor) -> Tensor:
        """The estimate, 0-dim; NaN before the second step. ``gradient`` is ``[m]``, the branch's sketch."""
        if f"{branch.value}.mean" not in self.state:
            return torch.full((), float("nan"), dtype=accumulator_dtype(self.device), device=self.device)
        mean, weight = self.state[f"{branch.value}.mean"], self.state[f"{branch.value}.weight"]
        v = self._square(branch) / weight**2
        difference = gradient.to(weight.dtype) - mean.to(weight.dtype) / weight
        return torch.dot(difference, difference) / (1 + v)

    def _square(self, branch: Branch) -> Tensor:
        """The sum of squared weights; a state that lacks it comes from measurements in every step."""
        weight = self.state[f"{branch.value}.weight"]
        found = self.state.get(f"{branch.value}.square")
        return (1 - DECAY) * (2 - weight) * weight / (1 + DECAY) if found is None else found

    def update(self, branch: Branch, gradient: Tensor, healthy: Tensor, step: int | None = None) -> None:
        """Takes the gradient of ``step`` in where ``healthy`` (0-dim bool) is true and the mean of both is finite.

        Sums of gradients near 1e38 are not, though no gradient is infinite, and would stay in the mean for ever.
        ``step`` counts from 0; None: the one after the newest.
        """
        name = branch.value
        zero = torch.zeros((), dtype=accumulator_dtype(self.device), device=self.device)
        mean = self.state.setdefault(f"{name}.mean", torch.zeros_like(gradient))
        weight = self.state.setdefault(f"{name}.weight", zero)
        square = self._square(branch)
        last = self.state.get(f"{name}.step", zero - 1 if step is None else zero + (step - 1))
        now = last + 1 if step is None else zero + step
        keep = DECAY ** (now - last).clamp(min=1.0)
        new = 1 - keep
        moved = torch.lerp(gradient, mean, keep.to(mean.dtype))
        healthy = healthy & torch.isfinite(moved).all()
        mean.copy_(torch.where(healthy, moved, mean))
        self.state[f"{name}.weight"] = torch.where(healthy, keep * weight + new, weight)
        self.state[f"{name}.square"] = torch.where(healthy, keep**2 * square + new**2, square)
        self.state[f"{name}.step"] = torch.where(healthy, now, last)

    @staticmethod
    def entries(device: torch.device, size: int | None, *, aged: bool = True) -> Table:
        """What a saved :attr:`state` may hold: of each branch all entries or none.

        Args:
            device: where it is kept.
            size: of the sketch; None where any will do.
            aged: False for states of measurements in every step, which lack ``square`` and ``step``.
        """
        dtype = accumulator_dtype(device)
        mean = Numbers((size,), torch.float32, device, Range())
        weight = Numbers((), dtype, device, Range(0.0, 1.0))
        square = Numbers((), dtype, device, Range(0.0, 1.0))
        step = Numbers((), dtype, device, Range(-1.0, whole=True))
        kinds = {"mean": mean, "weight": weight} | ({"square": square, "step": step} if aged else {})
        groups = [{f"{branch.value}.{name}": kind for name, kind in kinds.items()} for branch in Branch]
        return Table(groups[0] | groups[1], together=[frozenset(group) for group in groups])


def noise_from_time(
    branch: Branch, ledgers: Sequence[Ledger], means: Sequence[MovingMeans], device: torch.device
) -> Tensor:
    """The noise of a branch's gradient on this rank, 0-dim on ``device``; what ranks share counts once."""
    parts = (m.noise(branch, x.totals[branch]) / x.copies for x, m in zip(ledgers, means, strict=True))
    return torch.stack([part.to(device, non_blocking=True) for part in parts]).sum()


def take_in(
    branch: Branch, ledgers: Sequence[Ledger], means: Sequence[MovingMeans], healthy: Tensor, step: int | None = None
) -> None:
    """Makes a branch's gradient part of the means; see :meth:`MovingMeans.update`."""
    for ledger, mean in zip(ledgers, means, strict=True):
        mean.update(branch, ledger.totals[branch], healthy.to(ledger.device, non_blocking=True), step)

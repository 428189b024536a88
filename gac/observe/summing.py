"""A ledger's memory read and written by the CPU library in one call: a contribution's gradients, and a step's sums."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from gac.observe.contribution import Contribution
from gac.statistics.branch import Branch
from gac_kernels import SketchLayout
from gac_kernels.cpu.accumulating import Accumulating
from gac_kernels.cpu.ending import StepSums, serves
from gac_kernels.ops import traced


class Summing:
    """Reads a ledger's memory, whose addresses stay.

    Args:
        totals: of SFT and RL. rows: of contributions.
        cells: parts of a square in a row; None where the layout is lossless.
    """

    def __init__(self, totals: tuple[Tensor, Tensor], rows: Tensor, cells: int | None) -> None:
        self._sums = StepSums(totals, rows, cells)
        self._lossless = cells is None

    @staticmethod
    def serves(device_type: str) -> bool:
        """Whether there is such a call for this type of device."""
        return device_type == "cpu" and serves()

    def __call__(self, contributions: Sequence[Contribution], scales: Sequence[Tensor]) -> array[float]:
        """``[13]``, as :class:`gac_kernels.cpu.ending.StepSums` says; rows become 0."""
        told: list[float] = []
        squares: dict[int, float] = {}  # of scales: contributions of a branch share one unless a scaler moves
        for contribution, scale in zip(contributions, scales, strict=True):
            square = squares.get(id(scale))
            if square is None:
                square = squares[id(scale)] = float(scale) ** 2 if self._lossless else 1.0
            tokens = contribution.tokens
            told += (contribution.branch is Branch.RL, 1.0 if tokens is None else float(tokens), square)
        return self._sums(told, clear=True)


class Adding:
    """Adds whole contributions to a lossless ledger's totals, whose addresses stay.

    Args:
        totals: of both branches. previous: running sums, or None. layout: of the ledger. modules: of each region.
    """

    def __init__(
        self,
        totals: Mapping[Branch, Tensor],
        previous: Tensor | None,
        layout: SketchLayout,
        modules: Sequence[int],
    ) -> None:
        self._of = {branch: Accumulating(total, previous, layout) for branch, total in totals.items()}
        self.modules = torch.tensor(modules, dtype=torch.int64)
        """Of each region."""
        self._scales: dict[int, tuple[Tensor, float]] = {}  # as numbers: reading one costs as much as a small sum

    def __call__(
        self,
        branch: Branch,
        gradients: list[Tensor],
        regions: Sequence[int],
        scale: Tensor,
        into: Tensor,
        fresh: int,
        *,
        by_module: bool = False,
    ) -> bool:
        """Adds gradients; False, with nothing done, where they are not plain.

        Args:
            scale: of the branch; it must not change before :meth:`forget`.
            into: ``[2]``, what moments are added to, or ``[modules, 2]``.
            regions, fresh: as :class:`gac_kernels.cpu.accumulating.Accumulating` says.
        """
        if traced():  # something should see operations
            return False
        add, factor = self._of[branch], self.number(scale)
        if not by_module:
            return add(gradients, regions, scale=factor, into=into.data_ptr(), fresh=fresh)
        each = torch.zeros(len(regions), 2, dtype=into.dtype)
        done = add(gradients, regions, scale=factor, into=each.data_ptr(), fresh=fresh, per_tensor=True)
        if done:
            into.index_add_(0, self.modules[list(regions)], each)
        return done

    def number(self, scale: Tensor) -> float:
        """A branch's scale, which must not change before :meth:`forget`."""
        known = self._scales.get(id(scale))
        if known is None:
            known = self._scales[id(scale)] = scale, float(scale)
        return known[1]

    def forget(self) -> None:
        """A step is over: scales of the next one are others."""
        self._scales.clear()

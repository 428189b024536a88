"""The sums of a step in one call of the CPU library, from what a ledger keeps of its contributions."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from torch import Tensor

from gac.observe.contribution import Contribution
from gac.statistics.branch import Branch
from gac_kernels.cpu.ending import StepSums, serves


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

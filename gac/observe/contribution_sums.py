"""What a ledger's contributions add up to."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gac.observe.contribution import Contribution
from gac.observe.summing import Summing
from gac.statistics.branch import Branch


class ContributionSums:
    """The part of a ledger that is asked for its sums when a step has ended."""

    def powers(self: Any) -> Tensor:
        """``[K]``: ``|x_k|^2`` of each contribution of this step."""
        k = len(self._scales)
        if self.by_module and k:
            return self.module_powers().sum(1)
        return self._scaled(self._rows[:k, 0]) if self.lossless else self._rows[:k, self._cells].sum(1)

    def powers_on_host(self: Any) -> list[float]:
        """:meth:`powers` as numbers; the host waits."""
        if not self.lossless or self.by_module:
            return self.powers().tolist()
        scales = {id(scale): float(scale) ** 2 for scale in self._scales}  # one for each branch
        squares = self._rows[: len(self._scales), 0].tolist()
        return [square * scales[id(scale)] for square, scale in zip(squares, self._scales, strict=True)]

    def module_powers(self: Any) -> Tensor:
        """``[K, modules]``: the part of ``|x_k|^2`` in each module; in a step that is taken apart."""
        return self._scaled(torch.stack(self._module_rows[: len(self._scales)])[..., 0])

    def _scaled(self: Any, squares: Tensor) -> Tensor:
        """Squares of what was read as those of the contributions."""
        if not self.lossless or not self._scales:
            return squares
        factors = torch.stack(self._scales).to(squares.dtype).square()
        return squares * factors.view(-1, *[1] * (squares.dim() - 1))

    def nonfinite(self: Any) -> Tensor:
        """Non-finite elements read in this step, 0-dim."""
        found = self._rows[:, 1].sum()
        if self.lossless or self.running:
            for rows in self._module_rows:
                found = found + rows[:, 1].sum()
        return found

    def gathers(self: Any, branches: Sequence[int]) -> bool:
        """Whether :meth:`gather` serves a step with these contributions."""
        if self.by_module or self.layout.size == 0:
            return False
        scales = {(branch, id(scale)) for branch, scale in zip(branches, self._scales, strict=True)}
        return not self.lossless or len(scales) == len(set(branches))  # one for each branch

    def gather(
        self: Any,
        branches: Sequence[int],
        tokens: Tensor | None,
        time_noise: Tensor | None,
        broken: float,
        *,
        counts: bool,
    ) -> Tensor:
        """``[13]``: :meth:`powers` over branches, :meth:`nonfinite`, :meth:`inner`, on a GPU by two launches.

        Arguments are those of :func:`gac_kernels.triton.ending.gather`.
        """
        from gac_kernels.triton.ending import gather  # it imports Triton

        scales = None
        if self.lossless and self._scales:
            of = dict(zip(branches, self._scales, strict=True))
            scales = of.get(0, self._scales[0]), of.get(1, self._scales[0])
        cells = None if self.lossless else self._cells.stop - self._cells.start
        totals = self.totals[Branch.SFT], self.totals[Branch.RL]
        told: dict[str, Any] = {
            "tokens": tokens,
            "scales": scales,
            "time_noise": time_noise,
            "broken": broken,
            "counts": counts,
        }
        return gather(totals, self._rows, cells, branches, **told)

    def sums_on_host(self: Any, contributions: Sequence[Contribution]) -> array[float] | None:
        """``[13]``: :meth:`powers` over branches, :meth:`nonfinite`, :meth:`inner`, by one call of the CPU library.

        It forgets all but the totals. None where it does not serve.
        """
        if self.by_module or not Summing.serves(self.device.type):
            return None
        if self._summing is None:
            cells = None if self.lossless else self._cells.stop - self._cells.start
            self._summing = Summing((self._totals[Branch.SFT], self._totals[Branch.RL]), self._rows, cells)
        self._settle()
        self._rows_are_clear = True
        return self._summing(contributions, self._scales)

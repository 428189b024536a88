"""The part of a ledger that takes gradients in as they arrive, by hooks of the CPU library."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from gac.statistics.branch import Branch
from gac_kernels.cpu import arriving
from gac_kernels.cpu.arriving import ArrivingSums, RunningSums
from gac_kernels.ops import traced

Noted = tuple[list[Tensor | None], list[int]]
"""Running sums that were read, and their versions, by parameter."""


class TakingIn:
    """What :class:`gac.observe.arriving.Arriving` asks a ledger for."""

    def hooks_of_arriving(self: Any, accumulated: list, noted: Noted | None) -> ArrivingSums | RunningSums | None:
        """Makes hooks; None where there are none for this ledger.

        Args:
            accumulated: a list that gets the parameters whose gradients come to ``read``.
            noted: where running sums are noted; None: incoming gradients are read.
        """
        if self.device.type != "cpu" or not arriving.serves() or self.running is (noted is None):
            return None
        totals = list(self._totals.values())
        if self.direct and self._adding is not None:
            return ArrivingSums(accumulated, totals, self.layout)
        if noted is not None and not self.lossless and self._may_stay:
            return RunningSums(accumulated, *noted, totals, self._previous, self.layout)
        return None

    def begin_arriving(self: Any, sums: ArrivingSums | RunningSums, branch: Branch, scale: Tensor) -> bool:
        """Has what comes from now on added to a branch's total; False where it must come to ``read``."""
        if traced() or (self.running and self.by_module):
            return False
        which, factor = int(branch is Branch.RL), self._factor(scale)
        fresh = self._outdated[which].by_region()
        if isinstance(sums, ArrivingSums):
            sums.begin(which, scale=factor, fresh=fresh)
            return True
        self._make_room()
        row = self._rows.data_ptr() + len(self._scales) * self._stride
        sums.begin(which, scale=factor, sums=row, fresh=fresh, previous_fresh=self._outdated[2].by_region())
        return True

    def end_arriving(self: Any, sums: ArrivingSums | RunningSums, count: int) -> None:
        """Takes the moments of what was added, of so many parameters, as the open contribution's."""
        if isinstance(sums, RunningSums):
            return  # they are in its row
        if self.by_module:
            each, regions = sums.each(count)
            self._module_rows[-1].index_add_(0, self._adding.modules[regions], each)
        else:
            sums.sums(self._views[len(self._scales)][0])

    def _factor(self: Any, scale: Tensor) -> float:
        """A branch's scale as a number: reading one costs as much as a small sum. It must not change in the step."""
        known = self._factors.get(id(scale))
        if known is None:
            known = self._factors[id(scale)] = scale, float(scale)
        factor: float = known[1]
        return factor

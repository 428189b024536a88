"""What an earlier step left in a vector, and nobody clears: the next step writes over it."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import Tensor

from gac_kernels import SketchLayout

_NONE: frozenset[int] = frozenset()


class Outdated:
    """The regions of a vector that hold numbers of an earlier step and count as 0.

    Clearing is a pass over memory, and what a contribution adds to, it reads and writes in any case: the first of a
    step may write over a region instead, if it is told to.

    Args:
        vector: with a stretch for each region of ``layout``.
        may_stay: whether contributions can be told to; else regions are cleared at once.
    """

    def __init__(self, vector: Tensor, layout: SketchLayout, *, may_stay: bool) -> None:
        self._vector, self._layout, self._may_stay = vector, layout, may_stay
        self._all = frozenset(range(len(layout.numels)))
        self._left = _NONE

    def forget(self) -> None:
        """What is there now is outdated."""
        if self._may_stay:
            self._left = self._all
        else:
            self._vector.zero_()

    def renew(self) -> None:
        """The vector was written as a whole."""
        self._left = _NONE

    def take(self, regions: Sequence[int]) -> bool:
        """Whether the regions, which are written next, are outdated; where only some are, those become 0."""
        left = self._left
        if not left:
            return False
        own = frozenset(regions)
        self._left = left - own
        if own <= left:
            return True
        self._zero(own & left)
        return False

    def settle(self) -> None:
        """Makes what is left of them 0, for whoever reads the vector."""
        if self._left:
            if self._left == self._all:
                self._vector.zero_()
            else:
                self._zero(self._left)
            self._left = _NONE

    def _zero(self, regions: Collection[int]) -> None:
        layout = self._layout
        for region in regions:
            begin = layout.bucket_offsets[region]
            self._vector[begin : begin + layout.region_size(layout.numels[region])] = 0.0

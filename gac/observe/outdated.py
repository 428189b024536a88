"""What an earlier step left in a vector, and nobody clears: the next step writes over it."""

from __future__ import annotations

from array import array
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
        self._flags: array[int] | None = None  # what is left, where somebody writes by it

    def forget(self) -> None:
        """What is there now is outdated."""
        self._flags = None
        if self._may_stay:
            self._left = self._all
        else:
            self._vector.zero_()

    def renew(self) -> None:
        """The vector was written as a whole."""
        self._flags, self._left = None, _NONE

    def by_region(self) -> array[int] | None:
        """For whoever writes region by region: 1 where one is outdated, to be made 0 when it is written; None: no more.

        It counts until another method is called.
        """
        if self._flags is None and self._left:
            every = self._left == self._all
            self._flags = array("B", b"\1" if every else b"\0") * len(self._all)
            for region in () if every else self._left:
                self._flags[region] = 1
        return self._flags

    def _look(self) -> None:
        flags, self._flags = self._flags, None
        if flags is not None:
            self._left = frozenset(k for k, flag in enumerate(flags) if flag) if any(flags) else _NONE

    def take(self, regions: Sequence[int]) -> bool:
        """Whether the regions, which are written next, are outdated; where only some are, those become 0."""
        self._look()
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
        self._look()
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

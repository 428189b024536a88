"""Gradients added to a vector by hooks of the C++ library, at the moment when they arrive (``csrc/arriving.cpp``).

Between backward passes no cache holds a gradient any more; while the pass goes on, each is still there when its
parameter's hooks run. So nothing has to be read again, kept or freed, and no line of Python runs for a parameter. What
they do to the bit is :func:`gac_kernels.accumulate_` with one call for all that came, in its order.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from gac_kernels import arguments, cpu
from gac_kernels.cpu.library import require
from gac_kernels.cpu.quick import QUICK
from gac_kernels.layout import SketchLayout

_ADDING = struct.Struct("@PPdqii")

OWN_TIME = False
"""Whether seconds are those that the thread had a processor: for tests on machines that others use."""


def serves() -> bool:
    """Whether there are such hooks: the library is loaded, and made builtins for this Python and torch."""
    return cpu.available() and getattr(arguments.describe, "__self__", None) is not None


class ArrivingSums:
    """The hooks of a model's parameters. Outside of :meth:`begin` and :meth:`end` they put on lists what comes.

    Args:
        accumulated: a list that parameters are put on whose gradients were accumulated and not added.
        totals: ``[layout.size]`` contiguous float32 CPU tensors that are added to. Nobody is told of the writes.
        layout: a lossless one.

    Raises MemoryError where there is none for them.
    """

    def __init__(self, accumulated: list[nn.Parameter], totals: Sequence[Tensor], layout: SketchLayout) -> None:
        self._library, self._layout = require().quick, layout
        self._handle = _made(self._library.gac_arriving_new(accumulated))
        self._totals = tuple(totals)  # their memory stays
        self._addresses = [total.data_ptr() for total in totals]
        self._large = max(layout.numels, default=0) > QUICK
        self._fresh: array[int] | None = None  # what the library writes to
        self._seconds = array("d", [0.0])
        self._at = self._seconds.buffer_info()[0]
        self._begin, self._end = self._library.gac_arriving_begin, self._library.gac_arriving_end

    def hooks(self, region: int, came: list[Tensor]) -> tuple[Callable[[Tensor], None], Callable[[nn.Parameter], None]]:
        """The two hooks of a parameter: on its incoming gradient, and after that was accumulated.

        Args:
            region: of the layout. came: a list that gradients are put on that were not added.
        """
        where = region, self._layout.bucket_offsets[region], self._layout.numels[region]
        return _made(self._library.gac_arriving_hooks(self._handle, came, *where))

    def begin(self, total: int, *, scale: float, fresh: array[int] | None = None) -> None:
        """Adds what comes from now on, times ``scale``, to one of the totals.

        Gradients that are not contiguous CPU tensors of plain types and of their regions' sizes go on the lists.

        Args:
            total: which one.
            fresh: of each region, bytes: 1 where it counts as 0 before its first gradient, which makes them 0.
        """
        self._fresh = fresh
        flags = 0 if fresh is None else fresh.buffer_info()[0]
        threads = torch.get_num_threads() if self._large else 1
        self._begin(self._handle, _ADDING.pack(self._addresses[total], flags, scale, QUICK, threads, OWN_TIME))

    def end(self) -> tuple[int, float]:
        """Adds no more. How many gradients were added, and the seconds that it took.

        -1 where some came more than once, or of a pass that began before: what is in ``total`` is then of no use.
        """
        added = self._end(self._handle, self._at)
        self._fresh = None
        return added, self._seconds[0]

    def sums(self, into: Tensor) -> None:
        """Adds squares and non-finite elements of all that was added to ``into``, ``[2]`` float64 and contiguous."""
        self._library.gac_arriving_sums(self._handle, into.data_ptr(), None, None)

    def each(self, count: int) -> tuple[Tensor, Tensor]:
        """The same of each: ``[count, 2]`` float64, and the regions, ``[count]``; ``count`` as :meth:`end` said."""
        sums, regions = torch.zeros(count, 2, dtype=torch.float64), torch.zeros(count, dtype=torch.int64)
        self._library.gac_arriving_sums(self._handle, None, sums.data_ptr(), regions.data_ptr())
        return sums, regions


def _made(found):  # type: ignore[no-untyped-def]
    if found is None:
        raise MemoryError("the CPU library failed: out of memory")
    return found

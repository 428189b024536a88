"""Gradients taken in by hooks of the C++ library, at the moment when they arrive (``csrc/arriving.cpp``).

Between backward passes no cache holds a gradient any more; while the pass goes on, each is still there when its
parameter's hooks run. So nothing has to be read again, kept or freed, and no line of Python runs for a parameter. To
the bit it is what :func:`gac_kernels.accumulate_`, or :func:`gac_kernels.absorb_sketch_`, does in one call for all that
came, in its order.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from gac_kernels import arguments, cpu
from gac_kernels.cpu.library import require
from gac_kernels.cpu.operations import MAP, SKETCH_ALONE
from gac_kernels.cpu.quick import QUICK
from gac_kernels.layout import SketchLayout

_ADDING = struct.Struct("@PPdqi")
_WATCHING = struct.Struct("@PPPqi")
_PIECE = struct.Struct("@5q")


def serves() -> bool:
    """Whether there are such hooks: the library is loaded, and made builtins for this Python and torch."""
    return cpu.available() and getattr(arguments.describe, "__self__", None) is not None


class _Taking:
    """What both kinds share.

    Args:
        accumulated: a list that parameters are put on whose gradients were accumulated and not taken in.
        layout: of the vectors.
        noted: lists by parameter that running sums and their versions are written to; None twice.
        alone: elements up to which a gradient is read on the thread that its hook runs on.

    Raises MemoryError where there is none for them.
    """

    def __init__(
        self,
        accumulated: list[nn.Parameter],
        layout: SketchLayout,
        noted: tuple[list[Tensor | None] | None, list[int] | None] = (None, None),
        *,
        alone: int,
    ) -> None:
        self._library, self._layout = require().quick, layout
        self._handle = _made(self._library.gac_arriving_new(accumulated, *noted))
        self._alone, self._large = alone, max(layout.numels, default=0) > alone
        self._fresh: tuple[array[int] | None, ...] = ()  # what the library writes to
        self._seconds = array("d", [0.0])
        self._at = self._seconds.buffer_info()[0]
        self._end = self._library.gac_arriving_end

    def hooks(
        self, index: int, region: int, came: list[Tensor]
    ) -> tuple[Callable[[Tensor], None], Callable[[nn.Parameter], None]]:
        """The two hooks of a parameter: on its incoming gradient, and after that was accumulated.

        Args:
            index: of the parameter. region: of the layout.
            came: a list that gradients are put on that were not taken in.
        """
        layout = self._layout
        cell = 0 if layout.lossless else layout.cell_offsets[region]
        numel = layout.numels[region]
        piece = _PIECE.pack(layout.bucket_offsets[region], layout.index_offsets[region], numel, 0, cell)
        where = array("q", piece)
        return _made(self._library.gac_arriving_hooks(self._handle, came, index, region, where.buffer_info()[0]))

    def end(self) -> tuple[int, float]:
        """Takes in no more. How many gradients were taken in, and the seconds that it took.

        -1 where some came more than once, or of a pass that began before: what was written is then of no use.
        """
        taken = self._end(self._handle, self._at)
        self._fresh = ()
        return taken, self._seconds[0]

    def _flags(self, *fresh: array[int] | None) -> list[int]:
        """Addresses of flags, which live until the pass has ended."""
        self._fresh = fresh
        return [0 if flags is None else flags.buffer_info()[0] for flags in fresh]

    def _threads(self) -> int:
        return torch.get_num_threads() if self._large else 1


class ArrivingSums(_Taking):
    """Adds incoming gradients to totals.

    Outside of :meth:`begin` and :meth:`end` the hooks put on lists what comes.

    Args:
        accumulated: a list that parameters are put on whose gradients were accumulated and not added.
        totals: ``[layout.size]`` contiguous float32 CPU tensors that are added to. Nobody is told of the writes.
        layout: a lossless one.

    Raises MemoryError where there is none for them.
    """

    def __init__(self, accumulated: list[nn.Parameter], totals: Sequence[Tensor], layout: SketchLayout) -> None:
        super().__init__(accumulated, layout, alone=QUICK)
        self._totals = tuple(totals)  # their memory stays
        self._addresses = [total.data_ptr() for total in totals]

    def begin(self, total: int, *, scale: float, fresh: array[int] | None = None) -> None:
        """Adds what comes from now on, times ``scale``, to one of the totals.

        Gradients that are not contiguous CPU tensors of plain types and of their regions' sizes go on the lists.

        Args:
            total: which one.
            fresh: of each region, bytes: 1 where it counts as 0 before its first gradient, which makes them 0.
        """
        told = _ADDING.pack(self._addresses[total], *self._flags(fresh), scale, self._alone, self._threads())
        self._library.gac_arriving_begin(self._handle, told)

    def sums(self, into: Tensor) -> None:
        """Adds squares and non-finite elements of all that was added to ``into``, ``[2]`` float64 and contiguous."""
        self._library.gac_arriving_sums(self._handle, into.data_ptr(), None, None)

    def each(self, count: int) -> tuple[Tensor, Tensor]:
        """The same of each: ``[count, 2]`` float64, and the regions, ``[count]``; ``count`` as :meth:`end` said."""
        sums, regions = torch.zeros(count, 2, dtype=torch.float64), torch.zeros(count, dtype=torch.int64)
        self._library.gac_arriving_sums(self._handle, None, sums.data_ptr(), regions.data_ptr())
        return sums, regions


class RunningSums(_Taking):
    """Sketches running sums, and has totals gain what they have gained.

    Only the second hook of a parameter is of use, and outside of :meth:`begin` and :meth:`end` it does nothing.

    Args:
        accumulated: a list that parameters are put on whose running sums were not taken in.
        gradients, versions: lists by parameter: the running sums that were read, and their versions, are written there.
        totals, previous: ``[layout.size]`` contiguous float32 CPU tensors: totals, and the sketch of what the running
            sums were when they were read last. Nobody is told of the writes.
        layout: of the sketches.

    Raises MemoryError where there is none for them.
    """

    def __init__(
        self,
        accumulated: list[nn.Parameter],
        gradients: list[Tensor | None],
        versions: list[int],
        totals: Sequence[Tensor],
        previous: Tensor,
        layout: SketchLayout,
    ) -> None:
        super().__init__(accumulated, layout, (gradients, versions), alone=SKETCH_ALONE)
        self._vectors = *totals, previous
        self._addresses = [total.data_ptr() for total in totals]
        self._to = previous.data_ptr(), previous.numel()

    def begin(
        self,
        total: int,
        *,
        scale: float,
        sums: int,
        fresh: array[int] | None = None,
        previous_fresh: array[int] | None = None,
    ) -> None:
        """Takes in what comes from now on, times ``scale``, to one of the totals.

        Args:
            total: which one.
            sums: address of ``[2 + layout.cells]`` float64 numbers that are added to, as ``into`` of
                :func:`gac_kernels.absorb_sketch_`.
            fresh, previous_fresh: of each region, bytes: 1 where the total's, or previous', stretch counts as 0.
        """
        layout, (previous, size) = self._layout, self._to
        where = previous, self._addresses[total], size, layout.size
        seed = layout.seed & 0xFFFFFFFF
        head = MAP.pack(layout.lanes, layout.rows_per_slab, seed, scale, *where, False, False, False, True, 0)
        flags = self._flags(fresh, previous_fresh)
        told = _WATCHING.pack(*flags, sums, self._alone, self._threads())
        self._library.gac_arriving_begin_running(self._handle, head, told)


def _made(found):  # type: ignore[no-untyped-def]
    if found is None:
        raise MemoryError("the CPU library failed: out of memory")
    return found

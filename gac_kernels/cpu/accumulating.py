"""Tensors added to a vector whose address stays, in one call that checks no more than it has to.

:func:`gac_kernels.accumulate_` asks a dozen objects before it reads anything. Between backward passes none of them is
in a cache any more.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from torch import Tensor

from gac_kernels import arguments
from gac_kernels.cpu.library import check, require
from gac_kernels.cpu.operations import SUM, threads_for
from gac_kernels.cpu.quick import QUICK
from gac_kernels.layout import SketchLayout

_MOST_ORDERS = 16


class Accumulating:
    """What :func:`gac_kernels.accumulate_` does with whole regions, to the bit. The tensors must outlive it.

    Nobody is told of the write: versions of ``total`` and ``previous`` stay, and dispatch modes see no operation.

    Args:
        total, previous: ``[layout.size]`` contiguous float32 CPU tensors; ``previous`` may be None.
        layout: a lossless one.
    """

    def __init__(self, total: Tensor, previous: Tensor | None, layout: SketchLayout) -> None:
        self._tensors = total, previous
        self._addresses = total.data_ptr(), 0 if previous is None else previous.data_ptr()
        self._layout = layout
        self._library = require()
        self._orders: dict[tuple[int, ...], tuple[bytes, array, int]] = {}

    def __call__(
        self,
        tensors: list[Tensor],
        regions: Sequence[int],
        *,
        scale: float,
        into: int,
        fresh: int = 0,
        per_tensor: bool = False,
    ) -> bool:
        """Adds the tensors, and their moments to what is there; False, with nothing done, for what is not plain.

        Args:
            tensors: contiguous, on the CPU, each of as many elements as its region.
            regions: of each tensor, no two alike.
            scale: multiplies what is added.
            into: address of two float64 numbers, squares and non-finite elements; ``per_tensor``: of two for each.
            fresh: bits: 1, the regions of ``total`` count as 0; 2, those of ``previous`` do.
        """
        numbers = arguments.describe(tensors)
        if numbers is None or not (tensors and tensors[0].is_cpu):
            return False
        count = len(regions)
        numels, offsets, elements = self._order(tuple(regions))
        if numbers[8 + 8 * count : 8 + 16 * count] != numels or len(numbers) != 8 + 24 * count:
            return False
        code = int.from_bytes(numbers[:8], "little", signed=True)
        head = SUM.pack(offsets.buffer_info()[0], *self._addresses, scale, 0.0, per_tensor, True, fresh)
        form = 0 if code < 0 else 2 + code  # as gac_kernels.cpu.tables.Table
        call = (self._library.quick if elements <= QUICK else self._library.call).gac_accumulate
        check(call(numbers[8:], None, count, form, head, into, threads_for(elements)))
        return True

    def _order(self, regions: tuple[int, ...]) -> tuple[bytes, array, int]:
        """What follows from the regions: the elements of each, as bytes, their offsets, and elements in all."""
        found = self._orders.get(regions)
        if found is None:
            numels = array("q", [self._layout.numels[region] for region in regions])
            offsets = array("q", [self._layout.bucket_offsets[region] for region in regions])
            if len(self._orders) >= _MOST_ORDERS:
                self._orders.clear()
            found = self._orders[regions] = numels.tobytes(), offsets, sum(numels)
        return found

"""Tensors added to a vector whose address stays, in one call that checks no more than it has to.

:func:`gac_kernels.accumulate_` asks a dozen objects before it reads anything. Between backward passes none of them is
in a cache any more.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from gac_kernels import arguments
from gac_kernels.cpu.library import check, require
from gac_kernels.cpu.quick import QUICK
from gac_kernels.layout import SketchLayout

_SUM = struct.Struct("@PPPddiii")
_FORM_OF_ONE_DTYPE = 2  # what a table's form counts from
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
        self._orders: dict[int, tuple[Sequence[int], int, bytes, array, int]] = {}

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
            regions: of each tensor, no two alike. The same sequence is looked at once: it must not change.
            scale: multiplies what is added.
            into: address of two float64 numbers, squares and non-finite elements; ``per_tensor``: of two for each.
            fresh: bits: 1, the regions of ``total`` count as 0; 2, those of ``previous`` do.
        """
        numbers = arguments.describe(tensors)
        if numbers is None or not (tensors and tensors[0].is_cpu):
            return False
        _, count, numels, offsets, elements = self._order(regions)
        if numbers[8 + 8 * count : 8 + 16 * count] != numels or len(numbers) != 8 + 24 * count:
            return False
        code = int.from_bytes(numbers[:8], "little", signed=True)
        head = _SUM.pack(offsets.buffer_info()[0], *self._addresses, scale, 0.0, per_tensor, True, fresh)
        form = 0 if code < 0 else _FORM_OF_ONE_DTYPE + code
        quick = elements <= QUICK
        call = (self._library.quick if quick else self._library.call).gac_accumulate
        check(call(numbers[8:], None, count, form, head, into, 1 if quick else torch.get_num_threads()))
        return True

    def _order(self, regions: Sequence[int]) -> tuple[Sequence[int], int, bytes, array, int]:
        """What follows from the regions: their number, elements as bytes, offsets, and elements in all."""
        found = self._orders.get(id(regions))
        if found is None or found[0] is not regions:
            numels = array("q", [self._layout.numels[region] for region in regions])
            offsets = array("q", [self._layout.bucket_offsets[region] for region in regions])
            if len(self._orders) >= _MOST_ORDERS:
                self._orders.clear()
            found = self._orders[id(regions)] = regions, len(numels), numels.tobytes(), offsets, sum(numels)
        return found

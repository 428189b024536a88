"""``accumulate_`` on GPUs: a call looks its plan up, as one of ``sketch`` does, and starts two kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from gac_kernels.calls import takes
from gac_kernels.totals import AccumulateCall, accumulate_call
from gac_kernels.triton import config, kernels, launch
from gac_kernels.triton.grouping import (
    Plan,
    Plans,
    Readable,
    chunk_table,
    element_types,
    ends,
    indexed,
    readable,
    readable_seconds,
    reordered,
    row_ranges,
)
from gac_kernels.triton.launch import WIDTH, interpreted, kind, scalar_arguments, split
from gac_kernels.triton.tables import current_stream, device_tables, flat_chunks

_REDUCE_BLOCK = 2048


@takes(accumulate_call)
def accumulate_(call: AccumulateCall) -> Tensor:
    """See :func:`gac_kernels.accumulate_`. Two launches (one more for each further dtype); sums in float64.

    Weights act in float32, in float64 where a tensor or its second moment is.
    """
    device, numels = indexed(call.total.device), call.stretches.numels
    launch.check_device(device)
    if not any(numels):
        shape = (len(numels), 2) if call.per_tensor else (2,)
        return torch.zeros(shape, dtype=torch.float64, device=device) if call.into is None else call.into
    tensors, seconds = readable(call.read.listed), readable_seconds(call.read)
    dtypes = tensors[1], None if seconds is None else seconds[1]
    options = call.into is None, call.previous is None, call.per_tensor
    key = (call.stretches, dtypes, options, device, current_stream(device), config.CHUNK)
    return plans.get(key, lambda: AccumulatePlan(call, *dtypes, device)).run(call, tensors, seconds)


class AccumulatePlan(Plan):
    """Chunks of a list that is added to a vector, their tables and the kernels' constants, for calls like ``call``."""

    def __init__(self, call: AccumulateCall, dtypes: object, second_dtypes: object, device: torch.device) -> None:
        super().__init__(len(call.stretches.numels), dtypes, second_dtypes, device)
        numels, starts = (tuple(reordered(x, self.order)) for x in (call.stretches.numels, call.stretches.offsets))
        self.chunks = flat_chunks(numels, self.sizes, config.chunk_of(sum(numels)))
        setup = config.for_device(device)
        self.constants = [
            {
                **element_types(pair),
                "WIDTH": WIDTH,
                "UNROLL": 1 if self.weighted and call.previous is not None else setup.pair_unroll,
                "BITWISE_BF16": interpreted(),
            }
            for pair, _ in self.groups
        ]
        self.reduce_constants = {"COLUMNS": 2, "ADD": call.into is not None, "BLOCK": _REDUCE_BLOCK}
        self.table = chunk_table(self.chunks, device)
        self.ranges, self.rows = row_ranges(self.chunks, self.order, 1, call.per_tensor, device)
        build = lambda: torch.tensor(starts, dtype=torch.int64)
        self.offsets = device_tables.get(("offsets", starts), device, build)

    def run(self, call: AccumulateCall, tensors: Readable, seconds: Readable | None) -> Tensor:
        """Makes the call."""
        device, count, into = self.device, self.chunks.count, call.into
        self.keep(self.table, self.ranges, self.offsets)
        partials = torch.empty(2, count, dtype=torch.float64, device=device)
        where, second_where = self.where(tensors, seconds)
        eps = split(call.read.eps) if self.weighted else (None, None)
        scale = scalar_arguments(call.scale)
        slots = self.slots_of((kind(call.total), kind(call.previous), kind(call.scale), kind(into)))
        for (first, chunks), constants, slot in zip(ends(self.chunks), self.constants, slots, strict=False):
            launch.launch(
                kernels.accumulate_kernel,
                (chunks,),
                device,
                where,
                second_where,
                self.table,
                self.offsets,
                first,
                call.previous,
                call.total,
                partials,
                count,
                *scale,
                *eps,
                slot=slot,
                **constants,
            )
        result = torch.empty(self.rows, 2, dtype=torch.float64, device=device) if into is None else into
        launch.launch(
            kernels.reduce_kernel,
            (self.rows,),
            device,
            partials,
            count,
            self.ranges,
            result,
            slot=slots[-1],
            **self.reduce_constants,
        )
        if into is not None:
            return into
        return result if call.per_tensor else result[0]


plans: Plans[AccumulatePlan] = Plans()

"""``sketch`` and ``absorb_sketch_`` on GPUs.

A call looks its plan up, compares addresses with the last ones, and starts two kernels. Repeated ones go by
:mod:`gac_kernels.triton.direct`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gac_kernels import layout as layouts
from gac_kernels.calls import SketchCall, sketch_call, takes
from gac_kernels.layout import CELL_LANES, SketchLayout
from gac_kernels.totals import AbsorbSketchCall, absorb_sketch_call
from gac_kernels.triton import config, kernels, launch
from gac_kernels.triton.direct import Repeated, listed, remembered, seen
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
    row_count,
    row_ranges,
)
from gac_kernels.triton.launch import interpreted, kind, scalar_arguments, split
from gac_kernels.triton.tables import current_stream, device_tables, sketch_chunks

_FINISH_SLOTS = 8
_REDUCE_BLOCK = 2048


_sketches: dict[tuple, Repeated] = {}
_absorbing: dict[tuple, Repeated] = {}


@takes(sketch_call)
def sketch(call: SketchCall) -> Tensor:
    """See :func:`gac_kernels.sketch`. Buckets and squares are added in float32 within a chunk.

    So are weights, in float64 where a tensor or its second moment is. The moments have the value range of
    :func:`moments`. A bucket overflows where a partial sum of at most 256 of its elements (before ``scale``) exceeds
    float32's range.
    """
    plan, tensors, seconds = _planned(call, call.into is None)
    return plan.finish(call, *plan.start(call, tensors, seconds))


@takes(absorb_sketch_call)
def absorb_sketch_(call: AbsorbSketchCall) -> Tensor:
    """See :func:`gac_kernels.absorb_sketch_`. Two launches, the second in float64, as :func:`absorb_` is."""
    plan, tensors, seconds = _planned(call.sketched, None)
    return plan.absorb(call, *plan.start(call.sketched, tensors, seconds))


def _direct_sketch(
    tensors: Any,
    out: Tensor,
    *,
    layout: SketchLayout | None = None,
    regions: Any = None,
    starts: Any = None,
    seed: int = 0,
    scale: Tensor | float | None = None,
    accumulate: bool = False,
    per_tensor: bool = False,
    into: Tensor | None = None,
    second_moments: Any = None,
    eps: float = 1e-8,
    block_scales: Any = None,
) -> Tensor:
    """:func:`sketch` of the public arguments."""
    one, factor, vectors = None, 1.0 if scale is None else scale, []
    if block_scales is None and not per_tensor and isinstance(out, Tensor):
        vectors = [out, out if into is None else into]
        if isinstance(factor, Tensor):
            vectors.append(factor)
        options = (layout, listed(regions), listed(starts), seed, bool(accumulate), into is None, eps, type(factor))
        one = seen(tensors, second_moments, vectors, options)
    if one is not None:
        known = _sketches.get(one.key)
        if known is not None and known.ready(one):
            plan, result = known.plan, into
            if result is None:
                result = torch.empty(2, dtype=torch.float64, device=plan.device)
            known.run(one, (out,), factor, result, (plan.moment_rows,))
            return result
    call = sketch_call(
        tensors if one is None else one.tensors,
        out,
        layout=layout,
        regions=regions,
        starts=starts,
        seed=seed,
        scale=scale,
        accumulate=accumulate,
        per_tensor=per_tensor,
        into=into,
        second_moments=second_moments,
        eps=eps,
        block_scales=block_scales,
    )
    plan, read, seconds = _planned(call, into is None)
    result = plan.finish(call, *plan.start(call, read, seconds))
    if one is not None:
        remembered(_sketches, plan, plan.eps(call), plan.finish_slot(call), plan.finish_programs, one, len(vectors))
    return result


sketch.direct = _direct_sketch


def _direct_absorb(
    tensors: Any,
    previous: Tensor,
    total: Tensor,
    scale: Tensor | float,
    *,
    layout: SketchLayout,
    regions: Any = None,
    into: Tensor | None = None,
    second_moments: Any = None,
    eps: float = 1e-8,
    block_scales: Any = None,
) -> Tensor:
    """:func:`absorb_sketch_` of the public arguments."""
    one, vectors = None, []
    if block_scales is None and into is not None and isinstance(previous, Tensor) and isinstance(total, Tensor):
        vectors = [previous, total, into, *([scale] if isinstance(scale, Tensor) else ())]
        one = seen(tensors, second_moments, vectors, (layout, listed(regions), eps, type(scale)))
    if one is not None and into is not None:
        known = _absorbing.get(one.key)
        if known is not None and into.dim() == 1 and known.ready(one):
            known.run(one, (previous, total), scale, into, ())
            return into
    call = absorb_sketch_call(
        tensors if one is None else one.tensors,
        previous,
        total,
        scale,
        layout=layout,
        regions=regions,
        into=into,
        second_moments=second_moments,
        eps=eps,
        block_scales=block_scales,
    )
    plan, read, seconds = _planned(call.sketched, None)
    result = plan.absorb(call, *plan.start(call.sketched, read, seconds))
    if one is not None:
        programs = 1 + len(plan.chunks.slabs) * layout.cells_of_slab
        remembered(_absorbing, plan, plan.eps(call.sketched), plan.absorb_slot(call), programs, one, len(vectors))
    return result


absorb_sketch_.direct = _direct_absorb


def _planned(call: SketchCall, fresh: bool | None) -> tuple[SketchPlan, Readable, Readable | None]:
    """The plan of a call, and what it reads. ``fresh``: whether its sums are a new tensor; None: it absorbs."""
    out = call.out
    device = indexed(out.device)
    launch.check_device(device)
    tensors, seconds = readable(call.read.listed), readable_seconds(call.read)
    dtypes = tensors[1], None if seconds is None else seconds[1], out.dtype
    options = fresh, call.accumulate, call.per_tensor, call.tail
    key = (call.places, call.read.numels, dtypes, options, device, current_stream(device), layouts.SKETCH_CHUNK_ROWS)
    return plans.get(key, lambda: SketchPlan(call, *dtypes[:2], device)), tensors, seconds


class SketchPlan(Plan):
    """Chunks of a sketch, their tables and the kernels' constants, for calls like ``call``."""

    def __init__(self, call: SketchCall, dtypes: object, second_dtypes: object, device: torch.device) -> None:
        super().__init__(len(call.read.numels), dtypes, second_dtypes, device)
        layout, setup = call.layout, config.for_device(device)
        numels, regions, starts = (
            tuple(reordered(x, self.order)) for x in (call.read.numels, call.places.regions, call.places.starts)
        )
        rows = layouts.sketch_chunk_rows(row_count(numels, layout.lanes), layout.lanes, layout.rows_per_slab)
        self.chunks = sketch_chunks(numels, self.sizes, layout, regions, starts, rows, call.accumulate, call.tail)
        self.lanes = layout.lanes
        words = min(-(-self.lanes // 32), config.COLUMN_BLOCK // 32)
        words = 1 << (words - 1).bit_length()
        self.blocks = -(-self.lanes // (words * 32))
        unroll = max(1, setup.pair_unroll // (2 if self.wide else 1)) if self.weighted else setup.unroll
        self.constants = [
            {
                **element_types(pair),
                "LANES": self.lanes,
                "WORDS": words,
                "UNROLL": unroll,
                "BITWISE_BF16": interpreted(),
            }
            for pair, _ in self.groups
        ]
        self.finish_constants = {
            "LANES": self.lanes,
            "WIDTH": setup.finish_width,
            "SLOTS": _FINISH_SLOTS,
            "ACCUMULATE": call.accumulate,
            "ADD": call.into is not None,
            "BLOCK": _REDUCE_BLOCK,
        }
        self.table = chunk_table(self.chunks, device) if self.chunks.count else None
        self.slabs = device_tables.get(("slabs", self.chunks), device, lambda: self.chunks.slabs)
        self.ranges, self.moment_rows = row_ranges(self.chunks, self.order, self.blocks, call.per_tensor, device)
        self.finish_programs = self.moment_rows + len(self.chunks.slabs) * -(-self.lanes // setup.finish_width)

    def start(self, call: SketchCall, tensors: Readable, seconds: Readable | None) -> tuple[Tensor, Tensor]:
        """The first stage: sums of lanes and moments of each chunk."""
        device, count = self.device, self.chunks.count
        self.keep(self.table, self.slabs, self.ranges)
        acc = torch.float64 if self.wide else torch.float32
        lane_partials = torch.empty(count, self.lanes, dtype=acc, device=device)
        partials = torch.empty(2, count * self.blocks, dtype=torch.float64, device=device)
        if count:
            where, second_where = self.where(tensors, seconds)
            eps = self.eps(call)
            for (first, chunks), constants, slot in zip(ends(self.chunks), self.constants, self.slots, strict=True):
                launch.launch(
                    kernels.sketch_kernel,
                    (chunks, self.blocks),
                    device,
                    where,
                    second_where,
                    self.table,
                    first,
                    lane_partials,
                    partials,
                    count * self.blocks,
                    *eps,
                    slot=slot,
                    **constants,
                )
        return lane_partials, partials

    def eps(self, call: SketchCall) -> tuple:
        """A call's ``eps`` as kernels take it."""
        return split(call.read.eps) if self.weighted else (None, None)

    def finish_slot(self, call: SketchCall) -> launch.Slot:
        """Of the second stage."""
        return self.slots_of((kind(call.out), kind(call.scale), kind(call.into)))[-1]

    def absorb_slot(self, call: AbsorbSketchCall) -> launch.Slot:
        """Of the second stage of ``absorb_sketch_``."""
        return self.slots_of(tuple(map(kind, (call.previous, call.total, call.scale, call.into))))[-1]

    def finish(self, call: SketchCall, lane_partials: Tensor, partials: Tensor) -> Tensor:
        """The second stage."""
        device, into = self.device, call.into
        result = torch.empty(self.moment_rows, 2, dtype=torch.float64, device=device) if into is None else into
        launch.launch(
            kernels.sketch_finish_kernel,
            (self.finish_programs,),
            device,
            lane_partials,
            self.slabs,
            call.out,
            *scalar_arguments(call.scale),
            partials,
            partials.shape[1],
            self.ranges,
            result,
            self.moment_rows,
            slot=self.finish_slot(call),
            **self.finish_constants,
        )
        if into is not None:
            return into
        return result if call.per_tensor else result[0]

    def absorb(self, call: AbsorbSketchCall, lane_partials: Tensor, partials: Tensor) -> Tensor:
        """The second stage of ``absorb_sketch_``."""
        layout, into = call.sketched.layout, call.into
        sums = torch.zeros(2 + layout.cells, dtype=torch.float64, device=self.device) if into is None else into
        launch.launch(
            kernels.sketch_absorb_kernel,
            (1 + len(self.chunks.slabs) * layout.cells_of_slab,),
            self.device,
            lane_partials,
            self.slabs,
            call.previous,
            call.total,
            *scalar_arguments(call.scale),
            partials,
            partials.shape[1],
            self.ranges,
            sums,
            slot=self.absorb_slot(call),
            LANES=self.lanes,
            WIDTH=CELL_LANES,
            SLOTS=_FINISH_SLOTS,
            BLOCK=_REDUCE_BLOCK,
        )
        return sums


plans: Plans[SketchPlan] = Plans()

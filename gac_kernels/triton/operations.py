"""The operations on top of the kernels: same signatures and results as :mod:`gac_kernels.ops`."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from itertools import repeat
from typing import Any

import torch
from torch import Tensor

from gac_kernels.arguments import check_pair, check_scalar, tensor_list
from gac_kernels.calls import SketchCall, TokenCall, sketch_call, takes, token_call
from gac_kernels.layout import LANES, sketch_chunk_rows
from gac_kernels.totals import AbsorbCall, AccumulateCall, absorb_call, accumulate_call
from gac_kernels.triton import config, kernels
from gac_kernels.triton.grouping import (
    accumulator,
    by_dtype,
    chunk_table,
    ends,
    indexed,
    reordered,
    row_count,
    row_ranges,
)
from gac_kernels.triton.launch import WIDTH, check_device, interpreted, launch, scalar_arguments, split
from gac_kernels.triton.readable import ELEMENTS, all_plain, any_order, in_order, readable_pairs, supported
from gac_kernels.triton.tables import Chunks, addresses, device_tables, flat_chunks, sketch_chunks

_dtype = operator.attrgetter("dtype")
_FINISH_SLOTS = 8
_REDUCE_BLOCK = 2048


def _reduce(
    plan: Chunks, order: Sequence[int], partials: Tensor, per_tensor: bool, into: Tensor | None = None
) -> Tensor:
    """Second stage: ``partials`` ``[columns, chunks]`` to ``[columns]`` or ``[n, columns]``, or added to ``into``."""
    columns, device = partials.shape[0], partials.device
    ranges, rows = row_ranges(plan, order, 1, per_tensor, device)
    out = torch.empty(rows, columns, dtype=torch.float64, device=device) if into is None else into.detach()
    launch(
        kernels.reduce_kernel,
        (rows,),
        device,
        partials,
        plan.count,
        ranges,
        out,
        COLUMNS=columns,
        ADD=into is not None,
        BLOCK=_REDUCE_BLOCK,
    )
    if into is not None:
        return into
    return out if per_tensor else out[0]


def moments(tensors: Any, *, per_tensor: bool = False) -> Tensor:
    """See :func:`gac_kernels.moments`. Squares are added in float32 within a chunk.

    A sum of squares beyond float32's range is found and taken again in float64; squares below 2**-149 count as 0, so
    the result is off by at most that much for each element smaller than 3.7e-23.
    """
    tensors = tensor_list(tensors, "tensors")
    device = indexed(tensors[0].device) if tensors else torch.device("cpu")
    shape = (len(tensors), 2) if per_tensor else (2,)
    if not any(t.numel() for t in tensors):
        return torch.zeros(shape, dtype=torch.float64, device=device)
    check_device(device)
    if not all_plain(tensors):
        tensors = [any_order(t) for t in tensors]
    order, groups = by_dtype(list(map(_dtype, tensors)))
    tensors = reordered(tensors, order)
    plan = flat_chunks(tuple(map(Tensor.numel, tensors)), tuple(n for _, n in groups), config.CHUNK)
    partials = torch.empty(2, plan.count, dtype=torch.float64, device=device)
    table, where = chunk_table(plan, device), addresses(tensors, device)
    for (dtype, _), (first, count) in zip(groups, ends(plan), strict=True):
        launch(
            kernels.moments_kernel,
            (count,),
            device,
            where,
            table,
            first,
            partials,
            plan.count,
            ELEMENT=ELEMENTS[dtype],
            ACC=accumulator(dtype),
            WIDTH=WIDTH,
            UNROLL=config.for_device(device).unroll,
            BITWISE_BF16=interpreted(),
        )
    return _reduce(plan, order, partials, per_tensor)


@takes(sketch_call)
def sketch(call: SketchCall) -> Tensor:
    """See :func:`gac_kernels.sketch`. Buckets and squares are added in float32 within a chunk.

    So are weights, in float64 where a tensor or its second moment is. The moments have the value range of
    :func:`moments`. A bucket overflows where a partial sum of at most 256 of its elements (before ``scale``) exceeds
    float32's range.
    """
    layout, out, seconds, into = call.layout, call.out, call.second_moments, call.into
    device = indexed(out.device)
    check_device(device)
    tensors = in_order(call.tensors)
    if seconds is None:
        order, groups = by_dtype(list(zip(map(_dtype, tensors), repeat(None))))
    else:
        seconds = in_order(seconds)
        order, groups = by_dtype(list(zip(map(_dtype, tensors), map(_dtype, seconds), strict=True)))
        seconds = reordered(seconds, order)
    tensors = reordered(tensors, order)
    numels = tuple(map(Tensor.numel, tensors))
    plan = sketch_chunks(
        numels,
        tuple(n for _, n in groups),
        layout,
        tuple(reordered(call.places.regions, order)),
        tuple(reordered(call.places.starts, order)),
        sketch_chunk_rows(row_count(numels, layout.lanes), layout.lanes),
        call.accumulate,
        call.tail,
    )
    lanes, setup = layout.lanes, config.for_device(device)
    words = min(-(-lanes // 32), config.COLUMN_BLOCK // 32)
    words = 1 << (words - 1).bit_length()
    blocks = -(-lanes // (words * 32))
    wide = any(torch.float64 in dtypes for dtypes, _ in groups)
    lane_partials = torch.empty(plan.count, lanes, dtype=torch.float64 if wide else torch.float32, device=device)
    partials = torch.empty(2, plan.count * blocks, dtype=torch.float64, device=device)
    if plan.count:
        table, where = chunk_table(plan, device), addresses(tensors, device)
        second_where = None if seconds is None else addresses(seconds, device)
        for (dtypes, _), (first, chunks) in zip(groups, ends(plan), strict=True):
            launch(
                kernels.sketch_kernel,
                (chunks, blocks),
                device,
                where,
                second_where,
                table,
                first,
                lane_partials,
                partials,
                plan.count * blocks,
                *((None, None) if seconds is None else split(call.eps)),
                ELEMENT=ELEMENTS[dtypes[0]],
                SECOND=None if seconds is None else ELEMENTS[dtypes[1]],
                ACC=accumulator(*dtypes),
                LANES=lanes,
                WORDS=words,
                UNROLL=setup.unroll if seconds is None else max(1, setup.pair_unroll // (2 if wide else 1)),
                BITWISE_BF16=interpreted(),
            )
    ranges, moment_rows = row_ranges(plan, order, blocks, call.per_tensor, device)
    result = torch.empty(moment_rows, 2, dtype=torch.float64, device=device) if into is None else into.detach()
    launch(
        kernels.sketch_finish_kernel,
        (moment_rows + len(plan.slabs) * -(-lanes // setup.finish_width),),
        device,
        lane_partials,
        device_tables.get(("slabs", plan), device, lambda: plan.slabs),
        out.detach(),
        *scalar_arguments(call.scale),
        partials,
        plan.count * blocks,
        ranges,
        result,
        moment_rows,
        LANES=lanes,
        WIDTH=setup.finish_width,
        SLOTS=_FINISH_SLOTS,
        ACCUMULATE=call.accumulate,
        ADD=into is not None,
        BLOCK=_REDUCE_BLOCK,
    )
    if into is not None:
        return into
    return result if call.per_tensor else result[0]


@takes(accumulate_call)
def accumulate_(call: AccumulateCall) -> Tensor:
    """See :func:`gac_kernels.accumulate_`. Two launches (one more for each further dtype); sums in float64.

    Weights act in float32, in float64 where a tensor or its second moment is.
    """
    total, previous, seconds, into = call.total, call.previous, call.second_moments, call.into
    device = indexed(total.device)
    check_device(device)
    if not any(call.stretches.numels):
        shape = (len(call.stretches.numels), 2) if call.per_tensor else (2,)
        return torch.zeros(shape, dtype=torch.float64, device=device) if into is None else into
    tensors = in_order(call.tensors)
    if seconds is None:
        order, groups = by_dtype(list(zip(map(_dtype, tensors), repeat(None))))
    else:
        seconds = in_order(seconds)
        order, groups = by_dtype(list(zip(map(_dtype, tensors), map(_dtype, seconds), strict=True)))
        seconds = reordered(seconds, order)
    tensors = reordered(tensors, order)
    numels, starts = (tuple(reordered(x, order)) for x in (call.stretches.numels, call.stretches.offsets))
    plan = flat_chunks(numels, tuple(n for _, n in groups), config.CHUNK)
    partials = torch.empty(2, plan.count, dtype=torch.float64, device=device)
    table, where = chunk_table(plan, device), addresses(tensors, device)
    offsets = device_tables.get(("offsets", starts), device, lambda: torch.tensor(starts, dtype=torch.int64))
    second_where = None if seconds is None else addresses(seconds, device)
    setup = config.for_device(device)
    for (dtypes, _), (first, count) in zip(groups, ends(plan), strict=True):
        launch(
            kernels.accumulate_kernel,
            (count,),
            device,
            where,
            second_where,
            table,
            offsets,
            first,
            None if previous is None else previous.detach(),
            total.detach(),
            partials,
            plan.count,
            *scalar_arguments(call.scale),
            *((None, None) if seconds is None else split(call.eps)),
            ELEMENT=ELEMENTS[dtypes[0]],
            SECOND=None if seconds is None else ELEMENTS[dtypes[1]],
            ACC=accumulator(*dtypes),
            WIDTH=WIDTH,
            UNROLL=setup.pair_unroll if seconds is None or previous is None else 1,
            BITWISE_BF16=interpreted(),
        )
    return _reduce(plan, order, partials, call.per_tensor, into)


def _pair(a: list[Tensor], b: list[Tensor], weight: Tensor | float, *, mix: bool, want: bool, per_tensor: bool) -> Any:
    """``pair_moments`` and ``mix_`` on pairs of contiguous tensors of supported dtypes."""
    device = indexed(a[0].device)
    check_device(device)
    order, groups = by_dtype(list(zip(map(_dtype, a), map(_dtype, b), strict=True)))
    a, b = reordered(a, order), reordered(b, order)
    plan = flat_chunks(tuple(map(Tensor.numel, a)), tuple(n for _, n in groups), config.CHUNK)
    partials = torch.empty(3, plan.count if want else 0, dtype=torch.float64, device=device)
    table = chunk_table(plan, device)
    a_addresses, b_addresses = addresses(a, device), addresses(b, device)
    for (dtypes, _), (first, count) in zip(groups, ends(plan), strict=True):
        launch(
            kernels.pair_kernel,
            (count,),
            device,
            a_addresses,
            b_addresses,
            table,
            first,
            partials,
            plan.count,
            *scalar_arguments(weight),
            A=ELEMENTS[dtypes[0]],
            B=ELEMENTS[dtypes[1]],
            ACC=accumulator(*dtypes),
            WIDTH=WIDTH,
            UNROLL=config.for_device(device).pair_unroll,
            MIX=mix,
            MOMENTS=want,
            BITWISE_BF16=interpreted(),
        )
    return _reduce(plan, order, partials, per_tensor) if want else None


def pair_moments(a: Any, b: Any, *, per_tensor: bool = False) -> Tensor:
    """See :func:`gac_kernels.pair_moments`. The value range is that of :func:`moments`."""
    a, b = check_pair(a, b)
    if not any(t.numel() for t in a):
        shape = (len(a), 3) if per_tensor else (3,)
        return torch.zeros(shape, dtype=torch.float64, device=a[0].device if a else None)
    a, b = readable_pairs(a, b)
    return _pair(a, b, 1.0, mix=False, want=True, per_tensor=per_tensor)


def mix_(a: Any, b: Any, mu: Tensor | float, *, moments: bool = False) -> Tensor | None:
    """See :func:`gac_kernels.mix_`.

    The products are rounded to float32 (float64 when either tensor is float64) before ``a``'s dtype. The moments of
    this pass cannot be taken a second time, so they are infinite where a sum of squares over one of 1,024 strands of a
    chunk exceeds float32's range (elements beyond about 2e18); :func:`pair_moments` has no such limit.
    """
    a, b = check_pair(a, b, writes_a=True)
    if not any(t.numel() for t in a):
        return torch.zeros(3, dtype=torch.float64, device=a[0].device if a else None) if moments else None
    weight = check_scalar(mu, "mu", a[0].device)
    written, read = readable_pairs(a, b)
    result = _pair(written, read, weight, mix=True, want=moments, per_tensor=False)
    for target, mixed in zip(a, written, strict=True) if written is not a else ():
        if mixed.data_ptr() != target.data_ptr() or mixed.dtype != target.dtype:
            target.detach().copy_(mixed)  # a copy stood in for strides or a dtype that the kernel does not write
    return result


@takes(token_call)
def token_moments(call: TokenCall) -> Tensor:
    """See :func:`gac_kernels.token_moments`. One launch, one program a sequence, float64 throughout."""
    logprobs, advantages, mask, is_expert = call
    device = indexed(logprobs.device)
    check_device(device)
    rows, length = logprobs.shape
    out = torch.empty(rows, 7, dtype=torch.float64, device=device)
    if mask.dtype == torch.bool:
        mask = mask.view(torch.uint8)
    logprobs, advantages = supported(logprobs), supported(advantages)
    launch(
        kernels.token_kernel,
        (rows,),
        device,
        logprobs,
        *logprobs.stride(),
        advantages,
        *advantages.stride(),
        mask.detach(),
        *mask.stride(),
        is_expert.contiguous().view(torch.uint8),
        length,
        out,
        WIDTH=WIDTH,
        BITWISE_BF16=interpreted(),
    )
    return out


@takes(absorb_call)
def absorb_(call: AbsorbCall) -> Tensor:
    """See :func:`gac_kernels.absorb_`. One launch, float64 arithmetic."""
    current, previous, total, scale, into, cells = call
    device = indexed(current.device)
    check_device(device)
    out = torch.empty(cells, dtype=torch.float64, device=device) if into is None else into.detach()
    launch(
        kernels.absorb_kernel,
        (cells,),
        device,
        current.detach(),
        None if previous is None else previous.detach(),
        total.detach(),
        current.numel(),
        *scalar_arguments(scale),
        out,
        CELL=LANES,
        ADD=into is not None,
    )
    return out if into is None else into

"""The operations on top of the kernels: same signatures and results as :mod:`gac_kernels.ops`."""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gac_kernels.arguments import check_pair, check_scalar, tensor_list
from gac_kernels.calls import TokenCall, takes, token_call
from gac_kernels.elements import elements
from gac_kernels.layout import LANES
from gac_kernels.totals import AbsorbCall, absorb_call
from gac_kernels.triton import config, kernels, launch
from gac_kernels.triton.grouping import (
    accumulator,
    by_dtype,
    chunk_table,
    element_types,
    ends,
    indexed,
    readable_seconds,
    reordered,
    row_ranges,
)
from gac_kernels.triton.launch import WIDTH, Slot, interpreted, kind, scalar_arguments
from gac_kernels.triton.readable import ELEMENTS, all_plain, any_order, readable_pairs, supported
from gac_kernels.triton.tables import Chunks, addresses, flat_chunks

_dtype = operator.attrgetter("dtype")
_FINISH_SLOTS = 8
_REDUCE_BLOCK = 2048
_absorb_slots: defaultdict[Any, Slot] = defaultdict(Slot)
_pair_slots: defaultdict[Any, Slot] = defaultdict(Slot)


def _reduce(plan: Chunks, order: Sequence[int], partials: Tensor, per_tensor: bool) -> Tensor:
    """Second stage: ``partials`` ``[columns, chunks]`` to ``[columns]`` or ``[n, columns]``."""
    columns, device = partials.shape[0], partials.device
    ranges, rows = row_ranges(plan, order, 1, per_tensor, device)
    out = torch.empty(rows, columns, dtype=torch.float64, device=device)
    launch.launch(
        kernels.reduce_kernel,
        (rows,),
        device,
        partials,
        plan.count,
        ranges,
        out,
        COLUMNS=columns,
        ADD=False,
        BLOCK=_REDUCE_BLOCK,
    )
    return out if per_tensor else out[0]


def moments(tensors: Any, *, per_tensor: bool = False, block_scales: Any = None) -> Tensor:
    """See :func:`gac_kernels.moments`. Squares are added in float32 within a chunk.

    A sum of squares beyond float32's range is found and taken again in float64; squares below 2**-149 count as 0, so
    the result is off by at most that much for each element smaller than 3.7e-23.
    """
    scales, kinds = None, [None]
    if block_scales is None:
        tensors = tensor_list(tensors, "tensors")
    else:
        read = elements(tensors, None, "", block_scales=block_scales)
        tensors, (scales, kinds, _) = read.tensors, readable_seconds(read)
    device = indexed(tensors[0].device) if tensors else torch.device("cpu")
    shape = (len(tensors), 2) if per_tensor else (2,)
    if not any(t.numel() for t in tensors):
        return torch.zeros(shape, dtype=torch.float64, device=device)
    launch.check_device(device)
    if not all_plain(tensors):
        tensors = [any_order(t) for t in tensors]
    kinds = kinds if scales is not None else kinds * len(tensors)
    order, groups = by_dtype(list(zip(map(_dtype, tensors), kinds, strict=True)))
    tensors = reordered(tensors, order)
    numels = tuple(map(Tensor.numel, tensors))
    plan = flat_chunks(numels, tuple(n for _, n in groups), config.chunk_of(sum(numels)))
    partials = torch.empty(2, plan.count, dtype=torch.float64, device=device)
    table, where = chunk_table(plan, device), addresses(tensors, device)
    scale_where = None if scales is None else addresses(reordered(scales, order), device)
    for (pair, _), (first, count) in zip(groups, ends(plan), strict=True):
        launch.launch(
            kernels.moments_kernel,
            (count,),
            device,
            where,
            scale_where,
            table,
            first,
            partials,
            plan.count,
            **element_types(pair),
            WIDTH=WIDTH,
            UNROLL=config.for_device(device).unroll,
            BITWISE_BF16=interpreted(),
        )
    return _reduce(plan, order, partials, per_tensor)


def _pair(a: list[Tensor], b: list[Tensor], weight: Tensor | float, *, mix: bool, want: bool, per_tensor: bool) -> Any:
    """``pair_moments`` and ``mix_`` on pairs of contiguous tensors of supported dtypes."""
    partials, plan, order = _pair_chunks(a, b, weight, mix=mix, want=want)
    return _reduce(plan, order, partials, per_tensor) if want else None


def pair_partials(a: Tensor, b: Tensor) -> Tensor:
    """``[3, chunks]`` float64 that add up to the pair moments of two contiguous float32 vectors. One launch."""
    like = (indexed(a.device), *map(kind, (a, b)))
    return _pair_chunks([a], [b], 1.0, mix=False, want=True, slot=_pair_slots[like])[0]


def _pair_chunks(
    a: list[Tensor], b: list[Tensor], weight: Tensor | float, *, mix: bool, want: bool, slot: Slot | None = None
) -> tuple[Tensor, Chunks, Sequence[int]]:
    """The first stage: partial moments, if wanted, the chunks that they are of, and the order of the tensors."""
    device = indexed(a[0].device)
    launch.check_device(device)
    order, groups = by_dtype(list(zip(map(_dtype, a), map(_dtype, b), strict=True)))
    a, b = reordered(a, order), reordered(b, order)
    numels = tuple(map(Tensor.numel, a))
    plan = flat_chunks(numels, tuple(n for _, n in groups), config.chunk_of(sum(numels)))
    partials = torch.empty(3, plan.count if want else 0, dtype=torch.float64, device=device)
    table = chunk_table(plan, device)
    a_addresses, b_addresses = addresses(a, device), addresses(b, device)
    for (dtypes, _), (first, count) in zip(groups, ends(plan), strict=True):
        launch.launch(
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
            slot=slot,
            A=ELEMENTS[dtypes[0]],
            B=ELEMENTS[dtypes[1]],
            ACC=accumulator(*dtypes),
            WIDTH=WIDTH,
            UNROLL=config.for_device(device).pair_unroll,
            MIX=mix,
            MOMENTS=want,
            BITWISE_BF16=interpreted(),
        )
    return partials, plan, order


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
    launch.check_device(device)
    rows, length = logprobs.shape
    out = torch.empty(rows, 7, dtype=torch.float64, device=device)
    if mask.dtype == torch.bool:
        mask = mask.view(torch.uint8)
    logprobs, advantages = supported(logprobs), supported(advantages)
    launch.launch(
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
    launch.check_device(device)
    out = torch.empty(cells, dtype=torch.float64, device=device) if into is None else into
    long = current.numel() >= 2**31  # a number of 64 bits is an argument of another type
    like = (device, into is None, long, *map(kind, (current, previous, total, scale, into)))
    launch.launch(
        kernels.absorb_kernel,
        (cells,),
        device,
        current,
        previous,
        total,
        current.numel(),
        *scalar_arguments(scale),
        out,
        slot=_absorb_slots[like],
        CELL=LANES,
        ADD=into is not None,
    )
    return out if into is None else into

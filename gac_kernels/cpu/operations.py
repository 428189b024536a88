"""The operations on CPU tensors. What each computes is said in :mod:`gac_kernels.ops`.

Two ways lead from here to C. The quick one takes contiguous tensors of plain types and does the least a correct call
needs, since for small tensors the call is the cost. Whatever it does not recognise takes the careful one, which makes
the full checks of :mod:`gac_kernels.arguments` and raises their errors. Before both, where they can be had, come the
builtins of :mod:`gac_kernels.cpu.builtins`, which pass on to here what they do not take.
"""

from __future__ import annotations

import struct
from array import array
from functools import lru_cache
from operator import ne
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from gac_kernels.arguments import check_pair, check_scalar, getter, tensor_list
from gac_kernels.calls import Places, SketchCall, sketch_call, takes
from gac_kernels.cpu.library import check, require
from gac_kernels.cpu.quick import ONE_THREAD, QUICK, QUICK_PACKED, pack, pack_pair, single, with_threads
from gac_kernels.cpu.tables import (
    PAIRED_CODES,
    Table,
    list_table,
    plain_table,
    readable,
    require_cpu,
    second_table,
    strided_table,
)
from gac_kernels.elements import Elements, elements
from gac_kernels.strides import flat_views, runs
from gac_kernels.totals import (
    AbsorbCall,
    AbsorbSketchCall,
    AccumulateCall,
    Stretches,
    absorb_call,
    absorb_sketch_call,
    accumulate_call,
)

__all__ = ["absorb_", "absorb_sketch_", "accumulate_", "mix_", "moments", "pair_moments", "sketch"]

_CPU = torch.device("cpu")
_FLOAT64 = torch.float64
_TWO, _THREE = torch.empty(2, dtype=_FLOAT64), torch.empty(3, dtype=_FLOAT64)  # empty_like costs less than empty
_empty_like = torch.empty_like
_shape = getter("shape")


def threads_for(elements: int) -> int:
    """Threads that so many elements are worth."""
    return torch.get_num_threads() if elements > QUICK else 1


def _sums(count: int, width: int, per_tensor: bool) -> Tensor:
    if per_tensor:
        return torch.empty(count, width, dtype=_FLOAT64)
    return _empty_like(_TWO if width == 2 else _THREE)


def moments(tensors: Any, *, per_tensor: bool = False, block_scales: Any = None) -> Tensor:
    """Sum of squares and number of non-finite elements; see :func:`gac_kernels.moments`."""
    if block_scales is not None:
        return _scaled_moments(elements(tensors, None, "", block_scales=block_scales), per_tensor)
    library = require()
    if not per_tensor:
        tensor = single(tensors) if type(tensors) is list else tensors
        packed = pack(tensor)
        if packed:
            out = _empty_like(_TWO)
            if packed < QUICK_PACKED:
                failed = library.quick.gac_moments_one(tensor.data_ptr(), packed | ONE_THREAD, out.data_ptr())
            else:
                failed = library.call.gac_moments_one(tensor.data_ptr(), with_threads(packed), out.data_ptr())
            if failed:
                check(failed)
            return out
    table = plain_table(tensors) if isinstance(tensors, list) else None
    if table is None:
        tensors = tensor_list(tensors, "tensors")
        require_cpu(tensors, "tensors")
        table = strided_table(tensors, any_order=True)
    count = len(table.numels)
    out = _sums(count, 2, per_tensor)
    threads = threads_for(sum(table.numels))
    check(library.call.gac_moments(table.rows, count, table.form, per_tensor, out.data_ptr(), threads))
    return out


def _scaled_moments(read: Elements, per_tensor: bool) -> Tensor:
    """What ``accumulate_`` makes of them where nothing is added to."""
    require_cpu(list(read.tensors), "tensors")
    table, scales, count = list_table(read.listed, read.numels), second_table(read), len(read.numels)
    out, head = _sums(count, 2, per_tensor), SUM.pack(0, 0, 0, 1.0, read.eps, per_tensor, 0, 0)
    forms, threads = table.form | scales.form << 4, threads_for(sum(read.numels))
    check(require().call.gac_accumulate(table.rows, scales.rows, count, forms, head, out.data_ptr(), threads))
    return out


def _pair_tables(a: Any, b: Any) -> tuple[Table, Table] | None:
    """Quick tables of two lists; None when they need the careful way."""
    if not isinstance(a, list) or not isinstance(b, list) or len(a) != len(b):
        return None
    first = plain_table(a, PAIRED_CODES)
    second = plain_table(b, PAIRED_CODES) if first is not None else None
    if second is None or first.numels != second.numels:
        return None
    dims = list(map(Tensor.dim, a))
    if dims != list(map(Tensor.dim, b)) or (max(dims, default=0) > 1 and any(map(ne, map(_shape, a), map(_shape, b)))):
        return None
    return first, second


def _flattened(a: list[Tensor], b: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Pairs that lie alike in memory as flat views of it; the others as they are."""
    pairs = []
    for x, y in zip(a, b, strict=True):
        x, y = readable(x), readable(y)
        flat = flat_views(x, y) if x.numel() and not x.is_contiguous() else None
        pairs.append((x, y) if flat is None else flat)
    return [x for x, _ in pairs], [y for _, y in pairs]


def pair_moments(a: Any, b: Any, *, per_tensor: bool = False) -> Tensor:
    """``|a|^2``, ``|b|^2`` and ``<a, b>``; see :func:`gac_kernels.pair_moments`."""
    library = require()
    if not per_tensor:
        x, y = (single(a), single(b)) if type(a) is list is type(b) else (a, b)
        packed = pack_pair(x, y)
        if packed:
            out = _empty_like(_THREE)
            if packed < QUICK_PACKED:
                call, packed = library.quick.gac_pair_moments_one, packed | ONE_THREAD
            else:
                call, packed = library.call.gac_pair_moments_one, with_threads(packed)
            failed = call(x.data_ptr(), y.data_ptr(), packed, out.data_ptr())
            if failed:
                check(failed)
            return out
    tables = _pair_tables(a, b)
    if tables is None:
        a, b = check_pair(a, b)
        require_cpu(a, "a and b")
        a, b = _flattened(a, b)
        tables = strided_table(a), strided_table(b)
    left, right = tables
    count = len(left.numels)
    out = _sums(count, 3, per_tensor)
    threads = threads_for(sum(left.numels))
    call = library.call.gac_pair_moments
    check(call(left.rows, right.rows, count, left.form | right.form << 4, per_tensor, out.data_ptr(), threads))
    return out


def _number(value: Any, name: str) -> float:
    """A scale or weight as a float. Reading a CPU tensor waits for nothing."""
    if type(value) is float:
        return value
    if type(value) is Tensor and value.is_cpu and not value.dim():
        number = value.item()
        if type(number) is float:
            return number
    return float(check_scalar(value, name, _CPU))


def mix_(a: Any, b: Any, mu: Tensor | float, *, moments: bool = False) -> Tensor | None:
    """``a <- mu * a + (1 - mu) * b`` in place; see :func:`gac_kernels.mix_`.

    For float32 and float64 a fused multiply-add in that precision: beside the last rounding, ``(1 - mu) * b`` is
    rounded too (to float32, or float64). Results of 16 bits see one rounding only.
    """
    library = require()
    x, y = (single(a), single(b)) if type(a) is list is type(b) else (a, b)
    packed = pack_pair(x, y)
    if packed:
        weight = mu if type(mu) is float else _number(mu, "mu")
        out = _empty_like(_THREE) if moments else None
        sums = None if out is None else out.data_ptr()
        if packed < QUICK_PACKED:
            call, packed = library.quick.gac_mix_one, packed | ONE_THREAD
        else:
            call, packed = library.call.gac_mix_one, with_threads(packed)
        failed = call(x.data_ptr(), y.data_ptr(), packed, weight, sums)
        if failed:
            check(failed)
        increment_version(x)
        return out
    written = a
    tables = _pair_tables(a, b)
    copies = []
    if tables is None:
        a, b = check_pair(a, b, writes_a=True)
        require_cpu(a, "a and b")
        written = a
        left, right = _flattened(a, b)
        for k, tensor in enumerate(left):  # what cannot be written where it lies is written in a copy
            if tensor.numel() and (runs(tensor) is None or a[k].is_neg() or a[k].dtype not in PAIRED_CODES):
                left[k] = tensor.clone(memory_format=torch.contiguous_format)
                copies.append((a[k], left[k]))
        tables = strided_table(left), strided_table(right)
    weight = _number(mu, "mu")
    left, right = tables
    out = torch.empty(3, dtype=_FLOAT64) if moments else None
    threads = threads_for(sum(left.numels))
    sums = None if out is None else out.data_ptr()
    form = left.form | right.form << 4
    check(library.call.gac_mix(left.rows, right.rows, len(left.numels), form, weight, sums, threads))
    increment_version(written)
    for target, mixed in copies:
        target.detach().copy_(mixed)
    return out


@lru_cache(maxsize=256)
def _pieces(places: Places) -> array:
    """The C table of where the tensors of a list go."""
    layout, regions = places.layout, places.regions
    numbers = [layout.bucket_offsets[r] for r in regions] + [layout.index_offsets[r] for r in regions]
    cells = [layout.cell_offsets[r] for r in regions]
    return array("q", numbers + [layout.numels[r] for r in regions] + list(places.starts) + cells)


_MAP = struct.Struct("@qqQdPPqqiiiii")
_SKETCH_ALONE = 3 << 16
"""Elements up to which a sketch runs on the caller's thread. It plans before it reads, alone in any case, and where two
cores share a cache a second thread gains from 256 K elements on (measured cold: 64 K 58 us alone, 64 with two threads;
128 K 78 and 97; 256 K 183 and 133)."""


@takes(sketch_call)
def sketch(call: SketchCall) -> Tensor:
    """A random projection into ``out``, and moments of the same read; see :func:`gac_kernels.sketch`."""
    require_cpu([call.out], "tensors and out")
    into = call.into
    result = _sums(len(call.read.numels), 2, call.per_tensor) if into is None else into
    _run_sketch(call, call.scale, None, result, add=into is not None)
    increment_version([t for t in (call.out, into) if t is not None])
    return result


@takes(absorb_sketch_call)
def absorb_sketch_(call: AbsorbSketchCall) -> Tensor:
    """The same of running sums, absorbed as it is written; see :func:`gac_kernels.absorb_sketch_`."""
    previous, total, into = call.previous, call.total, call.into
    require_cpu([previous], "tensors, previous and total")
    sums = torch.zeros(2 + call.sketched.layout.cells, dtype=_FLOAT64) if into is None else into
    _run_sketch(call.sketched, call.scale, total, sums, add=True, fresh=call.fresh)
    increment_version([t for t in (previous, total, into) if t is not None])
    return sums


def _run_sketch(
    call: SketchCall, scale: Tensor | float, total: Tensor | None, sums: Tensor, *, add: bool, fresh: int = 0
) -> None:
    library, layout, out, numels = require(), call.layout, call.out, call.read.numels
    table, weights = list_table(call.read.listed, numels), second_table(call.read)
    head = _MAP.pack(
        layout.lanes,
        layout.rows_per_slab,
        layout.seed & 0xFFFFFFFF,
        scale,
        out.data_ptr(),
        0 if total is None else total.data_ptr(),
        out.numel(),
        layout.size,
        out.dtype is _FLOAT64,
        call.accumulate,
        call.per_tensor,
        add,
        fresh,
    )
    count, elements = len(numels), sum(numels)
    handle = library.quick if elements <= QUICK else library.call
    threads = torch.get_num_threads() if elements > _SKETCH_ALONE else 1
    where = _pieces(call.places).buffer_info()[0]
    if weights is None:
        failed = handle.gac_sketch(table.rows, where, count, table.form, head, sums.data_ptr(), threads)
    else:
        forms = table.form | weights.form << 4
        weighted = handle.gac_sketch_weighted
        failed = weighted(table.rows, weights.rows, where, count, forms, head, call.read.eps, sums.data_ptr(), threads)
    check(failed)


@takes(absorb_call)
def absorb_(call: AbsorbCall) -> Tensor:
    """One pass over three vectors of a running sketch; see :func:`gac_kernels.absorb_`."""
    library, (current, previous, total, scale, into, cells) = require(), call
    require_cpu([current], "current, previous and total")
    numel = current.numel()
    out = torch.empty(cells, dtype=_FLOAT64) if into is None else into
    last = None if previous is None else previous.data_ptr()
    absorb = library.quick.gac_absorb if numel <= QUICK else library.call.gac_absorb
    add, threads = into is not None, threads_for(numel)
    check(absorb(current.data_ptr(), last, total.data_ptr(), numel, float(scale), out.data_ptr(), add, threads))
    increment_version([t for t in (total, previous, into) if t is not None])
    return out


@lru_cache(maxsize=256)
def _offsets(stretches: Stretches) -> array:
    return array("q", stretches.offsets)


SUM = struct.Struct("@PPPddiii")


@takes(accumulate_call)
def accumulate_(call: AccumulateCall) -> Tensor:
    """Adds tensors to one vector, and their moments; see :func:`gac_kernels.accumulate_`."""
    library, total, previous, into = require(), call.total, call.previous, call.into
    require_cpu([total], "tensors and total")
    numels = call.read.numels
    table, weights = list_table(call.read.listed, numels), second_table(call.read)
    count, elements = len(numels), sum(numels)
    result = _sums(count, 2, call.per_tensor) if into is None else into
    head = SUM.pack(
        _offsets(call.stretches).buffer_info()[0],
        total.data_ptr(),
        0 if previous is None else previous.data_ptr(),
        call.scale,
        call.read.eps,
        call.per_tensor,
        into is not None,
        call.fresh,
    )
    accumulate = library.quick.gac_accumulate if elements <= QUICK else library.call.gac_accumulate
    forms = table.form if weights is None else table.form | weights.form << 4
    seconds = None if weights is None else weights.rows
    check(accumulate(table.rows, seconds, count, forms, head, result.data_ptr(), threads_for(elements)))
    increment_version([t for t in (total, previous, into) if t is not None])
    return result

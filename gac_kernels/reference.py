"""The oracle: every operation in plain torch, in float64, for any floating dtype and device.

Same names and signatures as the operations in :mod:`gac_kernels`, whose docstrings say what each takes and returns. It
defines what they compute; tests and benchmarks compare with it, and ``GAC_BACKEND=reference`` makes it serve. It is
written to be read, not to be fast, and it makes float64 copies of its input.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import einops
import torch
from torch import Tensor

from gac_kernels.arguments import accumulator_dtype, check_pair, check_scalar
from gac_kernels.calls import SketchCall, TokenCall, sketch_call, takes, token_call
from gac_kernels.elements import Elements, elements, factors
from gac_kernels.kronecker import KroneckerCall, kronecker_call, projected
from gac_kernels.layout import CELL_LANES, LANES, SIGN_BITS, SketchLayout, sign_key
from gac_kernels.totals import (
    AbsorbCall,
    AbsorbSketchCall,
    AccumulateCall,
    absorb_call,
    absorb_sketch_call,
    accumulate_call,
)

__all__ = [
    "absorb_",
    "absorb_sketch_",
    "accumulate_",
    "kronecker_sketch",
    "mix_",
    "moments",
    "pair_moments",
    "signs",
    "sketch",
    "token_moments",
]


def _flat(tensor: Tensor) -> Tensor:
    return tensor.detach().reshape(-1).to(accumulator_dtype(tensor.device))


def _weighted(tensor: Tensor, second_moment: Tensor, eps: float) -> Tensor:
    v = _flat(second_moment)
    return _flat(tensor) / (v.sqrt() + eps).masked_fill(v == 0, math.inf)


def _taken(read: Elements) -> Sequence[Tensor]:
    """The elements as they count, flat where they are not the tensors' own."""
    if read.second_moments is not None:
        return [_weighted(x, v, read.eps) for x, v in zip(read.tensors, read.second_moments, strict=True)]
    if read.scales is None:
        return read.tensors
    pairs = zip(map(_flat, read.tensors), read.scales, strict=True)
    return [x * factors(s, x.numel(), x.dtype) if s.numel() else x for x, s in pairs]


def _moments(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    dtype = accumulator_dtype(device)
    rows = [torch.stack([_flat(t).square().sum(), (~torch.isfinite(_flat(t))).sum().to(dtype)]) for t in tensors]
    return torch.stack(rows) if rows else torch.zeros(0, 2, dtype=dtype, device=device)


def moments(tensors: Any, *, per_tensor: bool = False, block_scales: Any = None) -> Tensor:
    """Sum of squares and number of non-finite elements; see :func:`gac_kernels.moments`."""
    tensors = _taken(elements(tensors, None, "", block_scales=block_scales))
    rows = _moments(tensors, tensors[0].device if tensors else torch.device("cpu"))
    return rows if per_tensor else rows.sum(0)


def sign_words(layout: SketchLayout, words: Tensor) -> Tensor:
    """The hashes (int64, 32 bits each) of some words of the sign sequence: of ``words``, int64, any shape."""
    high = words >> 32
    key = torch.zeros_like(words)
    for h in torch.unique(high).tolist():
        key = torch.where(high == h, torch.full_like(key, sign_key(layout.seed, h)), key)
    h = (words & 0xFFFFFFFF) ^ key
    h = h ^ (h >> 16)
    h = (h * 0x85EBCA6B) & 0xFFFFFFFF  # int64 wraps modulo 2**64: the low half is right
    h = h ^ (h >> 13)
    h = (h * 0xC2B2AE35) & 0xFFFFFFFF
    return h ^ (h >> 16)


def signs(layout: SketchLayout, region: int, start: int, numel: int, device: torch.device | str = "cpu") -> Tensor:
    """The signs (+1 or -1, float64 ``[numel]``) of elements ``start .. start + numel`` of a region."""
    index = torch.arange(numel, dtype=torch.int64, device=device) + (layout.index_offsets[region] + start)
    bits = sign_words(layout, index // SIGN_BITS) >> index % SIGN_BITS
    return 1.0 - 2.0 * (bits & 1).to(accumulator_dtype(torch.device(device)))


@takes(sketch_call)
def sketch(call: SketchCall) -> Tensor:
    """A random projection and its moments; see :func:`gac_kernels.sketch` and :mod:`gac_kernels.layout`."""
    layout, out, tensors = call.layout, call.out, _taken(call.read)
    total = torch.zeros(layout.size, dtype=accumulator_dtype(out.device), device=out.device)
    for tensor, region, start in zip(tensors, call.places.regions, call.places.starts, strict=True):
        j = torch.arange(tensor.numel(), device=out.device) + start
        bucket = j // (layout.lanes * layout.rows_per_slab) * layout.lanes + j % layout.lanes
        signed = _flat(tensor) * signs(layout, region, start, tensor.numel(), out.device)
        total.index_add_(0, bucket + layout.bucket_offsets[region], signed)
    total *= _number(call.scale, total)
    if call.accumulate:
        out[: layout.size] += total.to(out.dtype)
    else:
        for region in set(call.places.regions):
            begin = layout.bucket_offsets[region]
            end = begin + layout.region_size(layout.numels[region])
            out[begin:end] = total[begin:end].to(out.dtype)
        out[layout.size :].zero_()
    rows = _moments(tensors, out.device)
    return _added(rows if call.per_tensor else rows.sum(0), call.into)


def _number(value: Tensor | float, like: Tensor) -> Tensor | float:
    return value.to(like.dtype) if isinstance(value, Tensor) else value


def _added(sums: Tensor, into: Tensor | None) -> Tensor:
    """``sums``, or ``into`` with them added."""
    if into is None:
        return sums
    into.detach().add_(sums)
    return into


@takes(accumulate_call)
def accumulate_(call: AccumulateCall) -> Tensor:
    """Adds tensors to one vector, and their moments; see :func:`gac_kernels.accumulate_`."""
    total, tensors, dtype = call.total.detach(), _taken(call.read), accumulator_dtype(call.total.device)
    previous = None if call.previous is None else call.previous.detach()
    rows = _moments(tensors, total.device)
    for row, tensor, offset in zip(rows, tensors, call.stretches.offsets, strict=True):
        stretch = slice(offset, offset + tensor.numel())
        added = _flat(tensor)
        if previous is not None:
            now = added.to(torch.float32)
            added = now.to(dtype) - previous[stretch].to(dtype)
            previous[stretch] = now
            row[0] = added.square().sum()
        total[stretch] = (total[stretch].to(dtype) + _number(call.scale, added) * added).to(torch.float32)
    return _added(rows if call.per_tensor else rows.sum(0), call.into)


def pair_moments(a: Any, b: Any, *, per_tensor: bool = False) -> Tensor:
    """``|a|^2``, ``|b|^2`` and ``<a, b>``; see :func:`gac_kernels.pair_moments`."""
    a, b = check_pair(a, b)
    device = a[0].device if a else torch.device("cpu")
    rows = []
    for x, y in zip(a, b, strict=True):
        x, y = _flat(x), _flat(y)
        rows.append(torch.stack([x.square().sum(), y.square().sum(), (x * y).sum()]))
    table = torch.stack(rows) if rows else torch.zeros(0, 3, dtype=accumulator_dtype(device), device=device)
    return table if per_tensor else table.sum(0)


def mix_(a: Any, b: Any, mu: Tensor | float, *, moments: bool = False) -> Tensor | None:
    """``a <- mu * a + (1 - mu) * b``; see :func:`gac_kernels.mix_`."""
    a, b = check_pair(a, b, writes_a=True)
    result = pair_moments(a, b) if moments else None
    for x, y in zip(a, b, strict=True):
        dtype = accumulator_dtype(x.device)
        weight = check_scalar(mu, "mu", x.device)
        weight = weight.to(dtype) if isinstance(weight, Tensor) else weight
        x.copy_(weight * x.to(dtype) + (1 - weight) * y.to(dtype))
    return result


@takes(token_call)
def token_moments(call: TokenCall) -> Tensor:
    """Sums over the tokens of each sequence; see :func:`gac_kernels.token_moments`."""
    dtype = accumulator_dtype(call.logprobs.device)
    m = call.mask != 0
    zero = torch.zeros((), dtype=dtype, device=m.device)
    logp = torch.where(m, call.logprobs.to(dtype), zero)
    a = torch.where(m & ~einops.rearrange(call.is_expert, "b -> b 1"), call.advantages.to(dtype), zero)
    p = logp.exp()
    phi = torch.where(m, p * (1 - p), zero)
    columns = [m.to(dtype), logp, a, a * a, phi, phi * phi, phi * a]
    return einops.reduce(columns, "column b t -> b column", "sum")


@takes(absorb_call)
def absorb_(call: AbsorbCall) -> Tensor:
    """Takes the newest contribution out of a running sketch; see :func:`gac_kernels.absorb_`."""
    current, previous, total = (None if t is None else t.detach() for t in call[:3])
    dtype = accumulator_dtype(current.device)
    delta = current.to(dtype) if previous is None else current.to(dtype) - previous.to(dtype)
    delta = _number(call.scale, delta) * delta
    total.copy_(total.to(dtype) + delta)
    if previous is not None:
        previous.copy_(current)
    padded = torch.nn.functional.pad(delta.square(), (0, call.cells * LANES - delta.numel()))
    return _added(einops.reduce(padded, "(cell lane) -> cell", "sum", lane=LANES), call.into)


@takes(absorb_sketch_call)
def absorb_sketch_(call: AbsorbSketchCall) -> Tensor:
    """Takes the newest contribution out of running sums; see :func:`gac_kernels.absorb_sketch_`."""
    return absorbed(call, sketch.run)


def absorbed(call: AbsorbSketchCall, run: Callable[[SketchCall], Tensor]) -> Tensor:
    """``absorb_sketch_`` by a backend's ``sketch``: slab by slab."""
    layout, previous, total = call.sketched.layout, call.previous.detach(), call.total.detach()
    current = torch.zeros_like(previous)
    dtype = accumulator_dtype(current.device)
    sums = torch.zeros(2 + layout.cells, dtype=dtype, device=current.device)
    sums[:2] = run(call.sketched._replace(out=current))
    for region in call.sketched.places.regions:
        begin, size = layout.bucket_offsets[region], layout.region_size(layout.numels[region])
        here = slice(begin, begin + size)
        delta = _number(call.scale, sums) * (current[here].to(dtype) - previous[here].to(dtype))
        total[here] = (total[here].to(dtype) + delta).to(torch.float32)
        previous[here] = current[here]
        first = 2 + layout.cell_offsets[region]
        for slab in delta.square().split(layout.lanes) if size else ():  # no part would be an empty one
            parts = torch.stack([part.sum() for part in slab.split(CELL_LANES)])
            sums[first : first + len(parts)] = parts
            first += layout.cells_of_slab
    return _added(sums, call.into)


@takes(kronecker_call)
def kronecker_sketch(call: KroneckerCall) -> Tensor:
    """``out[i] += scale * sum_t (A^T l_t) (B^T r_t)^T``; see :mod:`gac_kernels.kronecker`."""
    a, b = projected(call, accumulator_dtype(call.out.device))
    bounds = call.bounds.tolist()
    for row, (begin, end) in enumerate(itertools.pairwise(bounds)):
        found = torch.einsum("np, nq -> pq", a[begin:end], b[begin:end])
        call.out.detach()[row] += (call.scale * found).to(call.out.dtype)
    return call.out

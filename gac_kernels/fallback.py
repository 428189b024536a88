"""The operations on CPU tensors in plain torch, where there is no compiled library: at the speed of torch's own calls.

Tensors are taken in blocks that stay in the cache, so that memory is read once. Squares and products of a block are
added by BLAS, in float32 (float64 where a tensor has it), and the blocks in float64; a block whose squares leave
float32's range is taken again in float64. Sketches are made in float64. Signatures and results are those of
:mod:`gac_kernels.ops`; the formulas are in :mod:`gac_kernels.reference`, which tests hold these against.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import einops
import torch
from torch import Tensor

from gac_kernels import reference
from gac_kernels.arguments import check_pair, check_scalar
from gac_kernels.calls import SketchCall, sketch_call, takes
from gac_kernels.elements import BLOCK, Elements, elements, factors
from gac_kernels.kronecker import by_matrix_products, kronecker_call
from gac_kernels.layout import SIGN_BITS, SketchLayout
from gac_kernels.reference import absorb_, token_moments
from gac_kernels.strides import flat_views
from gac_kernels.totals import AbsorbSketchCall, AccumulateCall, absorb_sketch_call, accumulate_call

__all__ = [
    "absorb_",
    "absorb_sketch_",
    "accumulate_",
    "kronecker_sketch",
    "mix_",
    "moments",
    "pair_moments",
    "sketch",
    "token_moments",
]

kronecker_sketch = takes(kronecker_call)(by_matrix_products)

_BLOCK = 1 << 16
"""Elements of a block: two of them in float32 fit the second cache. Of 32 M pairs on two cores, medians of one run:
2**14 71 ms, 2**15 44, 2**16 32, where two norms and a dot product of the whole take 38."""

_FLOAT64 = torch.float64


def _wide(tensor: Tensor) -> Tensor:
    """In float32; float64 unchanged."""
    return tensor if tensor.dtype is _FLOAT64 else tensor.to(torch.float32)


_SMALLEST = 1e-30
"""Of the float32 sums of squares that are kept: what products below 2**-149 can add to a block is 1e-10 of it."""


def _safe(*squares: float) -> bool:
    """Whether float32 could hold these sums of squares and what they are made of."""
    return all(_SMALLEST < square < math.inf for square in squares)


def _square(x: Tensor) -> tuple[float, int]:
    """The sum of squares of a block, and its non-finite elements."""
    square = torch.dot(x, x).item()
    if not _safe(square) and x.dtype is not _FLOAT64:
        square = torch.dot(x.double(), x.double()).item()
    return square, 0 if math.isfinite(square) else int(x.numel() - torch.isfinite(x).sum())


def _sums(rows: list[list[float]], columns: int, per_tensor: bool) -> Tensor:
    table = torch.tensor(rows, dtype=_FLOAT64).reshape(len(rows), columns)
    return table if per_tensor else table.sum(0)


class _Values:
    """The elements of tensor ``k`` of a call, as they count: in float64 where they are weighted or scaled."""

    def __init__(self, read: Elements, k: int) -> None:
        self._read, self._x = read, read.tensors[k].detach().reshape(-1)
        second = None if read.seconds is None else read.seconds.tensors[k].detach().reshape(-1)
        self._second = None if second is None or (read.scaled and not second.numel()) else second
        self.wide = _FLOAT64 if self._x.dtype is _FLOAT64 or self._second is not None else torch.float32
        self.plain = self._second is None

    def of(self, begin: int, end: int) -> Tensor:
        """A copy of elements ``begin`` to ``end``."""
        values = self._x[begin:end].to(self.wide, copy=True)
        if self._second is None:
            return values
        if not self._read.scaled:
            return _weighted(values, self._second[begin:end].to(self.wide), self._read.eps)
        first = begin // BLOCK
        found = factors(self._second[first : -(-end // BLOCK)], end - first * BLOCK, self.wide)
        return values.mul_(found[begin - first * BLOCK :])


def _blocks(read: Elements, k: int) -> Iterator[Tensor]:
    values, numel = _Values(read, k), read.numels[k]
    return (values.of(begin, min(begin + _BLOCK, numel)) for begin in range(0, numel, _BLOCK))


def moments(tensors: Any, *, per_tensor: bool = False, block_scales: Any = None) -> Tensor:
    """Sum of squares and number of non-finite elements; see :func:`gac_kernels.moments`."""
    rows = []
    read = elements(tensors, None, "", block_scales=block_scales)
    for k, tensor in enumerate(read.tensors):
        row = [0.0, 0.0]
        for block in _blocks(read, k) if read.scaled else map(_wide, _in_any_order(tensor.detach())[0].split(_BLOCK)):
            square, nonfinite = _square(block)
            row[0] += square
            row[1] += nonfinite
        rows.append(row)
    return _sums(rows, 2, per_tensor)


def _in_any_order(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors of one shape as 1-D, each element of one at the place of its partner in the others."""
    if all(t.is_contiguous() for t in tensors):
        return tuple(t.reshape(-1) for t in tensors)
    return flat_views(*tensors) or tuple(t.reshape(-1) for t in tensors)


def _pair_row(x: Tensor, y: Tensor) -> list[float]:
    """``|x|^2``, ``|y|^2``, ``<x, y>`` of a pair of blocks, which are converted once."""
    wide = _FLOAT64 if _FLOAT64 in (x.dtype, y.dtype) else torch.float32
    x, y = x.to(wide), y.to(wide)
    row = [torch.dot(p, q).item() for p, q in ((x, x), (y, y), (x, y))]
    if not _safe(*row[:2]) and wide is not _FLOAT64:
        x, y = x.double(), y.double()
        row = [torch.dot(p, q).item() for p, q in ((x, x), (y, y), (x, y))]
    return row


def _pair(a: list[Tensor], b: list[Tensor], per_tensor: bool) -> Tensor:
    rows = []
    for x, y in zip(a, b, strict=True):
        row = [0.0, 0.0, 0.0]
        x, y = _in_any_order(x.detach(), y.detach())
        for p, q in zip(x.split(_BLOCK), y.split(_BLOCK), strict=True):
            row = [total + part for total, part in zip(row, _pair_row(p, q), strict=True)]
        rows.append(row)
    return _sums(rows, 3, per_tensor)


def pair_moments(a: Any, b: Any, *, per_tensor: bool = False) -> Tensor:
    """``|a|^2``, ``|b|^2`` and ``<a, b>``; see :func:`gac_kernels.pair_moments`."""
    return _pair(*check_pair(a, b), per_tensor)


def mix_(a: Any, b: Any, mu: Tensor | float, *, moments: bool = False) -> Tensor | None:
    """``a <- mu * a + (1 - mu) * b``; see :func:`gac_kernels.mix_`.

    The products are rounded to float32 (float64 when either tensor is float64) before ``a``'s dtype.
    """
    a, b = check_pair(a, b, writes_a=True)
    weight = float(check_scalar(mu, "mu", torch.device("cpu")))
    result = _pair(a, b, False) if moments else None
    for x, y in zip(a, b, strict=True):
        wide = _FLOAT64 if _FLOAT64 in (x.dtype, y.dtype) else torch.float32
        if x.dtype is y.dtype is wide:
            x.detach().mul_(weight).add_(y.detach(), alpha=1 - weight)
        else:
            x.detach().copy_(x.detach().to(wide).mul_(weight).add_(y.detach().to(wide), alpha=1 - weight))
    return result


class _Part(NamedTuple):
    """Rows of a region that are read together: they lie in one slab, or make up whole slabs."""

    first_row: int
    rows: int
    slab: int
    slabs: int


def _parts(layout: SketchLayout, start: int, stop: int) -> Iterator[_Part]:
    """The rows of elements ``start .. stop`` of a region, in order."""
    most = max(1, _BLOCK // layout.lanes)
    row, last, height = start // layout.lanes, -(-stop // layout.lanes), layout.rows_per_slab
    while row < last:
        slab, place = divmod(row, height)
        whole = min(most, last - row) // height if place == 0 else 0
        rows = whole * height or min(most, last - row, height - place)
        yield _Part(row, rows, slab, whole or 1)
        row += rows


_SIGN_BIT = torch.iinfo(torch.int32).min
_PLACES = torch.arange(SIGN_BITS - 1, -1, -1, dtype=torch.int32)  # from a word's bit to the sign bit of a float


def _signed(values: Tensor, layout: SketchLayout, first_element: int) -> Tensor:
    """``values`` (whole words of 32, of the caller's own memory) with the signs from ``first_element`` on."""
    first = first_element // SIGN_BITS
    words = reference.sign_words(layout, torch.arange(first, first + values.numel() // SIGN_BITS)).int()
    minus = (einops.rearrange(words, "word -> word 1") << _PLACES).bitwise_and_(_SIGN_BIT).flatten()
    if values.dtype is _FLOAT64:
        return torch.where(minus < 0, -values, values)
    return values.view(torch.int32).bitwise_xor_(minus).view(torch.float32)


@takes(sketch_call)
def sketch(call: SketchCall) -> Tensor:
    """A random projection and its moments; see :func:`gac_kernels.sketch`."""
    layout = call.layout
    lanes = layout.lanes
    totals = {}
    for region in set(call.places.regions):
        slabs = -(-layout.region_size(layout.numels[region]) // lanes)
        totals[region] = torch.zeros(slabs, lanes, dtype=_FLOAT64)
    rows = []
    for k, (region, start) in enumerate(zip(call.places.regions, call.places.starts, strict=True)):
        x, stop, row = _Values(call.read, k), start + call.read.numels[k], [0.0, 0.0]
        for part in _parts(layout, start, stop):
            origin = part.first_row * lanes
            begin, end = max(start, origin), min(stop, origin + part.rows * lanes)
            values = x.of(begin - start, end - start)
            square, nonfinite = _square(values)
            row[0] += square
            row[1] += nonfinite
            if end - begin < part.rows * lanes:
                values = torch.nn.functional.pad(values, (begin - origin, origin + part.rows * lanes - end))
            signed = _signed(values, layout, layout.index_offsets[region] + origin)
            by_slab = einops.rearrange(signed, "(slab row lane) -> slab row lane", slab=part.slabs, lane=lanes)
            totals[region][part.slab : part.slab + part.slabs] += by_slab.sum(1, dtype=_FLOAT64)
        rows.append(row)
    _write(call, totals)
    sums = _sums(rows, 2, call.per_tensor)
    if call.into is None:
        return sums
    call.into.detach().add_(sums)
    return call.into


def _weighted(x: Tensor, v: Tensor, eps: float) -> Tensor:
    return x / (v.sqrt() + eps).masked_fill(v == 0, math.inf)


@takes(absorb_sketch_call)
def absorb_sketch_(call: AbsorbSketchCall) -> Tensor:
    """Takes the newest contribution out of running sums; see :func:`gac_kernels.absorb_sketch_`."""
    return reference.absorbed(call, sketch.run)


@takes(accumulate_call)
def accumulate_(call: AccumulateCall) -> Tensor:
    """Adds tensors to one vector, and their moments; see :func:`gac_kernels.accumulate_`.

    In float32 where nothing but a plain tensor of at most that is added, in float64 elsewhere.
    """
    scale, rows = float(call.scale), []
    total, previous = call.total.detach(), None if call.previous is None else call.previous.detach()
    for k, (numel, offset) in enumerate(zip(call.read.numels, call.stretches.offsets, strict=True)):
        x, row = _Values(call.read, k), [0.0, 0.0]
        plain = previous is None and x.wide is torch.float32
        wide = torch.float32 if plain else _FLOAT64
        for begin in range(0, numel, _BLOCK):
            values = x.of(begin, min(begin + _BLOCK, numel)).to(wide)
            to = total[offset + begin : offset + begin + values.numel()]
            square, nonfinite = _square(values)
            if previous is not None:
                last = previous[offset + begin : offset + begin + values.numel()]
                now = values.to(torch.float32)
                values = now.to(wide) - last.to(wide)
                last.copy_(now)
                square = torch.dot(values, values).item()
            row[0] += square
            row[1] += nonfinite
            if plain:
                to.add_(values, alpha=scale)
            else:
                to.copy_(to.to(wide).add_(values, alpha=scale))
        rows.append(row)
    sums = _sums(rows, 2, call.per_tensor)
    if call.into is None:
        return sums
    call.into.detach().add_(sums)
    return call.into


def _write(call: SketchCall, totals: dict[int, Tensor]) -> None:
    """Writes or adds the regions' sums, times the scale."""
    layout, out, scale = call.layout, call.out.detach(), float(call.scale)
    for region, total in totals.items():
        begin = layout.bucket_offsets[region]
        end = begin + layout.region_size(layout.numels[region])
        found = total.reshape(-1)[: end - begin] * scale
        out[begin:end] = out[begin:end] + found if call.accumulate else found  # rounded once
    if call.tail:
        out[layout.size :].zero_()

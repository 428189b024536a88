"""The Kronecker sketch on GPUs: each activation is read once.

A program of the first kernel takes up to ``TOKENS`` tokens of one sequence. It reads their rows of both sides, tile by
tile, multiplies each tile by signs that it makes from hashes as it goes, and multiplies the two projections into one
``[P, Q]`` partial sum: nothing of a token's own leaves the program. The second kernel adds up each sequence's partial
sums in order, so there are no atomics and the bits are the same every time.

The blocks of sequence ``i`` have the slots ``bounds[i] // TOKENS + i`` and following: they never overlap, and all fit
in ``N // TOKENS + B``, so nothing has to be known of the lengths on the host.
"""

# Triton compiles this source: branches on constants stay nested and written out.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gac_kernels.calls import takes
from gac_kernels.kronecker import KroneckerCall, by_matrix_products, kronecker_call
from gac_kernels.triton import launch
from gac_kernels.triton.launch import interpreted
from gac_kernels.triton.readable import supported

TOKENS, FEWER = 64, 32
"""Of one program: 64, or 32 for float32, whose products in three parts ask for many registers."""

LINE = 128
"""Bytes of a token that a tile has: one line of the cache."""

PRECISION = "ieee" if torch.version.hip else "tf32x3"
"""Of float32 products: three TF32 products on tensor cores, within 2**-21. Products of 16 bits and signs are exact."""

SMALLEST = 16
"""Of each dimension of a matrix product on tensor cores."""


@triton.jit
def _finalize32(h):
    """MurmurHash3's 32-bit avalanche step."""
    h ^= h >> 16
    h *= 0x85EBCA6B
    h ^= h >> 13
    h *= 0xC2B2AE35
    return h ^ (h >> 16)


@triton.jit
def _signs(index, keys, side, SIZE: tl.constexpr, PADDED: tl.constexpr):
    """``[len(index), PADDED]`` float32: signs of the rows ``index`` of a side's map, 0 from column SIZE on."""
    key = tl.load(keys + 2 * side).to(tl.uint32)
    multiplier = tl.load(keys + 2 * side + 1).to(tl.uint32)
    column = tl.arange(0, PADDED)[None, :]
    if SIZE > 32:
        low = _finalize32(((index * 2).to(tl.uint32) ^ key) * multiplier)[:, None]
        high = _finalize32(((index * 2 + 1).to(tl.uint32) ^ key) * multiplier)[:, None]
        word = tl.where(column < 32, low, high)
    else:
        word = _finalize32((index.to(tl.uint32) ^ key) * multiplier)[:, None]
    minus = (word >> (column % 32).to(tl.uint32)) & 1
    return tl.where(column < SIZE, 1.0 - 2.0 * minus.to(tl.float32), 0.0)


@triton.jit
def _map(index, keys, side, SIZE: tl.constexpr, PADDED: tl.constexpr, WHOLE: tl.constexpr):
    """``[len(index), PADDED]``: the rows ``index`` of a side's map, which is the identity where it is WHOLE."""
    if WHOLE:
        found = (index[:, None] == tl.arange(0, PADDED)[None, :]).to(tl.float32)
    else:
        found = _signs(index, keys, side, SIZE, PADDED)
    return found


@triton.jit
def _projected(
    pointer,
    stride,
    width,
    token,
    inside,
    keys,
    side,
    SIZE: tl.constexpr,
    PADDED: tl.constexpr,
    WHOLE: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``[TOKENS, PADDED]`` float32: rows of a side under its map. Those outside are zeros."""
    total = tl.zeros([TOKENS, PADDED], tl.float32)
    rows = pointer + token.to(tl.int64)[:, None] * stride
    for first in range(0, width, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        x = tl.load(rows + column[None, :], mask=inside[:, None] & (column < width)[None, :], other=0.0)
        signs = _map(column, keys, side, SIZE, PADDED, WHOLE)
        if WIDEN:  # the interpreter's own conversion of bfloat16 is not to be trusted
            if x.dtype == tl.bfloat16:
                x = (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
            x = x.to(tl.float32)
        total = tl.dot(x, signs.to(x.dtype), total, input_precision=PRECISION)
    return total


@triton.jit
def kronecker_kernel(
    left,
    left_stride,
    left_width,
    right,
    right_stride,
    right_width,
    bounds,
    keys,
    partials,
    P: tl.constexpr,
    Q: tl.constexpr,
    P_PADDED: tl.constexpr,
    Q_PADDED: tl.constexpr,
    PLACES: tl.constexpr,
    LEFT_IS_WHOLE: tl.constexpr,
    RIGHT_IS_WHOLE: tl.constexpr,
    ONES: tl.constexpr,
    TOKENS: tl.constexpr,
    LEFT_COLUMNS: tl.constexpr,
    RIGHT_COLUMNS: tl.constexpr,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The partial sum of one block of tokens of one sequence: ``partials[slot]``, ``[P_PADDED, Q_PADDED]``."""
    row = tl.program_id(1)
    begin = tl.load(bounds + row)
    end = tl.load(bounds + row + 1)
    first = begin + tl.program_id(0) * TOKENS
    if first < end:
        token = first + tl.arange(0, TOKENS)
        inside = token < end
        b = _projected(
            right, right_stride, right_width, token, inside, keys, 1,
            Q, Q_PADDED, RIGHT_IS_WHOLE, TOKENS, RIGHT_COLUMNS, WIDEN, PRECISION,
        )  # fmt: skip
        if ONES:
            b += _map(right_width + tl.zeros([1], tl.int32), keys, 1, Q, Q_PADDED, RIGHT_IS_WHOLE)
        if PLACES:
            place = tl.load(left + token, mask=inside, other=-1)
            a = _map(place, keys, 0, P, P_PADDED, LEFT_IS_WHOLE)
            a = tl.where((place >= 0)[:, None], a, 0.0)
        else:
            a = _projected(
                left, left_stride, left_width, token, inside, keys, 0,
                P, P_PADDED, LEFT_IS_WHOLE, TOKENS, LEFT_COLUMNS, WIDEN, PRECISION,
            )  # fmt: skip
        found = tl.dot(tl.trans(a), b, input_precision=PRECISION)
        slot = begin // TOKENS + row + tl.program_id(0)
        p = tl.arange(0, P_PADDED)[:, None]
        q = tl.arange(0, Q_PADDED)[None, :]
        tl.store(partials + slot * (P_PADDED * Q_PADDED) + p * Q_PADDED + q, found)


@triton.jit
def kronecker_finish_kernel(
    partials,
    bounds,
    out,
    out_stride,
    scale,
    P: tl.constexpr,
    Q: tl.constexpr,
    Q_PADDED: tl.constexpr,
    SLOT: tl.constexpr,
    TOKENS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Adds the partial sums of one sequence, WIDTH numbers of them, to ``out``."""
    row = tl.program_id(1)
    begin = tl.load(bounds + row)
    end = tl.load(bounds + row + 1)
    index = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    p = index // Q_PADDED
    q = index % Q_PADDED
    total = tl.zeros([WIDTH], tl.float32)
    slot = begin // TOKENS + row
    for block in range(0, tl.cdiv(end - begin, TOKENS)):
        total += tl.load(partials + (slot + block) * SLOT + index)
    there = (p < P) & (q < Q)
    place = out + row.to(tl.int64) * out_stride + p * Q + q
    tl.store(place, tl.load(place, mask=there, other=0.0) + total * scale, mask=there)


def _padded(size: int) -> int:
    return max(SMALLEST, triton.next_power_of_2(size))


def _rows(tensor: Tensor) -> Tensor:
    """A side with neighbouring elements side by side, in a dtype that kernels read."""
    tensor = supported(tensor)
    return tensor if tensor.stride(-1) == 1 and tensor.stride(0) >= 0 else tensor.contiguous()


@takes(kronecker_call)
def kronecker_sketch(call: KroneckerCall) -> Tensor:
    """See :func:`gac_kernels.kronecker_sketch`. Two launches, float32 accumulation.

    Where a side is float64 torch's matrix products serve, and the host waits for ``bounds``.
    """
    rows, tall, wide = call.out.shape
    if not rows or not len(call.right):
        return call.out
    if torch.float64 in (call.left.dtype, call.right.dtype):
        return by_matrix_products(call)
    device = call.out.device
    launch.check_device(device)
    places = call.left.dtype == torch.int64
    left, right = call.left.contiguous() if places else _rows(call.left), _rows(call.right)
    p, q = _padded(tall), _padded(wide)
    four = max(right.element_size(), 0 if places else left.element_size()) == 4
    tokens = FEWER if four else TOKENS
    slots = len(right) // tokens + rows
    partials = torch.empty(slots, p, q, dtype=torch.float32, device=device)
    launch.launch(
        kronecker_kernel,
        (triton.cdiv(min(call.longest, len(right)), tokens), rows),
        device,
        left,
        left.stride(0),
        0 if places else left.shape[1],
        right,
        right.stride(0),
        right.shape[1],
        call.bounds,
        call.keys,
        partials,
        P=tall,
        Q=wide,
        P_PADDED=p,
        Q_PADDED=q,
        PLACES=places,
        LEFT_IS_WHOLE=call.left_is_whole,
        RIGHT_IS_WHOLE=call.right_is_whole,
        ONES=call.ones,
        TOKENS=tokens,
        LEFT_COLUMNS=LINE // left.element_size(),
        RIGHT_COLUMNS=LINE // right.element_size(),
        WIDEN=interpreted(),
        PRECISION=PRECISION,
    )
    width = min(p * q, 256)
    launch.launch(
        kronecker_finish_kernel,
        (p * q // width, rows),
        device,
        partials,
        call.bounds,
        call.out.detach(),
        call.out.stride(0),
        call.scale,
        P=tall,
        Q=wide,
        Q_PADDED=q,
        SLOT=p * q,
        TOKENS=tokens,
        WIDTH=width,
    )
    return call.out

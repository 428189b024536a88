"""The Kronecker sketch's linear map, its checked call, and the way to compute it that is made of matrix products.

A sequence whose tokens have the rows ``l_t`` of ``left`` and ``r_t`` of ``right`` stands for the matrix ``G = sum_t
l_t r_t^T``: the gradient of a linear layer's weight, with ``left`` the gradient of its output and ``right`` its input.
Its sketch is ::

    M = A^T G B = sum_t (A^T l_t) (B^T r_t)^T          A: [p, P] signs / sqrt(P),  B: [q, Q] signs / sqrt(Q)

so that ``E <M_i, M_j> = <G_i, G_j>`` over the signs (AMS sketches of both sides; Pagh 2013 for their product). A side
that is no larger than its sketch is left as it is: its map is the identity and adds no error.

The sign of element ``(i, c)`` of a side is bit ``c % 32`` of the hash of word ``i * ceil(P / 32) + c // 32`` (1 means
minus), with ::

    hash(word) = finalize((word ^ key) * multiplier mod 2**32)

``finalize`` is MurmurHash3's last step, as in :mod:`gac_kernels.layout`; the odd multiplier, beside the key, keeps two
sides from holding the same rows in another order.
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import NamedTuple

import einops
import torch
from torch import Tensor

from gac_kernels.arguments import accumulator_dtype

MOST = 64
"""Rows and columns that a sketch may have."""

_MASK32, _MASK64 = 0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF


def sign_keys(seed: int) -> tuple[int, int, int, int]:
    """Key and multiplier of the left side, then of the right: 32-bit numbers that choose the signs.

    Args:
        seed: any int; its low 64 bits count. Close seeds give unrelated keys (SplitMix64, Steele et al. 2014).
    """
    state, found = seed & _MASK64, []
    for _ in range(2):
        state = (state + 0x9E3779B97F4A7C15) & _MASK64
        z = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK64
        z ^= z >> 31
        found += [z & _MASK32, (z >> 32) | 1]
    return found[0], found[1], found[2], found[3]


class KroneckerCall(NamedTuple):
    """A checked call of ``kronecker_sketch``.

    Attributes:
        left: ``[N, p]``, floating point, or ``[N]`` int64: the place of each token's one (negative: a row of zeros).
        right: ``[N, q]``, floating point.
        out: ``[B, P, Q]`` float32, its last two dimensions contiguous.
        bounds: ``[B + 1]`` int64 on the same device.
        keys: ``[4]`` int64 on the same device.
        longest: no sequence has more tokens.
        ones: whether ``right`` has a further column of ones.
        scale: multiplies what is added, the roots of ``P`` and ``Q`` included.
        left_is_whole, right_is_whole: whether the side's map is the identity.
    """

    left: Tensor
    right: Tensor
    out: Tensor
    bounds: Tensor
    keys: Tensor
    longest: int
    ones: bool
    scale: float
    left_is_whole: bool
    right_is_whole: bool


def kronecker_call(
    left: Tensor,
    right: Tensor,
    out: Tensor,
    *,
    bounds: Tensor,
    keys: Tensor,
    size: int | None = None,
    longest: int | None = None,
    ones: bool = False,
    scale: float = 1.0,
) -> KroneckerCall:
    """Checks the arguments of :func:`gac_kernels.kronecker_sketch`. Raises its errors."""
    named = {"left": left, "right": right, "out": out, "bounds": bounds, "keys": keys}
    for name, value in named.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
        if value.device != out.device:
            raise ValueError(f"{name} is on {value.device}, out on {out.device}: move it there first")
    if right.dim() != 2 or not right.is_floating_point():
        raise ValueError(f"right must be floating point with shape [N, q], got {tuple(right.shape)} {right.dtype}")
    tokens = len(right)
    if left.dtype == torch.int64:
        if left.shape != (tokens,):
            raise ValueError(f"left of int64 must have shape {(tokens,)}, as right has, got {tuple(left.shape)}")
        if size is None:
            raise ValueError("size is missing: left holds places (int64), and size says how many places there are")
        height = int(size)
    else:
        if left.dim() != 2 or len(left) != tokens or not left.is_floating_point():
            raise ValueError(
                f"left must be floating point with shape [{tokens}, p], or int64 with shape [{tokens}], got "
                f"{tuple(left.shape)} {left.dtype}"
            )
        if size is not None:
            raise ValueError(f"size={size} belongs to a left of places (int64), got {left.dtype}: leave it out")
        height = left.shape[1]
    if out.dim() != 3 or out.dtype != torch.float32:
        raise ValueError(f"out must be float32 with shape [B, P, Q], got {tuple(out.shape)} {out.dtype}")
    rows, tall, wide = out.shape
    if out.stride()[1:] != (wide, 1) and out.numel():
        raise ValueError(f"out must be contiguous within each sequence, got strides {out.stride()}")
    if out.stride(0) < tall * wide and rows > 1 and out.numel():
        raise ValueError(f"sequences of out overlap in memory (strides {out.stride()}): each needs a place of its own")
    for name, vector, length in (("bounds", bounds, rows + 1), ("keys", keys, 4)):
        if vector.shape != (length,) or vector.dtype != torch.int64 or not vector.is_contiguous():
            raise ValueError(
                f"{name} must be contiguous int64 with shape {(length,)}, got {tuple(vector.shape)} {vector.dtype}"
            )
    width = right.shape[1] + bool(ones)
    for name, own, mine in (("P", tall, height), ("Q", wide, width)):
        if not 0 < own <= min(MOST, mine):
            raise ValueError(f"out has {name} = {own}: it must be from 1 to {min(MOST, mine)} for a side of {mine}")
    longest = tokens if longest is None else int(longest)
    left_is_whole, right_is_whole = tall == height, wide == width
    root = (1 if left_is_whole else tall) * (1 if right_is_whole else wide)
    return KroneckerCall(
        left.detach(), right.detach(), out, bounds, keys, longest, bool(ones), float(scale) / math.sqrt(root),
        left_is_whole, right_is_whole,
    )  # fmt: skip


def signs_of(indices: Tensor, columns: int, key: Tensor, multiplier: Tensor, dtype: torch.dtype) -> Tensor:
    """``[n, columns]``: the signs (+1 or -1) of some rows of a side.

    Args:
        indices: ``[n]`` int64, not negative. columns: of the side's map. key, multiplier: 0-dim int64.
        dtype: of the result, on the device of ``indices``.
    """
    words = -(-columns // 32)
    word = indices[:, None] * words + torch.arange(words, device=indices.device)
    h = ((word & _MASK32) ^ key) * multiplier & _MASK32
    h = h ^ (h >> 16)
    h = (h * 0x85EBCA6B) & _MASK32  # int64 wraps modulo 2**64: the low half is right
    h = h ^ (h >> 13)
    h = (h * 0xC2B2AE35) & _MASK32
    h = h ^ (h >> 16)
    byte = torch.arange(-(-columns // 8), device=indices.device)
    found = _signs_of_bytes(dtype, indices.device)[(h[:, byte // 4] >> (byte % 4 * 8)) & 0xFF]
    return einops.rearrange(found, "n byte bit -> n (byte bit)")[:, :columns]


@functools.lru_cache(maxsize=16)
def _signs_of_bytes(dtype: torch.dtype, device: torch.device) -> Tensor:
    """``[256, 8]``: the signs that each byte stands for. Eight at once: signs are as many as a layer has inputs."""
    bits = (torch.arange(256, device=device)[:, None] >> torch.arange(8, device=device)) & 1
    return torch.sub(1, bits, alpha=2).to(dtype)


def projected(call: KroneckerCall, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """``[N, P]`` and ``[N, Q]``: both sides under their maps, before ``scale``."""
    left, right = call.left, call.right.to(dtype)
    left_key, left_multiplier, right_key, right_multiplier = call.keys.unbind()
    tall, wide = call.out.shape[1:]
    columns = right.shape[1] + call.ones
    everything = torch.arange(columns, device=right.device)
    if call.right_is_whole:
        b = torch.nn.functional.pad(right, (0, 1), value=1.0) if call.ones else right
    else:
        signs = signs_of(everything, wide, right_key, right_multiplier, dtype)
        b = right @ signs[: right.shape[1]]
        if call.ones:
            b = b + signs[-1]
    if left.dtype == torch.int64:
        there = (left >= 0)[:, None]
        places = left.clamp(min=0)
        if call.left_is_whole:
            a = torch.nn.functional.one_hot(places, tall).to(dtype)
        else:
            a = signs_of(places, tall, left_key, left_multiplier, dtype)
        return torch.where(there, a, 0.0), b
    left = left.to(dtype)
    if call.left_is_whole:
        return left, b
    return left @ signs_of(torch.arange(left.shape[1], device=left.device), tall, left_key, left_multiplier, dtype), b


def by_matrix_products(call: KroneckerCall) -> Tensor:
    """The sketch by torch's own products, in float32 (float64 where a side is): dense signs, then one product a row.

    Where sequences lie end to end and are equally long, all rows are one batched product. The host reads ``bounds``.
    """
    wide = torch.float64 if torch.float64 in (call.left.dtype, call.right.dtype) else torch.float32
    wide = torch.float32 if accumulator_dtype(call.out.device) is torch.float32 else wide
    with torch.autocast(call.out.device.type, enabled=False):
        return _by_matrix_products(call, wide, call.bounds.tolist())


def _by_matrix_products(call: KroneckerCall, wide: torch.dtype, bounds: list[int]) -> Tensor:
    first, last = bounds[0], bounds[-1]
    inside = call._replace(left=call.left[first:last], right=call.right[first:last])
    a, b = projected(inside, wide)
    lengths = {end - begin for begin, end in itertools.pairwise(bounds)}
    out = call.out.detach()
    if len(lengths) == 1:
        rows = len(out)
        found = torch.bmm(a.view(rows, -1, a.shape[1]).transpose(1, 2), b.view(rows, -1, b.shape[1]))
        out.add_(found.to(out.dtype), alpha=call.scale)
        return call.out
    for row, (begin, end) in enumerate(itertools.pairwise(bounds)):
        if end > begin:
            out[row].add_(
                (a[begin - first : end - first].T @ b[begin - first : end - first]).to(out.dtype), alpha=call.scale
            )
    return call.out

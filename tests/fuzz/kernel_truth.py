"""What every operation of ``gac_kernels`` computes, straight from its definition in float64, and how far it may be off.

Bounds are those of the kernels' own tests (``tests/gac_kernels/test_cpu_library.py`` and ``test_triton.py`` derive them
from who adds what): see there.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gac_kernels.layout import SketchLayout, sign_word

U32, U64 = 2.0**-24, 2.0**-53
ROUNDOFF = {torch.float64: U64, torch.float32: U32, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
SMALLEST = {torch.float64: 2.0**-1074, torch.float32: 2.0**-149, torch.float16: 2.0**-24, torch.bfloat16: 2.0**-133}
DEPTH = 16_384 / 8 + 1000
LATER = 200
ROWS = 256


def flat(tensor: Tensor) -> Tensor:
    return tensor.detach().double().reshape(-1)


def far(what: str, got: Tensor, want: Tensor, bound: Tensor) -> str | None:
    """What is off, where something is; non-finite numbers have to be non-finite alike."""
    if got.shape != want.shape:
        return f"{what} has shape {tuple(got.shape)}, not {tuple(want.shape)}"
    finite = torch.isfinite(want)
    if not torch.equal(finite, torch.isfinite(got)):
        return f"{what} is finite elsewhere: {got.tolist()}, has to be {want.tolist()}"
    off = ((got.double() - want).abs() > bound) & finite
    if off.any():
        k = int(off.flatten().nonzero()[0])
        numbers = [float(x.expand_as(want).flatten()[k]) for x in (got.double(), want, bound)]
        return f"{what}[{k}] is {numbers[0]}, has to be {numbers[1]} within {numbers[2]:.2g}"
    return None


def second_moments(tensors: list[Tensor]) -> list[Tensor]:
    """One for each tensor, of its dtype, some elements 0."""
    wide = [t.detach().double().abs() * (torch.arange(t.numel()).view(t.shape) % 7 != 0) for t in tensors]
    return [v.to(t.dtype) for v, t in zip(wide, tensors, strict=True)]


def scaled(tensors: list[Tensor], scales: list[Tensor | None]) -> list[Tensor]:
    """``[n]`` each: elements times ``2**(e - 127)`` with the ``e`` of their 32; NaN where that is 255."""
    found = []
    for x, s in zip(tensors, scales, strict=True):
        values = flat(x)
        if s is not None:
            powers = torch.tensor([math.nan if e == 255 else 2.0 ** (e - 127) for e in s.reshape(-1).tolist()])
            values = values * powers.double()[torch.arange(len(values)) // 32]
        found.append(values)
    return found


def moments(tensors: list[Tensor]) -> Tensor:
    """``[n, 2]``: squares and non-finite elements of each."""
    rows = [[float((flat(t) ** 2).sum()), float((~torch.isfinite(flat(t))).sum())] for t in tensors]
    return torch.tensor(rows, dtype=torch.float64).view(-1, 2)


def pairs(a: list[Tensor], b: list[Tensor]) -> Tensor:
    """``[n, 3]`` of each pair."""
    rows = [
        [float((flat(x) ** 2).sum()), float((flat(y) ** 2).sum()), float((flat(x) * flat(y)).sum())]
        for x, y in zip(a, b, strict=True)
    ]
    return torch.tensor(rows, dtype=torch.float64).view(-1, 3)


def sums_bound(size: Tensor, tensors: list[Tensor], backend: str, *, terms: int = 64, error: float = 0.0) -> Tensor:
    """Of sums of products whose magnitudes add up to ``size``."""
    if backend == "triton":
        u = max((U64 if t.dtype == torch.float64 else U32 for t in tensors), default=U32)
        return 2 * ((terms + 1) * u + LATER * U64 + error) * size + 2.0**-149 * sum(t.numel() for t in tensors)
    if backend == "fallback" and any(t.dtype != torch.float64 for t in tensors):
        # BLAS in float32: n roundings of mean 0 add up beyond 8 sqrt(n) units once in 2e13 (tests of the fallback)
        longest = max(t.numel() for t in tensors)
        return 8 * (max(longest, 1) ** 0.5 * U32 + error) * size + 1e-300
    short = any(t.dtype in (torch.bfloat16, torch.float16) for t in tensors)
    return 2 * (DEPTH * U64 + 16 * U32 * short + error) * size + 1e-300


def weighted(x: Tensor, v: Tensor, eps: float) -> Tensor:
    """``x / (sqrt(v) + eps)``, 0 where ``v`` is 0 and ``x`` finite."""
    x, v = flat(x), flat(v)
    return torch.where((v == 0) & torch.isfinite(x), 0.0, x / (v.sqrt() + eps))


def projected(pieces: list[Tensor], layout: SketchLayout, regions: list[int], starts: list[int]):
    """``S x``, and of each bucket the sum of magnitudes and the number of elements, element by element."""
    total, mass, count = (torch.zeros(layout.size, dtype=torch.float64) for _ in range(3))
    for piece, region, start in zip(pieces, regions, starts, strict=True):
        x = flat(piece)
        j = torch.arange(len(x)) + start
        bucket = layout.bucket_offsets[region] + j // (layout.lanes * layout.rows_per_slab) * layout.lanes
        bucket += j % layout.lanes
        index = j + layout.index_offsets[region]
        words = {int(w): sign_word(layout.seed, int(w)) for w in torch.unique(index // 32)}
        minus = torch.tensor([words[int(i) // 32] >> (int(i) % 32) & 1 for i in index.tolist()], dtype=torch.bool)
        total.index_add_(0, bucket, torch.where(minus, -x, x))
        mass.index_add_(0, bucket, x.abs())
        count.index_add_(0, bucket, torch.ones_like(x))
    return total, mass, count


def token_rows(logprobs: Tensor, advantages: Tensor, mask: Tensor, expert: Tensor) -> tuple[Tensor, Tensor]:
    """``[B, 7]`` sums over tokens, and the same of magnitudes."""
    logp, m = logprobs.double(), mask != 0
    a = advantages.double()
    a = (a[:, None] if a.dim() == 1 else a).expand(logp.shape)
    logp, a = torch.where(m, logp, 0.0), torch.where(m & ~expert[:, None], a, 0.0)
    p = logp.exp()
    phi = torch.where(m, p * (1 - p), 0.0)
    columns = torch.stack([m.double(), logp, a, a * a, phi, phi * phi, phi * a], -1)
    p = torch.where(m, p, 0.0)
    sizes = torch.stack([m.double(), logp.abs(), a.abs(), a * a, p, p, p * a.abs()], -1)
    return columns.sum(1), sizes.sum(1)

"""The sums of a step from what its contributions left, by one program.

Numbers are blocks of four lanes, as in :mod:`gac_kernels.triton.step_kernels`.
"""

# Triton compiles this source: branches on constants stay nested and written out.
# ruff: noqa: SIM108

from __future__ import annotations

import triton
import triton.language as tl

from gac_kernels.triton.kernels import _reduce_range

NORMS = tl.constexpr(8)
"""Where the squared norms lie among sums."""


@triton.jit
def _four(idx, a, b, c, d):
    """Four numbers side by side."""
    return tl.where(idx == 0, a, tl.where(idx == 1, b, tl.where(idx == 2, c, d)))


@triton.jit(do_not_specialize=["count", "stride", "kept", "contributions", "cells"])
def gather_kernel(
    partials,
    count,
    rows,
    stride,
    kept,
    contributions,
    cells,
    branches,
    tokens,
    scale_s,
    scale_r,
    time_noise,
    broken,
    counts,
    out,
    LOSSLESS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The sums of a step on one device, ``out`` ``[13]``, as :data:`gac_kernels.step_vector.SUMS` has them.

    ``partials`` ``[3, count]`` are what a pair kernel left of both totals. ``rows`` ``[kept, stride]`` have a row for
    each of the ``contributions``: squares and non-finite elements as read, then ``cells`` parts of the square of what
    the total has gained, which LOSSLESS layouts lack: there the first number counts, in units of a branch's squared
    scale. ``branches`` say of each whether it is of RL, ``tokens`` what it counts for (None: 1). ``counts`` is 0 where
    another device counts contributions.
    """
    idx = tl.arange(0, 4)
    zero = tl.zeros([4], tl.float64)
    power_s = zero
    power_r = zero
    tokens_s = zero
    tokens_r = zero
    n_s = zero
    n_r = zero
    lanes = tl.arange(0, BLOCK)
    for k in range(contributions):
        row = rows + k * stride
        of_rl = tl.load(branches + k + idx * 0)
        if tokens is None:
            told = zero + 1.0
            inverse = told
        else:
            told = tl.load(tokens + k + idx * 0)
            inverse = tl.where(told > 0.0, 1.0 / told, 0.0)
        if LOSSLESS:
            scale = tl.where(of_rl == 0, tl.load(scale_s + idx * 0), tl.load(scale_r + idx * 0)).to(tl.float64)
            power = tl.load(row + idx * 0) * (scale * scale)
        else:
            acc = tl.zeros([BLOCK], tl.float64)
            for first in range(0, cells, BLOCK):
                acc += tl.load(row + 2 + first + lanes, mask=first + lanes < cells, other=0.0)
            power = tl.sum(acc) + zero
        power = tl.where(told > 0.0, power * inverse, 0.0)
        one = tl.where(told > 0.0, 1.0, zero)
        power_s += tl.where(of_rl == 0, power, 0.0)
        power_r += tl.where(of_rl == 0, 0.0, power)
        tokens_s += tl.where(of_rl == 0, told, 0.0)
        tokens_r += tl.where(of_rl == 0, 0.0, told)
        n_s += tl.where(of_rl == 0, one, 0.0)
        n_r += tl.where(of_rl == 0, 0.0, one)
    nonfinite = zero + broken
    for k in range(kept):
        nonfinite += tl.load(rows + k * stride + 1 + idx * 0)
    if time_noise is None:
        by_time = zero
    else:
        by_time = tl.load(time_noise + idx, mask=idx < 2, other=0.0)
    tl.store(out + idx, _four(idx, power_s, power_r, tokens_s * counts, tokens_r * counts))
    tl.store(out + 4 + idx, _four(idx, n_s * counts, n_r * counts, nonfinite, zero))
    tl.store(out + NORMS + 3 + idx, by_time, mask=idx < 2)
    _reduce_range(partials, count, 0, count, out + NORMS, 3, False, BLOCK)

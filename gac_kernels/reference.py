"""The oracle: every operation in plain torch, in float64, for any floating dtype and device.

Same names and signatures as the fast operations in :mod:`gac_kernels`. It defines what they compute; tests and
benchmarks compare with it, and it serves where no faster backend exists. It is written to be read, not to be fast,
and it makes float64 copies of its input.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from gac_kernels.arguments import (
    accumulator_dtype,
    check_absorb,
    check_into,
    check_pair,
    check_scalar,
    check_second_moments,
    check_sketch,
    check_token_inputs,
    tensor_list,
)
from gac_kernels.layout import LANES, SIGN_BITS, SketchLayout, sign_key

__all__ = ["absorb_", "mix_", "moments", "pair_moments", "signs", "sketch", "token_moments"]


def _flat(tensor: Tensor) -> Tensor:
    return tensor.detach().reshape(-1).to(accumulator_dtype(tensor.device))


def _weighted(tensor: Tensor, second_moment: Tensor, eps: float) -> Tensor:
    v = _flat(second_moment)
    return _flat(tensor) / (v.sqrt() + eps).masked_fill(v == 0, math.inf)


def _moments(tensors: list[Tensor], device: torch.device) -> Tensor:
    dtype = accumulator_dtype(device)
    rows = [torch.stack([_flat(t).square().sum(), (~torch.isfinite(t)).sum().to(dtype)]) for t in tensors]
    return torch.stack(rows) if rows else torch.zeros(0, 2, dtype=dtype, device=device)


def moments(tensors: Any, *, per_tensor: bool = False) -> Tensor:
    """Sum of squares and number of non-finite elements.

    Args:
        tensors: a tensor or a list of tensors on one device; any shape, floating dtype and strides.
        per_tensor: one row for each tensor instead of the total.

    Returns:
        ``[2]`` (``[n, 2]`` with ``per_tensor``): sum of squares, count of NaN and infinite elements; float64
        (float32 where the device has no float64). An empty list gives zeros. A non-finite element makes the sum
        of squares non-finite too.

    Raises:
        TypeError: an element is no floating-point tensor. ValueError: tensors are on several devices.
    """
    tensors = tensor_list(tensors, "tensors")
    rows = _moments(tensors, tensors[0].device if tensors else torch.device("cpu"))
    return rows if per_tensor else rows.sum(0)


def signs(layout: SketchLayout, region: int, start: int, numel: int, device: torch.device | str = "cpu") -> Tensor:
    """The signs (+1 or -1, float64 ``[numel]``) of elements ``start .. start + numel`` of a region."""
    index = torch.arange(numel, dtype=torch.int64, device=device) + (layout.index_offsets[region] + start)
    word, bit = index // SIGN_BITS, index % SIGN_BITS
    high = word >> 32
    key = torch.zeros_like(word)
    for h in torch.unique(high).tolist():
        key = torch.where(high == h, torch.full_like(key, sign_key(layout.seed, h)), key)
    h = (word & 0xFFFFFFFF) ^ key
    h = h ^ (h >> 16)
    h = (h * 0x85EBCA6B) & 0xFFFFFFFF  # int64 wraps modulo 2**64: the low half is right
    h = h ^ (h >> 13)
    h = (h * 0xC2B2AE35) & 0xFFFFFFFF
    h = h ^ (h >> 16)
    return 1.0 - 2.0 * ((h >> bit) & 1).to(accumulator_dtype(torch.device(device)))


def sketch(
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
) -> Tensor:
    """A random projection of the tensors into ``out``, and their moments from the same read.

    ``out`` receives ``scale * S x``: a fixed linear map with ``E <Sa, Sb> = <a, b>`` over seeds, described in
    :mod:`gac_kernels.layout` (a count sketch, Charikar, Chen and Farach-Colton 2002, whose buckets are structured
    so that neighbouring elements never collide).

    Args:
        tensors: a tensor or a list of tensors on ``out``'s device; any shape, floating dtype and strides.
        out: ``[layout.size]``, contiguous, float32 or float64.
        layout: where elements go. None: the list is one long vector and gets a map that fits ``out``.
        regions: the region of each tensor (default: tensor ``k`` belongs to region ``k``). Only with ``layout``.
        starts: the position of each tensor's first element within its region (default 0). Only with ``layout``.
        seed: selects the signs when ``layout`` is None.
        scale: multiplies what is written (a number, or a 0-dim tensor that is read on the device); default 1.
        accumulate: add to ``out``. Otherwise all buckets of the regions named are overwritten; others stay.
        per_tensor: moments as one row for each tensor.
        into: what to add the moments to, of their shape, dtype and device, contiguous; None for a new tensor.
        second_moments: a tensor for each of ``tensors``, with as many elements in the same order; any floating dtype
            and strides. Each element ``x`` then counts as ``x / (sqrt(v) + eps)``, in the sketch and in the moments:
            with Adam's second moments (bias-corrected or not, as they are given) that is the space of its update
            (Kingma and Ba 2015). Where ``v`` is 0 a finite ``x`` counts as 0: Adam has met no gradient of that
            element yet, so its scale is unknown. A negative ``v`` gives NaN. None: elements count as they are.
        eps: Adam's epsilon; 0, or 2**-126 to 2**127. Only with ``second_moments``.

    Returns:
        Moments of the (weighted) tensors before ``scale``, as :func:`moments` gives them; ``into`` itself where it is
        given.

    Raises:
        TypeError, ValueError: with the argument's name, what it was and what is needed.
    """
    tensors, layout, regions, starts = check_sketch(tensors, out, layout, regions, starts, seed)
    if second_moments is not None:
        second_moments = check_second_moments(second_moments, tensors, eps)
        tensors = [_weighted(x, v, eps) for x, v in zip(tensors, second_moments, strict=True)]
    factor = 1.0 if scale is None else check_scalar(scale, "scale", out.device)
    sums = None if into is None else check_into(into, (len(tensors), 2) if per_tensor else (2,), out.device)
    dtype = accumulator_dtype(out.device)
    total = torch.zeros(layout.size, dtype=dtype, device=out.device)
    for tensor, region, start in zip(tensors, regions, starts, strict=True):
        j = torch.arange(tensor.numel(), device=out.device) + start
        bucket = j // (layout.lanes * layout.rows_per_slab) * layout.lanes + j % layout.lanes
        signed = _flat(tensor) * signs(layout, region, start, tensor.numel(), out.device)
        total.index_add_(0, bucket + layout.bucket_offsets[region], signed)
    if isinstance(factor, Tensor):
        factor = factor.to(dtype)
    if accumulate:
        out[: layout.size] += (factor * total).to(out.dtype)
    else:
        for region in set(regions):
            begin = layout.bucket_offsets[region]
            end = begin + layout.region_size(layout.numels[region])
            out[begin:end] = (factor * total[begin:end]).to(out.dtype)
        out[layout.size :].zero_()
    rows = _moments(tensors, out.device)
    moments = rows if per_tensor else rows.sum(0)
    if sums is None:
        return moments
    sums += moments
    return into


def pair_moments(a: Any, b: Any, *, per_tensor: bool = False) -> Tensor:
    """``|a|^2``, ``|b|^2`` and ``<a, b>`` of two lists of equal shapes.

    Args:
        a, b: tensors or lists of tensors on one device, pairwise of equal shape; any floating dtypes and strides.
        per_tensor: one row for each pair instead of the total.

    Returns:
        ``[3]`` (``[n, 3]`` with ``per_tensor``), float64 (float32 where the device has no float64).

    Raises:
        TypeError, ValueError: lists of different lengths, shapes or devices, or not floating point.
    """
    a, b = check_pair(a, b)
    device = a[0].device if a else torch.device("cpu")
    rows = []
    for x, y in zip(a, b, strict=True):
        x, y = _flat(x), _flat(y)
        rows.append(torch.stack([x.square().sum(), y.square().sum(), (x * y).sum()]))
    table = torch.stack(rows) if rows else torch.zeros(0, 3, dtype=accumulator_dtype(device), device=device)
    return table if per_tensor else table.sum(0)


def mix_(a: Any, b: Any, mu: Tensor | float, *, moments: bool = False) -> Tensor | None:
    """``a <- mu * a + (1 - mu) * b`` in place, rounded once to ``a``'s dtype.

    Args:
        a, b: as for :func:`pair_moments`; no tensor of ``a`` may overlap itself in memory.
        mu: weight of ``a``: a number, or a 0-dim tensor that is read on the device.
        moments: also return the pair moments of the values before the update, from the same read.

    Returns:
        None, or the ``[3]`` tensor of :func:`pair_moments`.
    """
    a, b = check_pair(a, b, writes_a=True)
    result = pair_moments(a, b) if moments else None
    for x, y in zip(a, b, strict=True):
        dtype = accumulator_dtype(x.device)
        weight = check_scalar(mu, "mu", x.device)
        weight = weight.to(dtype) if isinstance(weight, Tensor) else weight
        x.copy_(weight * x.to(dtype) + (1 - weight) * y.to(dtype))
    return result


def token_moments(logprobs: Tensor, advantages: Tensor, mask: Tensor, is_expert: Tensor) -> Tensor:
    """Per-sequence sums from which every coefficient estimator follows (see :mod:`gac.statistics`).

    With ``m`` the mask, ``phi = p * (1 - p)`` for ``p = exp(logprob)``, and ``A`` the advantage, set to 0 on
    demonstrations, the columns are ::

        sum m, sum m*logprob, sum m*A, sum m*A^2, sum m*phi, sum m*phi^2, sum m*phi*A

    Args:
        logprobs: ``[B, T]`` log-probabilities of the taken tokens, any floating dtype.
        advantages: ``[B, T]`` or ``[B]``, any floating dtype.
        mask: ``[B, T]``, bool or number; tokens that count. Values under a zero mask are never used.
        is_expert: ``[B]`` bool; True marks a demonstration.

    Returns:
        ``[B, 7]`` float64 (float32 where the device has no float64).

    Raises:
        TypeError, ValueError: with the argument's name, its shape and the shape needed.
    """
    logprobs, advantages, mask, is_expert = check_token_inputs(logprobs, advantages, mask, is_expert)
    dtype = accumulator_dtype(logprobs.device)
    m = mask != 0
    zero = torch.zeros((), dtype=dtype, device=logprobs.device)
    logp = torch.where(m, logprobs.to(dtype), zero)
    a = torch.where(m & ~is_expert[:, None], advantages.to(dtype), zero)
    p = logp.exp()
    phi = torch.where(m, p * (1 - p), zero)
    columns = [m.to(dtype), logp, a, a * a, phi, phi * phi, phi * a]
    return torch.stack([c.sum(1) for c in columns], dim=1)


def absorb_(
    current: Tensor,
    previous: Tensor | None,
    total: Tensor,
    scale: Tensor | float,
    *,
    into: Tensor | None = None,
) -> Tensor:
    """Takes the newest contribution out of a running sketch: one pass over three vectors.

    With ``delta = scale * (current - previous)``: ``total += delta``, then ``previous <- current``.

    Args:
        current: ``[m]`` float32, contiguous: the sketch of the running sum.
        previous: ``[m]`` float32, contiguous, what ``current`` was at the last call; None stands for zeros and
            nothing is written to it.
        total: ``[m]`` float32, contiguous. The three must not overlap.
        scale: a number, or a 0-dim tensor that is read on the device.
        into: what to add the sums to, of their shape, dtype and device, contiguous; None for a new tensor.

    Returns:
        ``[ceil(m / 1024)]``: the sum of squares of ``delta`` over each 1024 consecutive elements (the last may be
        shorter); float64 (float32 where the device has no float64). ``into`` itself where it is given.

    Raises:
        TypeError, ValueError: with the argument's name, what it was and what is needed.
    """
    factor = check_absorb(current, previous, total, scale)
    cells = -(-current.numel() // LANES)
    sums = None if into is None else check_into(into, (cells,), current.device)
    dtype = accumulator_dtype(current.device)
    delta = current.to(dtype) if previous is None else current.to(dtype) - previous.to(dtype)
    delta = (factor.to(dtype) if isinstance(factor, Tensor) else factor) * delta
    total.copy_(total.to(dtype) + delta)
    if previous is not None:
        previous.copy_(current)
    padded = torch.nn.functional.pad(delta.square(), (0, cells * LANES - delta.numel()))
    squares = padded.view(cells, LANES).sum(1)
    if sums is None:
        return squares
    sums += squares
    return into

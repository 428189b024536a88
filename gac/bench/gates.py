"""Correctness gates: every timed case is first compared with the float64 reference, on the very buffers it reads.

Bounds follow from the arithmetic alone: an addend passes at most ``depth`` float32 roundings, so a sum errs by at most
``2 * depth * 2**-24`` of the sum of magnitudes. Long lists are checked tensor by tensor on a sample of them (the first,
the last, the largest, the smallest and others), and their total against the sum of the rows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gac_kernels import SketchLayout, reference
from gac_kernels.layout import LANES
from gac_kernels.totals import absorb_sketch_call

UNIT = 2.0**-24
_UNIT_OF = {torch.float64: 2.0**-53, torch.float32: UNIT, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}

SUM_DEPTH = 512
"""Most float32 additions of one partial sum before float64 takes over, with those of its tree (any backend)."""

WEIGHT_DEPTH = 7
"""Roundings of an element that is divided by ``sqrt(v) + eps``, with a GPU's approximate instructions."""

_PIECE = 1 << 22  # elements that the reference sees at once: it makes float64 copies
_SAMPLE = 1 << 26  # elements of a list that are checked


@dataclass(frozen=True)
class Gate:
    """The outcome: ``error`` is the largest error in units of its bound, so a green gate has ``error <= 1``."""

    ok: bool
    error: float
    checked: str

    @classmethod
    def of(cls, errors: Sequence[Tensor], bounds: Sequence[Tensor], checked: str) -> Gate:
        """Compares elementwise. NaN is never within a bound."""
        worst = 0.0
        for error, bound in zip(errors, bounds, strict=True):
            if error.numel():
                part = float((error / bound.double().clamp_min(1e-300)).nan_to_num(nan=float("inf")).max())
                worst = max(worst, part)
        return cls(worst <= 1.0, worst, checked)


def sample(numels: Sequence[int]) -> list[int]:
    """Indices of the tensors to check: all of a short list, some of a long one."""
    if sum(numels) <= _SAMPLE:
        return list(range(len(numels)))
    by_size = sorted(range(len(numels)), key=lambda k: numels[k])
    wanted = [by_size[0], len(numels) - 1, 1, len(numels) // 2, by_size[-1], 0]
    chosen: list[int] = []
    total = 0
    for index in dict.fromkeys(wanted):
        if total + numels[index] <= _SAMPLE or not chosen:
            chosen.append(index)
            total += numels[index]
    return chosen


def _pieces(tensor: Tensor) -> Any:
    flat = tensor.reshape(-1)
    return [(start, flat[start : start + _PIECE]) for start in range(0, max(1, flat.numel()), _PIECE)]


def _sum(parts: Iterable[Tensor]) -> Tensor:
    return functools.reduce(torch.add, parts)


def _what(indices: Sequence[int], count: int) -> str:
    return "everything" if len(indices) == count else f"{len(indices)} of {count} tensors, and the total"


def check_moments(function: Callable, tensors: list[Tensor]) -> Gate:
    """``function`` is called like :func:`gac_kernels.moments`."""
    total = function(tensors)
    rows = total[None] if len(tensors) == 1 else function(tensors, per_tensor=True)
    indices = sample([t.numel() for t in tensors])
    exact = torch.stack([_sum(reference.moments(p) for _, p in _pieces(tensors[k])) for k in indices])
    errors = [(rows[indices] - exact).abs(), (total - rows.sum(0)).abs()]
    scale = torch.tensor([2 * SUM_DEPTH * UNIT, 0.0], dtype=exact.dtype, device=exact.device)
    return Gate.of(errors, [exact * scale, rows.sum(0) * scale], _what(indices, len(tensors)))


def check_pair_moments(function: Callable, a: list[Tensor], b: list[Tensor]) -> Gate:
    """``function`` is called like :func:`gac_kernels.pair_moments`."""
    total = function(a, b)
    rows = total[None] if len(a) == 1 else function(a, b, per_tensor=True)
    indices = sample([t.numel() for t in a])
    exact = torch.stack(
        [
            _sum(reference.pair_moments(p, q) for (_, p), (_, q) in zip(_pieces(a[k]), _pieces(b[k]), strict=True))
            for k in indices
        ]
    )
    bound = lambda r: 2 * SUM_DEPTH * UNIT * torch.stack([r[..., 0], r[..., 1], (r[..., 0] * r[..., 1]).sqrt()], -1)
    errors = [(rows[indices] - exact).abs(), (total - rows.sum(0)).abs()]
    return Gate.of(errors, [bound(exact), bound(rows.sum(0))], _what(indices, len(a)))


def check_sketch(
    function: Callable,
    tensors: list[Tensor],
    out: Tensor,
    layout: SketchLayout,
    second_moments: list[Tensor] | None = None,
) -> Gate:
    """``function`` is called like :func:`gac_kernels.sketch`; ``out`` is poisoned first."""
    out.fill_(float("nan"))
    options = {} if second_moments is None else {"second_moments": second_moments}
    total = function(tensors, out, layout=layout, **options)
    rows = total[None]
    if len(tensors) > 1:
        rows = function(tensors, torch.empty_like(out), layout=layout, per_tensor=True, **options)
    indices = sample([t.numel() for t in tensors])
    errors, bounds = [(~torch.isfinite(out)).sum().double()], [torch.zeros(1, device=out.device)]
    moments: list[Tensor] = []
    roundings = 0 if second_moments is None else WEIGHT_DEPTH
    depth = layout.rows_per_slab + 16 + roundings
    for k in indices:
        first = layout.bucket_offsets[k]
        last = first + layout.region_size(layout.numels[k])
        own = SketchLayout((layout.numels[k],), layout.rows_per_slab, layout.seed, layout.lanes)
        shifted = _ShiftedLayout(own, layout.index_offsets[k])
        buckets = torch.zeros(own.size, dtype=torch.float64, device=out.device)
        mass = torch.zeros_like(buckets)
        parts: list[Tensor] = []
        seconds = _pieces(tensors[k]) if second_moments is None else _pieces(second_moments[k])
        for (start, piece), (_, second) in zip(_pieces(tensors[k]), seconds, strict=True):
            if second_moments is not None:
                piece = (piece.double() / (second.double().sqrt() + 1e-8)).masked_fill(second == 0, 0.0)
            parts.append(shifted.add(piece, start, buckets, mass))
        errors.append((out[first:last].double() - buckets).abs())
        bounds.append(2 * depth * UNIT * mass + 1e-40)
        moments.append(_sum(parts))
    exact = torch.stack(moments)
    scale = torch.tensor([2 * (SUM_DEPTH + 2 * roundings) * UNIT, 0.0], dtype=exact.dtype, device=exact.device)
    errors += [(rows[indices] - exact).abs(), (total - rows.sum(0)).abs()]
    bounds += [exact * scale, rows.sum(0) * scale]
    return Gate.of(errors, bounds, _what(indices, len(tensors)))


class _ShiftedLayout:
    """One region on its own, with the signs that its place among the others gives it."""

    def __init__(self, layout: SketchLayout, index_offset: int) -> None:
        # A region of that many elements before it, in a bucket-free layout, moves the sign index alone.
        self._signs = SketchLayout((index_offset, *layout.numels), layout.rows_per_slab, layout.seed, layout.lanes)
        self._layout = layout

    def add(self, piece: Tensor, start: int, buckets: Tensor, mass: Tensor) -> Tensor:
        """Adds a piece of the region to ``buckets`` and its magnitudes to ``mass``; its moments."""
        lanes, rows = self._layout.lanes, self._layout.rows_per_slab
        exact = piece.double()
        signed = exact * reference.signs(self._signs, 1, start, piece.numel(), piece.device)
        j = torch.arange(piece.numel(), device=piece.device) + start
        index = j // (lanes * rows) * lanes + j % lanes
        buckets.index_add_(0, index, signed)
        mass.index_add_(0, index, exact.abs())
        return reference.moments(piece)


def check_mix(function: Callable, a: list[Tensor], b: list[Tensor], mu: Tensor) -> Gate:
    """``function`` is called like :func:`gac_kernels.mix_`; it changes ``a``."""
    indices = sample([t.numel() for t in a])
    before = {k: a[k].clone() for k in indices}
    function(a, b, mu)
    errors, bounds = [], []
    weight = float(mu)
    for k in indices:
        unit = _UNIT_OF[a[k].dtype]
        for (start, old), (_, other) in zip(_pieces(before[k]), _pieces(b[k]), strict=True):
            left, right = weight * old.double(), (1 - weight) * other.double()
            got = a[k].reshape(-1)[start : start + old.numel()].double()
            errors.append((got - (left + right)).abs())
            bounds.append(1.01 * unit * (left + right).abs() + 4 * UNIT * (left.abs() + right.abs()) + 1e-37)
    return Gate.of(errors, bounds, "everything" if len(indices) == len(a) else f"{len(indices)} of {len(a)} tensors")


def check_absorb(function: Callable, current: Tensor, previous: Tensor, total: Tensor, scale: Tensor) -> Gate:
    """``function`` is called like :func:`gac_kernels.absorb_`, on copies."""
    other, sums = previous.clone(), total.clone()
    cells = function(current, other, sums, scale)
    delta = float(scale) * (current.double() - previous.double())
    whole = total.double() + delta
    exact = delta.square().view(-1, LANES).sum(1)
    magnitude = total.double().abs() + 2 * float(scale) * (current.double().abs() + previous.double().abs())
    errors = [(sums.double() - whole).abs(), (other.double() - current.double()).abs(), (cells - exact).abs()]
    bounds = [4 * UNIT * magnitude, torch.zeros_like(magnitude), 2 * SUM_DEPTH * UNIT * exact + 1e-37]
    return Gate.of(errors, bounds, "everything")


def check_accumulate(function: Callable, tensors: list[Tensor], total: Tensor, scale: Tensor) -> Gate:
    """``function`` is called like :func:`gac_kernels.accumulate_`, on lists laid end to end; it changes ``total``."""
    numels, factor = [t.numel() for t in tensors], float(scale)
    indices, parts = sample(numels), total.split(numels)
    before = {k: parts[k].clone() for k in indices}
    moments = function(tensors, total, scale=scale)
    rows = moments[None]
    if len(tensors) > 1:
        rows = function(tensors, torch.zeros_like(total), per_tensor=True)
    errors, bounds, exact = [], [], []
    for k in indices:
        found = []
        for (start, old), (_, piece) in zip(_pieces(before[k]), _pieces(tensors[k]), strict=True):
            added = factor * piece.double()
            want = old.double() + added
            got = parts[k][start : start + old.numel()].double()
            errors.append((got - want).abs())
            bounds.append(1.01 * UNIT * (want.abs() + old.double().abs() + added.abs()) + 1e-37)
            found.append(reference.moments(piece))
        exact.append(_sum(found))
    want = torch.stack(exact)
    by = torch.tensor([2 * SUM_DEPTH * UNIT, 0.0], dtype=want.dtype, device=want.device)
    errors += [(rows[indices] - want).abs(), (moments - rows.sum(0)).abs()]
    bounds += [want * by, rows.sum(0) * by]
    return Gate.of(errors, bounds, _what(indices, len(tensors)))


def check_absorb_sketch(
    function: Callable, tensors: list[Tensor], previous: Tensor, total: Tensor, scale: Tensor, layout: SketchLayout
) -> Gate:
    """``function`` is called like :func:`gac_kernels.absorb_sketch_`, on copies of ``previous`` and ``total``."""

    def as_sketch(x: list[Tensor], out: Tensor, *, layout: SketchLayout, per_tensor: bool = False) -> Tensor:
        call = lambda part, region: function(part, out, out.clone(), 1.0, layout=layout, regions=region)[:2]
        if not per_tensor:
            return call(x, list(range(len(x))))
        return torch.stack([call([one], [k]) for k, one in enumerate(x)])

    now = torch.empty_like(previous)
    sketched = check_sketch(as_sketch, tensors, now, layout)
    # what is in `now` is right: the rest follows from it
    last, sums, want, whole = (vector.clone() for vector in (previous, total, previous, total))
    got = function(tensors, last, sums, scale, layout=layout)
    call = absorb_sketch_call(tensors, want, whole, scale, layout=layout)
    exact = reference.absorbed(call, lambda call: call.out.copy_(now).new_zeros(2))
    magnitude = total.double().abs() + float(scale) * (now.double().abs() + previous.double().abs())
    errors = [(last - now).abs(), (sums.double() - whole.double()).abs(), (got[2:] - exact[2:]).abs()]
    bounds = [torch.zeros_like(now), 4 * UNIT * magnitude, 2 * SUM_DEPTH * UNIT * exact[2:] + 1e-37]
    absorbed = Gate.of(errors, bounds, sketched.checked)
    return max(sketched, absorbed, key=lambda gate: gate.error)


def check_token_moments(function: Callable, *inputs: Tensor) -> Gate:
    """``function`` is called like :func:`gac_kernels.token_moments`."""
    got, exact = function(*inputs), reference.token_moments(*inputs)
    logprobs, advantages, mask, _ = inputs
    m = mask != 0
    logp, a = (torch.where(m, t.double(), 0.0) for t in (logprobs, advantages))
    p = logp.exp() * m
    phi, a = p, a.abs()  # p bounds p (1 - p), in which the error of p counts once
    columns = [m.double(), logp.abs(), a, a * a, phi, phi * phi, phi * a]
    magnitudes = torch.stack([c.sum(1) for c in columns], 1)
    depth = SUM_DEPTH + 16  # 16: exp to a few units in the last place, and the products
    return Gate.of([(got - exact).abs()], [2 * depth * UNIT * magnitudes + 1e-30], "everything")

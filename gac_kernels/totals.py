"""Checked calls of the operations that add to totals: ``accumulate_``, ``absorb_``, ``absorb_sketch_``.

See :mod:`gac_kernels.calls`.
"""

from __future__ import annotations

import itertools
import operator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gac_kernels.arguments import check_into, check_scalar
from gac_kernels.calls import Places, SketchCall, name_the_long_one, numbers, places_of, sketch_call
from gac_kernels.elements import Elements, elements
from gac_kernels.layout import LANES, SketchLayout


@dataclass(frozen=True, eq=False)
class Stretches:
    """Where the tensors of a list lie in one vector. Calls repeat, and equal ones share the object.

    Attributes:
        numels: elements of each tensor.
        offsets: the place of each tensor's first element; no two tensors share one.
    """

    numels: tuple[int, ...]
    offsets: tuple[int, ...]


class AccumulateCall(NamedTuple):
    """A checked call of ``accumulate_``.

    Attributes:
        read: floating-point tensors on the device of ``total``, and their second moments or scales.
        stretches: where each goes.
        total, previous: contiguous ``[m]`` float32; ``previous`` may be None.
        scale: a number or a 0-dim tensor on the device.
        per_tensor: whether each tensor has its own row of moments.
        into: what the moments are added to, ``[2]`` or ``[n, 2]``; None for a new tensor.
        fresh: bits, for the CPU library alone: 1, ``total`` counts as 0 where tensors go; 2, ``previous`` does.
    """

    read: Elements
    stretches: Stretches
    total: Tensor
    previous: Tensor | None
    scale: Tensor | float
    per_tensor: bool
    into: Tensor | None
    fresh: int = 0


def accumulate_call(
    tensors: Any,
    total: Tensor,
    *,
    layout: SketchLayout | None = None,
    regions: Any = None,
    starts: Any = None,
    previous: Tensor | None = None,
    scale: Tensor | float | None = None,
    per_tensor: bool = False,
    into: Tensor | None = None,
    second_moments: Any = None,
    eps: float = 1e-8,
    block_scales: Any = None,
    fresh: int = 0,
) -> AccumulateCall:
    """Checks the arguments of :func:`gac_kernels.accumulate_`. Raises its errors."""
    named = {"total": total} | ({} if previous is None else {"previous": previous})
    if not all(_is_float_vector(value, total) for value in named.values()):
        _name_the_wrong_vector(named)
    device = total.device
    read = elements(tensors, device, "total", second_moments, eps, block_scales)
    numels = read.numels
    if layout is None:
        if regions is not None or starts is not None:
            raise ValueError("regions and starts need a layout: pass layout=SketchLayout.per_tensor(...)")
        stretches, size = _laid_end_to_end(numels), sum(numels)
    else:
        places = places_of(layout, len(numels), numbers(regions), numbers(starts))
        stretches, size = _stretches(places, numels), layout.size
        if fresh and numels != places.room:
            raise ValueError(f"fresh totals need tensors that fill their regions, got {numels} for {places.room}")
    if total.numel() != size:
        raise ValueError(f"total has {total.numel()} elements, {size} are needed: torch.zeros({size})")
    if into is not None:
        check_into(into, (len(numels), 2) if per_tensor else (2,), device)
    scale = 1.0 if scale is None else check_scalar(scale, "scale", device)
    return AccumulateCall(read, stretches, total, previous, scale, bool(per_tensor), into, fresh)


@lru_cache(maxsize=256)
def _laid_end_to_end(numels: tuple[int, ...]) -> Stretches:
    return Stretches(numels, tuple(itertools.accumulate(numels, initial=0))[: len(numels)])


@lru_cache(maxsize=256)
def _stretches(places: Places, numels: tuple[int, ...]) -> Stretches:
    """The stretches of tensors in a lossless layout."""
    layout = places.layout
    if not layout.lossless:
        raise ValueError(
            f"layout has {layout.rows_per_slab} rows a slab, so elements share buckets: accumulate_ needs one in which "
            "none do, SketchLayout.per_tensor(numels)"
        )
    if not all(map(operator.le, numels, places.room)):
        name_the_long_one(numels, places)
    offsets = tuple(layout.bucket_offsets[r] + s for r, s in zip(places.regions, places.starts, strict=True))
    by_offset = sorted(
        (offset, numel, k) for k, (offset, numel) in enumerate(zip(offsets, numels, strict=True)) if numel
    )
    for (offset, numel, k), (after, _, other) in itertools.pairwise(by_offset):
        if offset + numel > after:
            first, second = sorted((k, other))
            raise ValueError(f"tensors[{first}] and tensors[{second}] share elements of the layout: call once for each")
    return Stretches(numels, offsets)


class AbsorbCall(NamedTuple):
    """A checked call of ``absorb_``.

    Attributes:
        current, previous, total: contiguous ``[m]`` float32 on one device; ``previous`` may be None.
        scale: a number or a 0-dim tensor on the device.
        into: ``[cells]``, what the sums are added to; None for a new tensor.
        cells: ``ceil(m / 1024)``.
    """

    current: Tensor
    previous: Tensor | None
    total: Tensor
    scale: Tensor | float
    into: Tensor | None
    cells: int


def absorb_call(
    current: Tensor,
    previous: Tensor | None,
    total: Tensor,
    scale: Tensor | float,
    *,
    into: Tensor | None = None,
) -> AbsorbCall:
    """Checks the arguments of :func:`gac_kernels.absorb_`. Raises its errors."""
    named = {"current": current, "total": total} | ({} if previous is None else {"previous": previous})
    if not all(_is_float_vector(value, current) for value in named.values()):
        _name_the_wrong_vector(named)
    cells = -(-current.numel() // LANES)
    if into is not None:
        check_into(into, (cells,), current.device)
    return AbsorbCall(current, previous, total, check_scalar(scale, "scale", current.device), into, cells)


def _is_float_vector(value: Any, like: Any) -> bool:
    """True for a contiguous float32 vector as long as ``like`` and on its device."""
    return (
        isinstance(value, Tensor)
        and value.dtype is torch.float32
        and value.dim() == 1
        and value.is_contiguous()
        and (value is like or (value.numel() == like.numel() and value.device == like.device))
    )


def _name_the_wrong_vector(named: dict[str, Tensor]) -> None:
    first, like = next(iter(named.items()))
    for name, value in named.items():
        if not isinstance(value, Tensor) or value.dtype != torch.float32:
            raise TypeError(f"{name} must be a float32 tensor, got {getattr(value, 'dtype', type(value).__name__)}")
        if value.dim() != 1 or not value.is_contiguous():
            raise ValueError(f"{name} must be contiguous and 1-D, got shape {tuple(value.shape)}: pass t.reshape(-1)")
        if value.shape != like.shape:
            raise ValueError(f"{name} has {value.numel()} elements, {first} {like.numel()}: they must be equal")
        if value.device != like.device:
            raise ValueError(f"{name} is on {value.device}, {first} on {like.device}: they must be on one device")


class AbsorbSketchCall(NamedTuple):
    """A checked call of ``absorb_sketch_``.

    Attributes:
        sketched: what is sketched, and where it goes: tensors that fill their regions, each another. Its ``out`` is
            ``previous``.
        previous, total: contiguous ``[layout.size]`` float32.
        scale: a number or a 0-dim tensor on the device.
        into: ``[2 + layout.cells]``, what the sums are added to; None for a new tensor.
        fresh: bits, for the CPU library alone: 1, ``total`` counts as 0 where tensors go; 2, ``previous`` does.
    """

    sketched: SketchCall
    previous: Tensor
    total: Tensor
    scale: Tensor | float
    into: Tensor | None
    fresh: int = 0


def absorb_sketch_call(
    tensors: Any,
    previous: Tensor,
    total: Tensor,
    scale: Tensor | float,
    *,
    layout: SketchLayout,
    regions: Any = None,
    into: Tensor | None = None,
    second_moments: Any = None,
    eps: float = 1e-8,
    block_scales: Any = None,
    fresh: int = 0,
) -> AbsorbSketchCall:
    """Checks the arguments of :func:`gac_kernels.absorb_sketch_`. Raises its errors."""
    named = {"previous": previous, "total": total}
    if not all(_is_float_vector(value, previous) for value in named.values()):
        _name_the_wrong_vector(named)
    options = {"regions": regions, "second_moments": second_moments, "eps": eps, "block_scales": block_scales}
    sketched = sketch_call(tensors, previous, layout=layout, **options)
    places, numels = sketched.places, sketched.read.numels
    if numels != places.room or len(set(places.regions)) < len(places.regions):
        for k, (numel, room) in enumerate(zip(numels, places.room, strict=True)):
            if numel != room:
                raise ValueError(f"tensors[{k}] has {numel} elements, its region {room}: they must be equal")
        raise ValueError(f"regions must differ, got {places.regions}: one tensor for each")
    if into is not None:
        check_into(into, (2 + layout.cells,), previous.device)
    return AbsorbSketchCall(sketched, previous, total, check_scalar(scale, "scale", previous.device), into, fresh)

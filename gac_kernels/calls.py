"""One call of an operation, checked and in full: the only form that backends see.

A call is made once, from the arguments that a user gave (:func:`sketch_call`, :func:`accumulate_call`,
:func:`absorb_call`, :func:`token_call`), before a backend is chosen; what is wrong raises there, by name. ``moments``, ``pair_moments`` and
``mix_`` have no such form: their arguments are two lists, and a call of theirs may take a microsecond.
"""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from gac_kernels.arguments import (
    TensorList,
    check_into,
    check_scalar,
    check_second_moments,
    check_token_inputs,
    described,
)
from gac_kernels.layout import LANES, SketchLayout

Call = TypeVar("Call")


class Operation(Generic[Call]):
    """A backend's function of a checked call, which can also be called with the public arguments."""

    def __init__(self, make: Callable[..., Call], run: Callable[[Call], Tensor]) -> None:
        functools.update_wrapper(self, run)
        self.make, self.run = make, run

    def __call__(self, *args: Any, **options: Any) -> Tensor:
        """Checks the arguments, as the public operation of this name does, and runs the call."""
        return self.run(self.make(*args, **options))


def takes(make: Callable[..., Call]) -> Callable[[Callable[[Call], Tensor]], Operation[Call]]:
    """Says how the decorated function's call is made."""
    return functools.partial(Operation, make)


@dataclass(frozen=True, eq=False)
class Places:
    """Where the tensors of a list go. Calls repeat, and equal ones share the object.

    Attributes:
        layout: the map.
        regions: the region of each tensor.
        starts: the position of each tensor's first element within its region.
        room: elements that each tensor may have.
    """

    layout: SketchLayout
    regions: tuple[int, ...]
    starts: tuple[int, ...]
    room: tuple[int, ...]


class SketchCall(NamedTuple):
    """A checked call of ``sketch``.

    Attributes:
        listed: floating-point tensors on the device of ``out``, of any dtype and strides.
        numels: elements of each.
        out: ``[places.layout.size + tail]``, contiguous, float32 or float64.
        places: where each tensor goes.
        tail: elements of ``out`` after the layout's, which become 0.
        scale: a number or a 0-dim tensor on the device.
        accumulate: whether ``out`` is added to.
        per_tensor: whether each tensor has its own row of moments.
        into: what the moments are added to, ``[2]`` or ``[n, 2]``; None for a new tensor.
        second_list: second moments, a tensor for each of those, of as many elements; None.
        eps: added to their roots.
    """

    listed: TensorList
    numels: list[int]
    out: Tensor
    places: Places
    tail: int
    scale: Tensor | float
    accumulate: bool
    per_tensor: bool
    into: Tensor | None
    second_list: TensorList | None
    eps: float

    @property
    def tensors(self) -> Sequence[Tensor]:
        """The tensors."""
        return self.listed.tensors

    @property
    def second_moments(self) -> Sequence[Tensor] | None:
        """Their second moments."""
        return None if self.second_list is None else self.second_list.tensors

    @property
    def layout(self) -> SketchLayout:
        """The map."""
        return self.places.layout


def sketch_call(
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
) -> SketchCall:
    """Checks the arguments of :func:`gac_kernels.sketch`. Raises its errors."""
    listed = described(tensors, "tensors")
    tensors = listed.tensors
    if not isinstance(out, Tensor) or out.dim() != 1 or not out.is_contiguous():
        raise ValueError("out must be a contiguous 1-D tensor")
    if out.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"out must be float32 or float64, got {out.dtype}")
    device = out.device
    if tensors and tensors[0].device != device:
        raise ValueError(f"tensors are on {tensors[0].device}, out on {device}: they must be on one device")
    numels, size, tail = list(map(Tensor.numel, tensors)), out.numel(), 0
    if layout is None:
        if regions is not None or starts is not None:
            raise ValueError("regions and starts need a layout: pass layout=SketchLayout.per_tensor(...)")
        places = _end_to_end(tuple(numels), size, seed)
        tail = 0 if accumulate else size - places.layout.size
    else:
        if size != layout.size:
            raise ValueError(f"out has {size} elements, the layout needs {layout.size}: torch.zeros(layout.size)")
        places = _places(layout, len(numels), _numbers(regions), _numbers(starts))
        if not all(map(operator.le, numels, places.room)):
            _name_the_long_one(numels, places)
    second_list = None if second_moments is None else check_second_moments(second_moments, numels, device, eps)
    if into is not None:
        check_into(into, (len(tensors), 2) if per_tensor else (2,), device)
    scale = 1.0 if scale is None else check_scalar(scale, "scale", device)
    return SketchCall(
        listed, numels, out, places, tail, scale, bool(accumulate), bool(per_tensor), into, second_list, eps
    )


def _numbers(values: Any) -> tuple[int, ...] | None:
    return None if values is None else tuple(map(operator.index, values))


@lru_cache(maxsize=256)
def _end_to_end(numels: tuple[int, ...], size: int, seed: int) -> Places:
    """The places of tensors that make up one long vector."""
    starts, total = [], 0
    for numel in numels:
        starts.append(total)
        total += numel
    return Places(SketchLayout.flat(total, size, seed=seed), (0,) * len(numels), tuple(starts), numels)


@lru_cache(maxsize=256)
def _places(
    layout: SketchLayout, count: int, regions: tuple[int, ...] | None, starts: tuple[int, ...] | None
) -> Places:
    """The places of ``count`` tensors. Training repeats a few calls: the places of each are looked at once."""
    regions = tuple(range(count)) if regions is None else regions
    starts = (0,) * count if starts is None else starts
    if len(regions) != count or len(starts) != count:
        raise ValueError(f"{count} tensors need as many regions and starts, got {len(regions)}, {len(starts)}")
    for k, (region, start) in enumerate(zip(regions, starts, strict=True)):
        if not 0 <= region < len(layout.numels):
            raise ValueError(f"regions[{k}] is {region}: the layout has {len(layout.numels)} regions")
        if start < 0:
            raise ValueError(f"starts[{k}] is {start}: it must not be negative")
    room = tuple(layout.numels[r] - s for r, s in zip(regions, starts, strict=True))
    return Places(layout, regions, starts, room)


def _name_the_long_one(numels: Sequence[int], places: Places) -> None:
    for k, (numel, room, region, start) in enumerate(
        zip(numels, places.room, places.regions, places.starts, strict=True)
    ):
        if numel > room:
            raise ValueError(
                f"tensors[{k}] covers elements {start} to {start + numel} of region {region}, "
                f"which has {places.layout.numels[region]}"
            )


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
        listed: floating-point tensors on the device of ``total``, of any dtype and strides.
        stretches: where each goes.
        total, previous: contiguous ``[m]`` float32; ``previous`` may be None.
        scale: a number or a 0-dim tensor on the device.
        per_tensor: whether each tensor has its own row of moments.
        into: what the moments are added to, ``[2]`` or ``[n, 2]``; None for a new tensor.
        second_list: second moments, a tensor for each of those, of as many elements; None.
        eps: added to their roots.
    """

    listed: TensorList
    stretches: Stretches
    total: Tensor
    previous: Tensor | None
    scale: Tensor | float
    per_tensor: bool
    into: Tensor | None
    second_list: TensorList | None
    eps: float

    @property
    def tensors(self) -> Sequence[Tensor]:
        """The tensors."""
        return self.listed.tensors

    @property
    def second_moments(self) -> Sequence[Tensor] | None:
        """Their second moments."""
        return None if self.second_list is None else self.second_list.tensors


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
) -> AccumulateCall:
    """Checks the arguments of :func:`gac_kernels.accumulate_`. Raises its errors."""
    listed = described(tensors, "tensors")
    tensors = listed.tensors
    named = {"total": total} | ({} if previous is None else {"previous": previous})
    if not all(_is_float_vector(value, total) for value in named.values()):
        _name_the_wrong_vector(named)
    device = total.device
    if tensors and tensors[0].device != device:
        raise ValueError(f"tensors are on {tensors[0].device}, total on {device}: they must be on one device")
    numels = tuple(map(Tensor.numel, tensors))
    if layout is None:
        if regions is not None or starts is not None:
            raise ValueError("regions and starts need a layout: pass layout=SketchLayout.per_tensor(...)")
        stretches, size = _laid_end_to_end(numels), sum(numels)
    else:
        places = _places(layout, len(numels), _numbers(regions), _numbers(starts))
        stretches, size = _stretches(places, numels), layout.size
    if total.numel() != size:
        raise ValueError(f"total has {total.numel()} elements, {size} are needed: torch.zeros({size})")
    second_list = None if second_moments is None else check_second_moments(second_moments, list(numels), device, eps)
    if into is not None:
        check_into(into, (len(tensors), 2) if per_tensor else (2,), device)
    scale = 1.0 if scale is None else check_scalar(scale, "scale", device)
    return AccumulateCall(listed, stretches, total, previous, scale, bool(per_tensor), into, second_list, eps)


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
        _name_the_long_one(numels, places)
    offsets = tuple(layout.bucket_offsets[r] + s for r, s in zip(places.regions, places.starts, strict=True))
    by_offset = sorted((offset, numel, k) for k, (offset, numel) in enumerate(zip(offsets, numels, strict=True)) if numel)
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


class TokenCall(NamedTuple):
    """A checked call of ``token_moments``.

    Attributes:
        logprobs: ``[B, T]``, floating point, without graph.
        advantages: the same.
        mask: ``[B, T]``, any dtype.
        is_expert: ``[B]`` bool.
    """

    logprobs: Tensor
    advantages: Tensor
    mask: Tensor
    is_expert: Tensor


def token_call(logprobs: Tensor, advantages: Tensor, mask: Tensor, is_expert: Tensor) -> TokenCall:
    """Checks the arguments of :func:`gac_kernels.token_moments`. Raises its errors."""
    return TokenCall(*check_token_inputs(logprobs, advantages, mask, is_expert))

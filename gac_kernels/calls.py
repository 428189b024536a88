"""One call of an operation, checked and in full: the only form that backends see.

A call is made once, from the arguments that a user gave (:func:`sketch_call`, :func:`token_call`, and those of
:mod:`gac_kernels.totals`), before a backend is chosen; what is wrong raises there, by name. ``moments``,
``pair_moments`` and ``mix_`` have no such form: their arguments are two lists, and a call of theirs may take a
microsecond.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from gac_kernels.arguments import check_into, check_scalar, check_token_inputs
from gac_kernels.elements import BLOCK, Elements, elements
from gac_kernels.layout import SketchLayout

Call = TypeVar("Call")


class Operation(Generic[Call]):
    """A backend's function of a checked call, which can also be called with the public arguments.

    Attributes:
        make: checks the public arguments. run: the function.
        direct: takes the public arguments and makes the call; a backend may know repeated ones without their checks.
    """

    def __init__(self, make: Callable[..., Call], run: Callable[[Call], Tensor]) -> None:
        functools.update_wrapper(self, run)
        self.make, self.run = make, run
        self.direct: Callable[..., Tensor] = lambda *args, **options: run(make(*args, **options))

    def __call__(self, *args: Any, **options: Any) -> Tensor:
        """Checks the arguments, as the public operation of this name does, and runs the call."""
        return self.direct(*args, **options)


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
        read: floating-point tensors on the device of ``out``, and their second moments or scales.
        out: ``[places.layout.size + tail]``, contiguous, float32 or float64.
        places: where each tensor goes.
        tail: elements of ``out`` after the layout's, which become 0.
        scale: a number or a 0-dim tensor on the device.
        accumulate: whether ``out`` is added to.
        per_tensor: whether each tensor has its own row of moments.
        into: what the moments are added to, ``[2]`` or ``[n, 2]``; None for a new tensor.
    """

    read: Elements
    out: Tensor
    places: Places
    tail: int
    scale: Tensor | float
    accumulate: bool
    per_tensor: bool
    into: Tensor | None

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
    block_scales: Any = None,
) -> SketchCall:
    """Checks the arguments of :func:`gac_kernels.sketch`. Raises its errors."""
    if not isinstance(out, Tensor) or out.dim() != 1 or not out.is_contiguous():
        raise ValueError("out must be a contiguous 1-D tensor")
    if out.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"out must be float32 or float64, got {out.dtype}")
    device = out.device
    read = elements(tensors, device, "out", second_moments, eps, block_scales)
    numels, size, tail = read.numels, out.numel(), 0
    if layout is None:
        if regions is not None or starts is not None:
            raise ValueError("regions and starts need a layout: pass layout=SketchLayout.per_tensor(...)")
        places = _end_to_end(numels, size, seed)
        tail = 0 if accumulate else size - places.layout.size
    else:
        if size != layout.size:
            raise ValueError(f"out has {size} elements, the layout needs {layout.size}: torch.zeros(layout.size)")
        places = places_of(layout, len(numels), numbers(regions), numbers(starts))
        if numels != places.room and not all(map(operator.le, numels, places.room)):
            name_the_long_one(numels, places)
    if read.scaled:
        check_starts(places.starts, read)
    if into is not None:
        check_into(into, (len(numels), 2) if per_tensor else (2,), device)
    scale = 1.0 if scale is None else check_scalar(scale, "scale", device)
    return SketchCall(read, out, places, tail, scale, bool(accumulate), bool(per_tensor), into)


def check_starts(starts: Sequence[int], read: Elements) -> None:
    """Raises unless scaled tensors begin with a block of their region."""
    for k, start in enumerate(starts):
        if start % BLOCK and read.seconds is not None and read.seconds.tensors[k].numel():
            raise ValueError(f"tensors[{k}] has block scales and starts at {start}: it must be a multiple of {BLOCK}")


def numbers(values: Any) -> tuple[int, ...] | None:
    """Regions or starts as a key; None stays."""
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
def places_of(
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


def name_the_long_one(numels: Sequence[int], places: Places) -> None:
    """Raises for the first tensor that has no room in its region."""
    for k, (numel, room, region, start) in enumerate(
        zip(numels, places.room, places.regions, places.starts, strict=True)
    ):
        if numel > room:
            raise ValueError(
                f"tensors[{k}] covers elements {start} to {start + numel} of region {region}, "
                f"which has {places.layout.numels[region]}"
            )


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

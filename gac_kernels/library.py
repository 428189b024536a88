"""The operations as PyTorch operators ``torch.ops.gac_kernels.*``: schema, fake, implementation.

Each operator has one implementation for all devices, which gives the checked call to the backend that eager calls would
get. A layout travels as its numbers. Gradients do not flow through any of them.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from gac_kernels.arguments import accumulator_dtype
from gac_kernels.backends import implementation, runner
from gac_kernels.calls import sketch_call, token_call
from gac_kernels.kronecker import kronecker_call
from gac_kernels.layout import LANES, SketchLayout
from gac_kernels.totals import absorb_call, absorb_sketch_call, accumulate_call

_library = torch.library.Library("gac_kernels", "DEF")


def readable(tensors: Any) -> Any:
    """``tensors`` as something that can be read twice; what is no list at all is left for the checks to name."""
    if isinstance(tensors, (Tensor, list)):
        return tensors
    return list(tensors) if hasattr(tensors, "__iter__") else tensors


def listed(tensors: Any) -> Any:
    """The same in the form of a schema: a single tensor as a list of one."""
    return [tensors] if isinstance(tensors, Tensor) else readable(tensors)


def _operator(schema: str, fake: Any) -> Any:
    """Registers the decorated implementation and its fake under ``schema``."""

    def register(implementation: Any) -> Any:
        name = schema.split("(", 1)[0]
        _library.define(schema, tags=torch.Tag.pt2_compliant_tag)
        _library.impl(name, implementation, "CompositeExplicitAutograd")
        torch.library.register_fake(f"gac_kernels::{name}", fake, lib=_library)
        operator = getattr(torch.ops.gac_kernels, name).default

        @functools.wraps(implementation)
        def without_gradient(*args: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                return operator(*args)

        _library.impl(name, without_gradient, "Autograd")
        return implementation

    return register


def _sums(tensors: list[Tensor], columns: int, per_tensor: bool) -> Tensor:
    """An empty result of the shape and dtype that the reductions return."""
    device = tensors[0].device if tensors else torch.device("cpu")
    shape = (len(tensors), columns) if per_tensor else (columns,)
    return torch.empty(shape, dtype=accumulator_dtype(device), device=device)


def _function(name: str, tensors: list[Tensor]) -> Any:
    return implementation(name, tensors[0].device.type if tensors else "cpu")


def scalar_parts(value: Any) -> tuple[Tensor | None, float]:
    """A scalar argument in the form of a schema: a tensor, or a number."""
    return (value, 1.0) if isinstance(value, Tensor) else (None, 1.0 if value is None else float(value))


@_operator("moments(Tensor[] tensors, bool per_tensor) -> Tensor", lambda tensors, per: _sums(tensors, 2, per))
def _moments(tensors: Any, per_tensor: bool) -> Any:
    return _function("moments", tensors)(tensors, per_tensor=per_tensor)


_PLACES = "int[]? numels, int rows_per_slab, int lanes, int[]? regions, int[]? starts, int seed"
_OPTIONS = "Tensor? scale, float factor, bool accumulate, bool per_tensor, Tensor[]? second_moments, float eps"


def place_arguments(layout: SketchLayout | None, regions: Any, starts: Any, seed: int) -> tuple:
    """Where tensors go, in the form of the schema `_PLACES`."""
    numbers = (None, 0, 0) if layout is None else (list(layout.numels), layout.rows_per_slab, layout.lanes)
    listed = [None if values is None else list(values) for values in (regions, starts)]
    return (*numbers, *listed, (seed if layout is None else layout.seed) & 0xFFFFFFFF)


def _fake_sketch(tensors: Any, out: Tensor, *arguments: Any) -> Any:
    *_, per_tensor, _second_moments, _eps = arguments
    shape = (len(tensors), 2) if per_tensor else (2,)
    return torch.empty(shape, dtype=accumulator_dtype(out.device), device=out.device)


@_operator(f"sketch(Tensor[] tensors, Tensor(a!) out, {_PLACES}, {_OPTIONS}) -> Tensor", _fake_sketch)
def _sketch(tensors: Any, out: Tensor, *arguments: Any) -> Tensor:
    return _run_sketch(tensors, out, None, *arguments)


@_operator(
    f"sketch_into_(Tensor[] tensors, Tensor(a!) out, Tensor(b!) into, {_PLACES}, {_OPTIONS}) -> ()",
    lambda *arguments: None,
)
def _sketch_into_(tensors: Any, out: Tensor, into: Tensor, *arguments: Any) -> None:
    _run_sketch(tensors, out, into, *arguments)


def _run_sketch(tensors: Any, out: Tensor, into: Tensor | None, *arguments: Any) -> Tensor:
    """Runs what the two schemas describe."""
    numels, rows_per_slab, lanes, regions, starts, seed, scale, factor, *rest = arguments
    accumulate, per_tensor, second_moments, eps = rest
    call = sketch_call(
        tensors,
        out,
        layout=None if numels is None else SketchLayout(tuple(numels), rows_per_slab, seed, lanes),
        regions=regions,
        starts=starts,
        seed=seed,
        scale=factor if scale is None else scale,
        accumulate=accumulate,
        per_tensor=per_tensor,
        into=into,
        second_moments=second_moments,
        eps=eps,
    )
    return runner("sketch", out.device.type)(call)


_SUMMED = f"{_PLACES}, Tensor? scale, float factor, bool per_tensor, Tensor[]? second_moments, float eps"


@_operator(
    f"accumulate_(Tensor[] tensors, Tensor(a!) total, Tensor(b!)? previous, {_SUMMED}) -> Tensor",
    lambda tensors, total, *arguments: _sums([total], 2, False).new_empty((len(tensors), 2) if arguments[-3] else 2),
)
def _accumulate_(tensors: Any, total: Tensor, previous: Any, *arguments: Any) -> Tensor:
    return _run_accumulate(tensors, total, previous, None, *arguments)


@_operator(
    f"accumulate_into_(Tensor[] tensors, Tensor(a!) total, Tensor(b!)? previous, Tensor(c!) into, {_SUMMED}) -> ()",
    lambda *arguments: None,
)
def _accumulate_into_(tensors: Any, total: Tensor, previous: Any, into: Tensor, *arguments: Any) -> None:
    _run_accumulate(tensors, total, previous, into, *arguments)


def _run_accumulate(tensors: Any, total: Tensor, previous: Any, into: Any, *arguments: Any) -> Tensor:
    """Runs what the two schemas describe."""
    numels, rows_per_slab, lanes, regions, starts, seed, scale, factor, per_tensor, second_moments, eps = arguments
    call = accumulate_call(
        tensors,
        total,
        layout=None if numels is None else SketchLayout(tuple(numels), rows_per_slab, seed, lanes),
        regions=regions,
        starts=starts,
        previous=previous,
        scale=factor if scale is None else scale,
        per_tensor=per_tensor,
        into=into,
        second_moments=second_moments,
        eps=eps,
    )
    return runner("accumulate_", total.device.type)(call)


@_operator(
    "pair_moments(Tensor[] a, Tensor[] b, bool per_tensor) -> Tensor", lambda a, b, per_tensor: _sums(a, 3, per_tensor)
)
def _pair_moments(a: Any, b: Any, per_tensor: bool) -> Any:
    return _function("pair_moments", a)(a, b, per_tensor=per_tensor)


@_operator("mix_(Tensor(a!)[] a, Tensor[] b, Tensor? mu, float weight) -> ()", lambda a, b, mu, weight: None)
def _mix_(a: Any, b: Any, mu: Any, weight: Any) -> None:
    _function("mix_", a)(a, b, weight if mu is None else mu)


@_operator(
    "mix_moments_(Tensor(a!)[] a, Tensor[] b, Tensor? mu, float weight) -> Tensor",
    lambda a, b, mu, weight: _sums(a, 3, False),
)
def _mix_moments_(a: Any, b: Any, mu: Any, weight: Any) -> Any:
    return _function("mix_", a)(a, b, weight if mu is None else mu, moments=True)


@_operator(
    "token_moments(Tensor logprobs, Tensor advantages, Tensor mask, Tensor is_expert) -> Tensor",
    lambda logprobs, advantages, mask, is_expert: _sums([logprobs], 7, False).new_empty(logprobs.shape[0], 7),
)
def _token_moments(logprobs: Tensor, advantages: Tensor, mask: Tensor, is_expert: Tensor) -> Any:
    return runner("token_moments", logprobs.device.type)(token_call(logprobs, advantages, mask, is_expert))


@_operator(
    "absorb_(Tensor current, Tensor(a!)? previous, Tensor(b!) total, Tensor? scale, float factor) -> Tensor",
    lambda current, previous, total, scale, factor: _sums([current], 1, False).new_empty(-(-current.numel() // LANES)),
)
def _absorb_(current: Tensor, previous: Any, total: Tensor, scale: Any, factor: Any) -> Any:
    return _run_absorb(current, previous, total, None, scale, factor)


@_operator(
    "absorb_into_(Tensor current, Tensor(a!)? previous, Tensor(b!) total, Tensor(c!) into, Tensor? scale, "
    "float factor) -> ()",
    lambda *arguments: None,
)
def _absorb_into_(current: Tensor, previous: Any, total: Tensor, into: Any, scale: Any, factor: Any) -> None:
    _run_absorb(current, previous, total, into, scale, factor)


def _run_absorb(current: Tensor, previous: Any, total: Tensor, into: Any, scale: Any, factor: Any) -> Tensor:
    """Runs what the two schemas describe."""
    call = absorb_call(current, previous, total, factor if scale is None else scale, into=into)
    return runner("absorb_", current.device.type)(call)


_ABSORBED = (
    "int[] numels, int rows_per_slab, int lanes, int[]? regions, int seed, Tensor? scale, float factor, "
    "Tensor[]? second_moments, float eps"
)


def _fake_absorb_sketch(tensors: Any, previous: Tensor, total: Tensor, *arguments: Any) -> Tensor:
    numels, rows_per_slab, lanes, *_ = arguments
    return _sums([previous], 1, False).new_empty(2 + SketchLayout(tuple(numels), rows_per_slab, 0, lanes).cells)


@_operator(
    f"absorb_sketch_(Tensor[] tensors, Tensor(a!) previous, Tensor(b!) total, {_ABSORBED}) -> Tensor",
    _fake_absorb_sketch,
)
def _absorb_sketch_(tensors: Any, previous: Tensor, total: Tensor, *arguments: Any) -> Tensor:
    return _run_absorb_sketch(tensors, previous, total, None, *arguments)


@_operator(
    f"absorb_sketch_into_(Tensor[] tensors, Tensor(a!) previous, Tensor(b!) total, Tensor(c!) into, {_ABSORBED}) -> ()",
    lambda *arguments: None,
)
def _absorb_sketch_into_(tensors: Any, previous: Tensor, total: Tensor, into: Tensor, *arguments: Any) -> None:
    _run_absorb_sketch(tensors, previous, total, into, *arguments)


def _run_absorb_sketch(tensors: Any, previous: Tensor, total: Tensor, into: Any, *arguments: Any) -> Tensor:
    """Runs what the two schemas describe."""
    numels, rows_per_slab, lanes, regions, seed, scale, factor, second_moments, eps = arguments
    layout = SketchLayout(tuple(numels), rows_per_slab, seed, lanes)
    options = {"layout": layout, "regions": regions, "into": into, "second_moments": second_moments, "eps": eps}
    call = absorb_sketch_call(tensors, previous, total, factor if scale is None else scale, **options)
    return runner("absorb_sketch_", previous.device.type)(call)


@_operator(
    "kronecker_sketch_(Tensor left, Tensor right, Tensor(a!) out, Tensor bounds, Tensor keys, int? size, int? longest, "
    "bool ones, float scale) -> ()",
    lambda *arguments: None,
)
def _kronecker_sketch_(
    left: Tensor,
    right: Tensor,
    out: Tensor,
    bounds: Tensor,
    keys: Tensor,
    size: Any,
    longest: Any,
    ones: Any,
    scale: Any,
) -> None:
    call = kronecker_call(
        left, right, out, bounds=bounds, keys=keys, size=size, longest=longest, ones=ones, scale=scale
    )
    runner("kronecker_sketch", out.device.type)(call)

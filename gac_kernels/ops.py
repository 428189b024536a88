"""The public operations: pick the backend by device and call it.

On CUDA and HIP devices Triton serves, on the CPU the C++ library, and the pure-torch reference wherever those are
missing. ``GAC_BACKEND=reference``, ``cpu`` or ``triton`` in the environment forces one; it is read at the first call.

Eager calls go straight to the backend. Under ``torch.compile``, and while a dispatch mode such as ``FakeTensorMode``
is active, they go through the operators ``torch.ops.gac_kernels.*`` that :mod:`gac_kernels.library` registers.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from gac_kernels import reference
from gac_kernels.layout import SketchLayout

__all__ = ["absorb_", "backend_status", "mix_", "moments", "pair_moments", "sketch", "token_moments"]

_VARIABLE = "GAC_BACKEND"
_OLDEST_TRITON = (3, 3)


class _Unavailable(Exception):
    """Why a backend cannot serve."""


def _triton_backend() -> ModuleType:
    if importlib.util.find_spec("triton") is None:
        raise _Unavailable("triton is not installed: pip install triton")
    try:
        import triton
    except Exception as error:  # a broken installation must not take the package down
        raise _Unavailable(f"importing triton failed: {type(error).__name__}: {error}") from error
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version < _OLDEST_TRITON:
        oldest = ".".join(map(str, _OLDEST_TRITON))
        raise _Unavailable(f"triton {triton.__version__} is too old: version {oldest} or later is needed")
    return importlib.import_module("gac_kernels.triton")


def _cpu_backend() -> ModuleType:
    cpu = importlib.import_module("gac_kernels.cpu")
    if not cpu.available():
        raise _Unavailable(str(cpu.status()))
    return cpu


def _reference_backend() -> ModuleType:
    return reference


_BACKENDS = {"reference": _reference_backend, "cpu": _cpu_backend, "triton": _triton_backend}
_BY_DEVICE = {"cuda": "triton", "cpu": "cpu"}


@functools.cache
def _select(device_type: str) -> tuple[ModuleType, str, str]:
    """The backend that serves a device type, its name, and why."""
    forced = os.environ.get(_VARIABLE)
    if forced:
        if forced not in _BACKENDS:
            raise ValueError(f"{_VARIABLE} is {forced!r}: use one of {', '.join(_BACKENDS)}, or unset it")
        try:
            return _BACKENDS[forced](), forced, f"{_VARIABLE}={forced}"
        except _Unavailable as error:
            raise RuntimeError(f"{_VARIABLE}={forced}, but that backend cannot serve: {error}") from error
    name = _BY_DEVICE.get(device_type)
    if name is None:
        return reference, "reference", f"no fast backend for {device_type} devices"
    try:
        return _BACKENDS[name](), name, "available"
    except _Unavailable as error:
        return reference, "reference", str(error)


@functools.cache
def _implementation(name: str, device_type: str) -> Callable:
    """The function behind operation ``name`` on a device type; what a backend does not offer, the reference does."""
    return getattr(_select(device_type)[0], name, None) or getattr(reference, name)


@functools.cache
def _cpu_mix() -> Callable:
    """``_implementation`` for the call that has a peer of one microsecond: without arguments it costs half."""
    return _implementation("mix_", "cpu")


_is_compiling = torch.compiler.is_compiling
_active_modes = torch._C._len_torch_dispatch_stack


def _traced() -> bool:
    """True when a call must be visible to the dispatcher: while compiling, or under a dispatch mode."""
    return _is_compiling() or _active_modes() > 0


def _readable(tensors: Any) -> Any:
    """``tensors`` as something that can be read twice; what is no list at all is left for the checks to name."""
    if isinstance(tensors, (Tensor, list)):
        return tensors
    return list(tensors) if hasattr(tensors, "__iter__") else tensors


def _listed(tensors: Any) -> Any:
    """The same in the form of a schema: a single tensor as a list of one."""
    return [tensors] if isinstance(tensors, Tensor) else _readable(tensors)


def _device_type(tensors: Any) -> str:
    first = tensors[0] if isinstance(tensors, list) and tensors else tensors
    if not isinstance(first, Tensor) or first.is_cpu:
        return "cpu"
    return first.device.type


def _scalar_parts(value: Any) -> tuple[Tensor | None, float]:
    """A scalar argument in the form of a schema: a tensor, or a number."""
    return (value, 1.0) if isinstance(value, Tensor) else (None, 1.0 if value is None else float(value))


def moments(tensors: Any, *, per_tensor: bool = False) -> Tensor:
    """Sum of squares and number of non-finite elements; see :func:`gac_kernels.reference.moments`."""
    if _traced():
        return torch.ops.gac_kernels.moments(_listed(tensors), per_tensor)
    if type(tensors) is Tensor and tensors.is_cpu:
        return _implementation("moments", "cpu")(tensors, per_tensor=per_tensor)
    tensors = _readable(tensors)
    return _implementation("moments", _device_type(tensors))(tensors, per_tensor=per_tensor)


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
    """A random projection into ``out``, and the moments of the same read; see :func:`gac_kernels.reference.sketch`."""
    if _traced():
        tensors = _listed(tensors)
        numels = None if layout is None else list(layout.numels)
        rows, lanes = (0, 0) if layout is None else (layout.rows_per_slab, layout.lanes)
        seed = (seed if layout is None else layout.seed) & 0xFFFFFFFF
        regions = None if regions is None else list(regions)
        starts = None if starts is None else list(starts)
        second_moments = None if second_moments is None else _listed(second_moments)
        rest = (numels, rows, lanes, regions, starts, seed, *_scalar_parts(scale), accumulate, per_tensor)
        rest += (second_moments, eps)
        if into is None:
            return torch.ops.gac_kernels.sketch(tensors, out, *rest)
        torch.ops.gac_kernels.sketch_into_(tensors, out, into, *rest)
        return into
    return _implementation("sketch", _device_type(out))(
        _readable(tensors),
        out,
        layout=layout,
        regions=regions,
        starts=starts,
        seed=seed,
        scale=scale,
        accumulate=accumulate,
        per_tensor=per_tensor,
        into=into,
        second_moments=_readable(second_moments),
        eps=eps,
    )


def pair_moments(a: Any, b: Any, *, per_tensor: bool = False) -> Tensor:
    """``|a|^2``, ``|b|^2`` and ``<a, b>``; see :func:`gac_kernels.reference.pair_moments`."""
    if _traced():
        return torch.ops.gac_kernels.pair_moments(_listed(a), _listed(b), per_tensor)
    if type(a) is Tensor and a.is_cpu and type(b) is Tensor:
        return _implementation("pair_moments", "cpu")(a, b, per_tensor=per_tensor)
    a, b = _readable(a), _readable(b)
    return _implementation("pair_moments", _device_type(a))(a, b, per_tensor=per_tensor)


def mix_(a: Any, b: Any, mu: Tensor | float, *, moments: bool = False) -> Tensor | None:
    """``a <- mu * a + (1 - mu) * b`` in place; see :func:`gac_kernels.reference.mix_`."""
    if _is_compiling() or _active_modes():  # `_traced`, less a call
        operator = torch.ops.gac_kernels.mix_moments_ if moments else torch.ops.gac_kernels.mix_
        return operator(_listed(a), _listed(b), *_scalar_parts(mu))
    if type(a) is Tensor and a.is_cpu and type(b) is Tensor:
        return _cpu_mix()(a, b, mu, moments=moments)
    a, b = _readable(a), _readable(b)
    return _implementation("mix_", _device_type(a))(a, b, mu, moments=moments)


def token_moments(logprobs: Tensor, advantages: Tensor, mask: Tensor, is_expert: Tensor) -> Tensor:
    """Per-sequence sums of the coefficient estimators; see :func:`gac_kernels.reference.token_moments`."""
    if _traced():
        return torch.ops.gac_kernels.token_moments(logprobs, advantages, mask, is_expert)
    return _implementation("token_moments", _device_type(logprobs))(logprobs, advantages, mask, is_expert)


def absorb_(
    current: Tensor,
    previous: Tensor | None,
    total: Tensor,
    scale: Tensor | float,
    *,
    into: Tensor | None = None,
) -> Tensor:
    """Takes the newest contribution out of a running sketch; see :func:`gac_kernels.reference.absorb_`."""
    if _traced():
        if into is None:
            return torch.ops.gac_kernels.absorb_(current, previous, total, *_scalar_parts(scale))
        torch.ops.gac_kernels.absorb_into_(current, previous, total, into, *_scalar_parts(scale))
        return into
    return _implementation("absorb_", _device_type(current))(current, previous, total, scale, into=into)


def backend_status() -> dict[str, str]:
    """Which backend serves each kind of device and why: what a bug report needs.

    Returns:
        Lines of text for ``cpu``, ``cuda`` (serving backend and reason), ``triton`` (version) and ``cpu_library``.
    """
    status = {}
    for device_type in ("cpu", "cuda"):
        try:
            _, name, reason = _select(device_type)
            status[device_type] = f"{name} ({reason})"
        except (RuntimeError, ValueError) as error:
            status[device_type] = f"none ({error})"
    if not torch.cuda.is_available():
        status["cuda"] = f"no device; would be {status['cuda']}"
    try:
        import triton

        status["triton"] = triton.__version__
    except Exception as error:
        status["triton"] = f"not usable ({type(error).__name__}: {error})"
    status["cpu_library"] = str(importlib.import_module("gac_kernels.cpu").status())
    return status

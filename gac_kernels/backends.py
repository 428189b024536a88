"""Which backend serves a device.

On CUDA and HIP devices Triton serves, on the CPU the C++ library, or the fallback where it is missing; the reference
serves everywhere else.
``GAC_BACKEND=reference``, ``fallback``, ``cpu`` or ``triton`` in the environment forces one; it is read at the first
call.
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

from gac_kernels import fallback, reference

VARIABLE = "GAC_BACKEND"
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
    importlib.import_module(".cpu", __package__).available()  # its pass over lists serves on GPUs, too
    return importlib.import_module(".triton", __package__)


def _cpu_backend() -> ModuleType:
    cpu = importlib.import_module(".cpu", __package__)
    if not cpu.available():
        raise _Unavailable(str(cpu.status()))
    return cpu


_BACKENDS: dict[str, Callable[[], ModuleType]] = {
    "reference": lambda: reference,
    "fallback": lambda: fallback,
    "cpu": _cpu_backend,
    "triton": _triton_backend,
}
_BY_DEVICE = {"cuda": "triton", "cpu": "cpu"}


@functools.cache
def select(device_type: str) -> tuple[ModuleType, str, str]:
    """The backend that serves a device type, its name, and why.

    Raises:
        ValueError: the variable names no backend. RuntimeError: the one that it names cannot serve.
    """
    forced = os.environ.get(VARIABLE)
    if forced:
        if forced not in _BACKENDS:
            raise ValueError(f"{VARIABLE} is {forced!r}: use one of {', '.join(_BACKENDS)}, or unset it")
        try:
            return _BACKENDS[forced](), forced, f"{VARIABLE}={forced}"
        except _Unavailable as error:
            raise RuntimeError(f"{VARIABLE}={forced}, but that backend cannot serve: {error}") from error
    name = _BY_DEVICE.get(device_type)
    if name is None:
        return reference, "reference", f"no fast backend for {device_type} devices"
    try:
        return _BACKENDS[name](), name, "available"
    except _Unavailable as error:
        module = fallback if device_type == "cpu" else reference
        return module, module.__name__.rpartition(".")[2], str(error)


@functools.cache
def implementation(name: str, device_type: str) -> Any:
    """The function behind operation ``name`` on a device type."""
    return getattr(select(device_type)[0], name)


@functools.cache
def runner(name: str, device_type: str) -> Callable[[Any], Tensor]:
    """The same for an operation that has a checked call: the function of that call."""
    return implementation(name, device_type).run


def forget() -> None:
    """Chooses anew at the next call."""
    for function in (select, implementation, runner):
        function.cache_clear()


def status() -> dict[str, str]:
    """Which backend serves each kind of device and why: what a bug report needs.

    Returns:
        Lines of text for ``cpu``, ``cuda`` (serving backend and reason), ``triton`` (version) and ``cpu_library``.
    """
    found = {}
    for device_type in ("cpu", "cuda"):
        try:
            _, name, reason = select(device_type)
            found[device_type] = f"{name} ({reason})"
        except (RuntimeError, ValueError) as error:
            found[device_type] = f"none ({error})"
    if not torch.cuda.is_available():
        found["cuda"] = f"no device; would be {found['cuda']}"
    try:
        import triton

        found["triton"] = triton.__version__
    except Exception as error:
        found["triton"] = f"not usable ({type(error).__name__}: {error})"
    found["cpu_library"] = str(importlib.import_module(".cpu", __package__).status())
    return found

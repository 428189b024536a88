"""Launching: one place where every kernel starts, so that tests can count launches or record their arguments.

A launch through Triton's own interface finds the compiled kernel by the kind of every argument, each time anew, which
costs 10 to 20 us of host time. What repeats has a :class:`Slot`: it keeps the compiled kernel of the first launch, and
the launches after it go to that kernel's launcher directly. The launcher is no public interface of Triton: slots are
filled with the versions that were read and tested, and with others every launch is an ordinary one.
"""

from __future__ import annotations

import contextlib
import struct
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime import JITFunction

from gac_kernels.triton import config, kernels
from gac_kernels.triton.tables import current_stream

WIDTH = 1024
"""Elements of one vector operation of a program."""

PREPARED_VERSIONS = ((3, 4), (3, 9))
"""Oldest and newest Triton whose launchers are called directly."""


def interpreted() -> bool:
    """True when kernels run in Triton's interpreter (TRITON_INTERPRET=1 when this package was first used)."""
    return not isinstance(kernels.moments_kernel, JITFunction)


def check_device(device: torch.device) -> None:
    """Raises ValueError unless a Triton kernel can run on tensors of ``device``."""
    if device.type != "cuda" and not interpreted():
        raise ValueError(
            f"tensors are on {device}, but Triton kernels need a GPU: use gac_kernels.* to have the backend picked by "
            "device, or set TRITON_INTERPRET=1 before the first use"
        )


def _runtime_knobs() -> Any:
    """Triton's switches, where there may be hooks that want to see each launch; None where slots are not filled."""
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    oldest, newest = PREPARED_VERSIONS
    knobs = getattr(triton, "knobs", None)
    return getattr(knobs, "runtime", None) if oldest <= version <= newest else None


class Slot:
    """A place for the compiled kernel of launches that repeat.

    All of them have the same kernel, constants and device, and arguments of one kind each: None where it was None, of
    one dtype, its address a multiple of 16 where it was one, numbers equal where Triton specialises on their value.
    """

    __slots__ = ("bound",)

    def __init__(self) -> None:
        self.bound: tuple[Any, Any, Any, tuple] | None = None

    def fill(self, kernel: Any, compiled: Any, count: int, constants: dict[str, Any]) -> None:
        """Keeps what an ordinary launch of ``kernel`` with ``count`` arguments and ``constants`` has compiled."""
        if _KNOBS is None or tuple(kernel.arg_names[count:]) != tuple(constants) or kernel.pre_run_hooks:
            return
        with contextlib.suppress(AttributeError):  # a compiled kernel unlike those that are known
            self.bound = compiled.run, compiled.function, compiled.packed_metadata, tuple(constants.values())


_KNOBS = _runtime_knobs()


def watched() -> bool:
    """Whether somebody wants to see every launch: a profiler does."""
    enter, leave = _KNOBS.launch_enter_hook, _KNOBS.launch_exit_hook
    return bool(getattr(enter, "calls", enter)) or bool(getattr(leave, "calls", leave))


def _on(device: torch.device) -> Any:
    """Makes ``device`` the current one for a launch."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)


def launch(
    kernel: Any, grid: tuple[int, ...], device: torch.device, *args: Any, slot: Slot | None = None, **constants: Any
) -> None:
    """Starts ``kernel`` on the current stream of ``device``; a grid without programs starts nothing.

    Contraction to fused multiply-add is asked for by name, because its default differs between Triton versions.
    """
    if 0 in grid:
        return
    if slot is not None and slot.bound is not None and not watched():
        run, function, metadata, values = slot.bound
        x, y = grid if len(grid) > 1 else (grid[0], 1)
        with _on(device):
            run(x, y, 1, current_stream(device), function, metadata, None, None, None, *args, *values)
        return
    with _on(device):
        compiled = kernel[grid](*args, **constants, num_warps=config.for_device(device).warps, enable_fp_fusion=True)
    if slot is not None and compiled is not None:
        slot.fill(kernel, compiled, len(args), constants)


def split(value: float) -> tuple[float, float]:
    """A number as the sum of two float32: kernels take float arguments no wider than that."""
    high = struct.unpack("f", struct.pack("f", value))[0] if abs(value) <= 3.4028234e38 else value
    low = value - high if abs(high) < float("inf") else 0.0
    return high, low


def scalar_arguments(value: Tensor | float) -> tuple[Tensor | None, float, float]:
    """A checked scalar as kernel arguments: a pointer, or two float32 parts."""
    if isinstance(value, Tensor):
        return value, 0.0, 0.0
    if value == 1.0:  # what is usual costs nothing
        return None, 1.0, 0.0
    return (None, *split(value))


def kind(value: Tensor | float | None) -> Any:
    """What Triton's compiler sees of an argument that may be a tensor: what slots are told apart by."""
    return (value.dtype, value.data_ptr() % 16 == 0) if isinstance(value, Tensor) else None

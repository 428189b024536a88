"""Launching: one place where every kernel starts, so that tests can count launches or record their arguments."""

from __future__ import annotations

import contextlib
import struct
from typing import Any

import torch
from torch import Tensor
from triton.runtime import JITFunction

from gac_kernels.triton import config, kernels

WIDTH = 1024
"""Elements of one vector operation of a program."""


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


def launch(kernel: Any, grid: tuple[int, ...], device: torch.device, *args: Any, **constants: Any) -> None:
    """Starts ``kernel`` on the current stream of ``device``; a grid without programs starts nothing.

    Contraction to fused multiply-add is asked for by name, because its default differs between Triton versions.
    """
    if 0 in grid:
        return
    guard = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with guard:
        kernel[grid](*args, **constants, num_warps=config.for_device(device).warps, enable_fp_fusion=True)


def split(value: float) -> tuple[float, float]:
    """A number as the sum of two float32: kernels take float arguments no wider than that."""
    high = struct.unpack("f", struct.pack("f", value))[0] if abs(value) <= 3.4028234e38 else value
    low = value - high if abs(high) < float("inf") else 0.0
    return high, low


def scalar_arguments(value: Tensor | float) -> tuple[Tensor | None, float, float]:
    """A checked scalar as kernel arguments: a pointer, or two float32 parts."""
    if isinstance(value, Tensor):
        return value, 0.0, 0.0
    return (None, *split(value))

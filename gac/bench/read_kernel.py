"""The plainest Triton kernel that reads a buffer: the yardstick on a GPU. Importing needs Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 4096
_STEPS = 8


@triton.jit
def _read_kernel(source, out, numel, BLOCK: tl.constexpr, STEPS: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * (BLOCK * STEPS)
    lane = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    if first + BLOCK * STEPS <= numel:
        for step in tl.static_range(STEPS):
            total += tl.load(source + (first + step * BLOCK) + lane).to(tl.float32)
    else:
        for step in tl.static_range(STEPS):
            index = first + step * BLOCK + lane
            total += tl.load(source + index, mask=index < numel, other=0.0).to(tl.float32)
    tl.store(out + tl.program_id(0), tl.sum(total, axis=0))


def read(flat: Tensor) -> Tensor:
    """Sums of pieces of ``flat`` (1-D, contiguous), float32."""
    pieces = triton.cdiv(flat.numel(), _BLOCK * _STEPS)
    out = torch.empty(pieces, dtype=torch.float32, device=flat.device)
    _read_kernel[(pieces,)](flat, out, flat.numel(), BLOCK=_BLOCK, STEPS=_STEPS, num_warps=4)
    return out

"""Input buffers: lists of tensors carved out of flat pools, as many sets of them as it takes to leave the cache."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gac.bench.timing import cache_bytes

_ALIGN = 128  # elements: every tensor starts at 256 bytes or more, as an allocator would place it
_MOST_SETS = 16384
_BLOCK = 1 << 20


def free_bytes(device: torch.device) -> int:
    """Memory that can be taken now, in bytes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return 4 << 30


@dataclass
class Lists:
    """Input sets of one operand.

    Attributes:
        tensors: for each set its list of tensors.
        flat: for each set the stretch of memory that holds them.
    """

    tensors: list[list[Tensor]]
    flat: list[Tensor]


class Pools:
    """Flat buffers of normal numbers, kept from case to case while the size stays the same.

    Args:
        device: where they live.
        cold: make enough sets to exceed the cache four times (CPU); otherwise one set, and the timer empties the cache.
    """

    def __init__(self, device: torch.device, *, cold: bool) -> None:
        self.device = device
        self._pool_bytes = 4 * cache_bytes(device) if cold else 0
        self._kept: dict[str, Tensor] = {}

    def sets(self, bytes_per_set: int) -> int:
        """Input sets that a case of this size needs."""
        return max(1, min(_MOST_SETS, self._pool_bytes // max(1, bytes_per_set)))

    def lists(self, operand: str, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, sets: int) -> Lists:
        """``sets`` lists of tensors of these shapes. What an operand of that name held before is given up."""
        numels = [math.prod(shape) for shape in shapes]
        offsets, stride = [], 0
        for numel in numels:
            offsets.append(stride)
            stride += -(-numel // _ALIGN) * _ALIGN
        pool, reused = self._pool(operand, stride * sets, dtype)
        flat = [pool[k * stride : (k + 1) * stride] for k in range(sets)]
        if reused:  # an earlier case may have written to it, and a gate on equal or zero operands sees nothing
            fill(flat[0], seed=_seed(operand))
        tensors = [
            [whole[o : o + n].view(shape) for o, n, shape in zip(offsets, numels, shapes, strict=True)]
            for whole in flat
        ]
        return Lists(tensors, flat)

    def _pool(self, operand: str, numel: int, dtype: torch.dtype) -> tuple[Tensor, bool]:
        pool = self._kept.get(operand)
        if pool is not None and pool.dtype == dtype and pool.numel() == numel:
            return pool, True
        self._kept.pop(operand, None)
        del pool
        pool = torch.empty(numel, dtype=dtype, device=self.device)
        fill(pool, seed=_seed(operand))
        self._kept[operand] = pool
        return pool, False

    def clear(self) -> None:
        """Gives all memory back, to the device too: pieces of what was are of no use to a case of another size."""
        self._kept.clear()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def _seed(operand: str) -> int:
    return sum(operand.encode())


def fill(flat: Tensor, *, seed: int) -> None:
    """Normal numbers, one block of them over and over: quick, and the values do not matter to speed."""
    generator = torch.Generator().manual_seed(seed)
    block = torch.randn(min(_BLOCK, max(1, flat.numel())), generator=generator).to(flat.device, flat.dtype)
    whole = flat.numel() // block.numel() * block.numel()
    flat[:whole].view(-1, block.numel()).copy_(block.expand(whole // block.numel(), -1))
    flat[whole:].copy_(block[: flat.numel() - whole])

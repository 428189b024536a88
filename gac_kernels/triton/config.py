"""Launch configurations: fixed, nothing is tuned at run time.

The kernels are limited by memory, so a configuration only has to keep enough bytes in flight: on an H100 about 3.35
TB/s x 700 ns = 2.3 MB, or 18 KB on each of 132 SMs. A program of 4 warps with 4 rows of 1,024 bf16 elements has 8 KB
in flight, and 8 programs or more share an SM. Measured on an H100 (docs/kernels.md): more rows at once gain
nothing, and 8 cost the sketch 5% to 10%: its 80 registers then leave room for fewer programs than 57. Eight warps are
as good for most kernels, but a row of 16-bit elements is then shared by half of them, and the pair kernel's sums over
rows cross warps through shared memory: 3 to 10 times slower.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

CHUNK = 65_536
"""Most elements of each list that one program of ``moments``, ``pair_moments``, ``mix_`` and ``accumulate_`` reads."""

_LEAST_CHUNK = 4096
_PROGRAMS = 512
"""That a list is cut into before its chunks grow: four for each SM of an H100, of which two keep its memory busy."""


def chunk_of(elements: int) -> int:
    """Elements of one chunk of a list of ``elements``: a power of two that depends on nothing but the sizes."""
    chunk = _LEAST_CHUNK
    while chunk < CHUNK and elements // chunk > _PROGRAMS:
        chunk *= 2
    return min(chunk, CHUNK)


COLUMN_BLOCK = 1024
"""Lanes of one ``sketch`` program; wider rows are split."""


@dataclass(frozen=True)
class LaunchConfig:
    """How the kernels are launched.

    Attributes:
        warps: warps of a program.
        unroll: vectors of 1,024 elements that a program asks for before it waits, when it reads one list.
        pair_unroll: the same for each of two lists.
        finish_width: buckets of one program of the sketch's second stage.
    """

    warps: int
    unroll: int
    pair_unroll: int
    finish_width: int = 128


_GPU = LaunchConfig(warps=4, unroll=4, pair_unroll=2)
_INTERPRETER = LaunchConfig(warps=4, unroll=2, pair_unroll=2, finish_width=1024)


def for_device(device: torch.device) -> LaunchConfig:
    """The configuration for tensors on ``device``: a GPU, or the CPU under the interpreter."""
    return _GPU if device.type == "cuda" else _INTERPRETER

"""What a list of tensors needs before its kernels start: an order by dtype, and its tables on the device."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from gac_kernels.triton.tables import Chunks, device_tables


def indexed(device: torch.device) -> torch.device:
    """``device`` with its index, so that equal devices have equal keys."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def reordered(items: Sequence, order: Sequence[int]) -> Sequence:
    """``items`` in ``order``; themselves where nothing moves."""
    return items if isinstance(order, range) else [items[k] for k in order]


@lru_cache(maxsize=256)
def row_count(numels: tuple[int, ...], lanes: int) -> int:
    """Rows of all tensors."""
    return sum(-(-n // lanes) for n in numels)


def by_dtype(kinds: list) -> tuple[Sequence[int], list[tuple[object, int]]]:
    """A stable order that brings equal kinds together, and the (kind, length) of each run."""
    if len(set(kinds)) == 1:
        return range(len(kinds)), [(kinds[0], len(kinds))]
    groups: dict[object, list[int]] = {}
    for k, kind in enumerate(kinds):
        groups.setdefault(kind, []).append(k)
    order = [k for members in groups.values() for k in members]
    return order, [(kind, len(members)) for kind, members in groups.items()]


def row_ranges(
    plan: Chunks, order: Sequence[int], columns: int, per_tensor: bool, device: torch.device
) -> tuple[Tensor, int]:
    """The chunk range of each row of the result: a row for each tensor, or one for all."""
    if not per_tensor:
        whole = lambda: torch.tensor([[0, plan.count * columns]])
        return device_tables.get(("whole", plan.count * columns), device, whole), 1

    def build() -> Tensor:
        table = torch.empty_like(plan.ranges)
        table[torch.tensor(order, dtype=torch.int64)] = plan.ranges * columns
        return table

    return device_tables.get(("ranges", plan, tuple(order), columns), device, build), len(order)


def chunk_table(plan: Chunks, device: torch.device) -> Tensor:
    """The plan's chunks on the device."""
    return device_tables.get(("chunks", plan), device, lambda: plan.table)


def accumulator(*dtypes: torch.dtype) -> Any:
    """The kernels' type for sums within a chunk."""
    return tl.float64 if torch.float64 in dtypes else tl.float32


def ends(plan: Chunks) -> list[tuple[int, int]]:
    """First chunk and number of chunks of each dtype group."""
    starts = (0, *plan.group_ends)
    return [(a, b - a) for a, b in zip(starts, plan.group_ends, strict=False)]

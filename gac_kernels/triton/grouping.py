"""What a list of tensors needs before its kernels start: an order by dtype, and its tables on the device.

Training repeats a few calls: what follows from sizes and types alone is kept as a :class:`Plan`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, Generic, TypeVar

import torch
import triton.language as tl
from torch import Tensor

from gac_kernels.arguments import TensorList
from gac_kernels.elements import Elements
from gac_kernels.triton.launch import Slot
from gac_kernels.triton.readable import READABLE, SCALES, dtypes_of, in_order, is_known
from gac_kernels.triton.tables import Addresses, Chunks, device_tables, is_capturing


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


def by_dtype(kinds: list) -> tuple[Sequence[int], list[tuple[Any, int]]]:
    """A stable order that brings equal kinds together, and the (kind, length) of each run."""
    if len(set(kinds)) == 1:
        return range(len(kinds)), [(kinds[0], len(kinds))]
    groups: dict[Any, list[int]] = {}
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


Readable = tuple[Sequence[Tensor], Any, bytes | None]


def readable(listed: TensorList) -> Readable:
    """A list as kernels can read it: tensors, their dtype (or dtypes, where they differ), and numbers, if known."""
    if listed.numbers is not None or (listed.plain and is_known(listed.dtypes)):
        return listed.tensors, dtypes_of(listed.tensors, listed.dtypes), listed.numbers
    tensors = in_order(listed.tensors)
    return tensors, dtypes_of(tensors), None


def readable_seconds(read: Elements) -> Readable | None:
    """The same of second moments or scales; a tensor without scales has no dtype there."""
    if read.seconds is None:
        return None
    if not read.scaled:
        return readable(read.seconds)
    scales = read.seconds.tensors
    return scales, tuple(SCALES if s.numel() else None for s in scales), None


def element_types(pair: tuple) -> dict[str, Any]:
    """Kernels' constants for elements of a dtype beside second moments of a dtype, scales or nothing."""
    scaled = pair[1] is SCALES
    second = None if pair[1] is None else tl.uint8 if scaled else READABLE[pair[1]]
    return {"ELEMENT": READABLE[pair[0]], "SECOND": second, "SCALED": scaled, "ACC": accumulator(*pair)}


class Plan:
    """What calls of one kind on one stream have in common.

    Args:
        count: tensors of a list.
        dtypes: of each tensor, or of all.
        second_dtypes: the same of their second moments, or ``SCALES``; None where there are none.
        device: with its index.

    Attributes:
        order: of the tensors, by dtype.
        groups: the pairs of dtypes, and how many tensors have them.
        wide: whether any is float64.
        weighted: whether there are second moments or scales.
        slots: of the kernel that reads the list, one for each group.
    """

    def __init__(self, count: int, dtypes: Any, second_dtypes: Any, device: torch.device) -> None:
        pairs = [x if isinstance(x, tuple) else (x,) * count for x in (dtypes, second_dtypes)]
        self.device = device
        self.order, self.groups = by_dtype(list(zip(*pairs, strict=True)))
        self.sizes = tuple(size for _, size in self.groups)
        self.wide = any(torch.float64 in pair for pair, _ in self.groups)
        self.weighted = second_dtypes is not None
        self.slots = [Slot() for _ in self.groups]
        self._by_kind: dict[Any, list[Slot]] = {}
        self._where, self._second_where = Addresses(device), Addresses(device)

    def slots_of(self, kind: Any) -> list[Slot]:
        """Slots for launches whose other arguments are of a kind: one for each group, and one more."""
        found = self._by_kind.get(kind)
        if found is None:
            found = self._by_kind[kind] = [Slot() for _ in range(len(self.groups) + 1)]
        return found

    def where(self, tensors: Readable, seconds: Readable | None) -> tuple[Tensor, Tensor | None]:
        """The address tables of the tensors and of their second moments."""
        second = None if seconds is None else self._second_where.of(*self._ordered(seconds))
        return self._where.of(*self._ordered(tensors)), second

    def _ordered(self, tensors: Readable) -> tuple[Sequence[Tensor], bytes | None]:
        if isinstance(self.order, range):
            return tensors[0], tensors[2]
        return reordered(tensors[0], self.order), None

    def keep(self, *tables: Tensor | None) -> None:
        """Keeps tables for a CUDA graph, while one is captured."""
        if is_capturing(self.device):
            device_tables.keep(*tables)


Kept = TypeVar("Kept", bound=Plan)


class Plans(Generic[Kept]):
    """The plans of an operation, by all that they depend on."""

    MOST = 256

    def __init__(self) -> None:
        self._plans: dict[tuple, Kept] = {}

    def get(self, key: tuple, make: Callable[[], Kept]) -> Kept:
        """The plan of ``key``, made by ``make`` where it is not there yet."""
        plan = self._plans.pop(key, None)
        if plan is None:
            plan = make()
            if len(self._plans) >= self.MOST:
                del self._plans[next(iter(self._plans))]  # least recently used
        self._plans[key] = plan
        return plan

    def clear(self) -> None:
        """Forgets all."""
        self._plans.clear()

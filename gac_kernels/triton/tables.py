"""Tables that tell the kernels what to read, and their cache on the device.

Two kinds: *chunk tables* follow from sizes and layouts alone, so a training run builds each of them once; *address
tables* change with the allocations. Both are found again through a key of plain numbers.

A table is filled in pinned host memory and copied without blocking. The pinned block is handed back to torch's caching
host allocator, which holds it until the copy's event has passed, so it is never rewritten under a copy in flight. Keys
contain the stream: on another stream nothing says that the copy is over.
"""

from __future__ import annotations

import struct
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from gac_kernels.layout import SketchLayout, sign_key

_CAPACITY = 512


class DeviceTables:
    """The most recently used int64 tables, on their devices."""

    def __init__(self, capacity: int = _CAPACITY) -> None:
        self._tables: OrderedDict[Hashable, Tensor] = OrderedDict()
        self._capacity = capacity
        self._captured: list[Tensor] = []

    def get(self, key: Hashable, device: torch.device, build: Callable[[], Tensor]) -> Tensor:
        """The table of ``key``, built by ``build`` (a host tensor) and copied when it is not there yet.

        Raises:
            RuntimeError: a CUDA graph is being captured and the table is not there. A copy inside the graph would read
                the host block again at every replay, long after it was given to someone else.
        """
        full_key = (key, device, current_stream(device))
        table = self._tables.get(full_key)
        if table is not None:
            self._tables.move_to_end(full_key)
        elif is_capturing(device):
            # Capture synchronizes before it begins, so a table of any stream is complete.
            table = next((t for (k, d, _), t in self._tables.items() if d == device and k == key), None)
            if table is None:
                raise RuntimeError(
                    "a CUDA graph is being captured, and these tensors have not been seen before: make the same call "
                    "with the same tensors once before the capture"
                )
        else:
            table = self._tables[full_key] = to_device(build(), device)
            if len(self._tables) > self._capacity:
                self._tables.popitem(last=False)
        if is_capturing(device):
            self._captured.append(table)  # the graph keeps its address
        return table

    def keep(self, *tables: Tensor | None) -> None:
        """Keeps tables whose addresses a CUDA graph takes down."""
        self._captured.extend(table for table in tables if table is not None)

    def clear(self) -> None:
        self._tables.clear()

    def __len__(self) -> int:
        return len(self._tables)


device_tables = DeviceTables()


def current_stream(device: torch.device) -> int:
    """The handle of the stream that kernels for ``device`` are launched on; 0 on the host."""
    return torch._C._cuda_getCurrentRawStream(device.index) if device.type == "cuda" else 0


def is_capturing(device: torch.device) -> bool:
    """True while the current stream of ``device`` records a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def to_device(table: Tensor, device: torch.device) -> Tensor:
    """A host table on ``device``, without waiting for the copy."""
    if device.type != "cuda":
        return table
    pinned = torch.empty(table.shape, dtype=table.dtype, pin_memory=True)
    pinned.copy_(table)
    return pinned.to(device, non_blocking=True)


def addresses(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """``[n]`` int64 on ``device``: where the tensors' first elements lie."""
    return _address_table(tuple(map(Tensor.data_ptr, tensors)), device)


def _address_table(pointers: tuple[int, ...], device: torch.device) -> Tensor:
    return device_tables.get(("addresses", pointers), device, lambda: torch.tensor(pointers, dtype=torch.int64))


class Addresses:
    """The address table of calls that repeat on one stream: uploaded when the addresses change."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pointers: tuple[int, ...] | bytes | None = None
        self._table: Tensor | None = None

    def of(self, tensors: Sequence[Tensor], numbers: bytes | None = None) -> Tensor:
        """As :func:`addresses`. ``numbers`` begins with the addresses, where somebody knows them."""
        pointers = tuple(map(Tensor.data_ptr, tensors)) if numbers is None else numbers[: 8 * len(tensors)]
        if self._table is None or pointers != self._pointers or is_capturing(self._device):
            if isinstance(pointers, bytes):
                table = _address_table(struct.unpack(f"{len(tensors)}q", pointers), self._device)
            else:
                table = _address_table(pointers, self._device)
            self._pointers, self._table = pointers, table
        return self._table


@dataclass(frozen=True, eq=False)
class Chunks:
    """Chunks of a list of tensors, on the host.

    Attributes:
        table: ``[chunks, columns]`` int64, what each program reads.
        ranges: ``[n, 2]`` int64, the chunks of each tensor.
        count: number of chunks.
        group_ends: chunks up to the end of each group of equal dtypes.
    """

    table: Tensor
    ranges: Tensor
    count: int
    group_ends: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class SketchChunks(Chunks):
    """Chunks of a sketch, each within one slab.

    Attributes:
        slabs: ``[slabs, 5]`` int64: first bucket, buckets, the range of slots, and first cell (0 beyond the layout), of
            each slab to be written.
    """

    slabs: Tensor


def _ranges(counts: Tensor) -> Tensor:
    """``[begin, end)`` of consecutive runs of the given lengths."""
    ends = counts.cumsum(0)
    return torch.stack([ends - counts, ends], dim=1)


def _within(counts: Tensor) -> tuple[Tensor, Tensor]:
    """For runs of the given lengths laid end to end: which run each item is in, and its place there."""
    run = torch.repeat_interleave(torch.arange(len(counts)), counts)
    return run, torch.arange(len(run)) - (counts.cumsum(0) - counts)[run]


def _group_ends(counts: Tensor, group_sizes: tuple[int, ...]) -> tuple[int, ...]:
    ends = [0, *counts.cumsum(0).tolist()]
    total, result = 0, []
    for size in group_sizes:
        total += size
        result.append(ends[total])
    return tuple(result)


@lru_cache(maxsize=256)
def flat_chunks(numels: tuple[int, ...], group_sizes: tuple[int, ...], chunk: int) -> Chunks:
    """Tensors of ``numels`` elements cut into chunks of ``chunk``; rows are tensor, begin, count.

    ``group_sizes`` says how many consecutive tensors share a dtype.
    """
    sizes = torch.tensor(numels, dtype=torch.int64)
    counts = (sizes + (chunk - 1)) // chunk
    tensor, place = _within(counts)
    begin = place * chunk
    count = (sizes[tensor] - begin).clamp(max=chunk)
    table = torch.stack([tensor, begin, count], dim=1)
    return Chunks(table, _ranges(counts), len(table), _group_ends(counts, group_sizes))


def _slabs_of(layout: SketchLayout, region: int, first: int, last: int) -> Tensor:
    """``[last - first, 3]``: first bucket, number of buckets and first cell of some slabs of a region."""
    slab = torch.arange(first, last)
    begin = slab * layout.lanes
    count = (layout.region_size(layout.numels[region]) - begin).clamp(max=layout.lanes)
    cell = slab * layout.cells_of_slab + layout.cell_offsets[region]
    return torch.stack([begin + layout.bucket_offsets[region], count, cell], dim=1)


@lru_cache(maxsize=256)
def sketch_chunks(
    numels: tuple[int, ...],
    group_sizes: tuple[int, ...],
    layout: SketchLayout,
    regions: tuple[int, ...],
    starts: tuple[int, ...],
    chunk_rows: int,
    accumulate: bool,
    tail: int,
) -> SketchChunks:
    """Pieces cut at slab boundaries and every ``chunk_rows`` rows within a slab.

    Rows of the table are: tensor; element offset from the tensor's address to the start of the chunk's first row (may
    be negative); first and last element that exist, counted from there; low half of the first row's sign word; slot;
    and the keys of that word's high half and of the next. ``accumulate`` lists only slabs that receive something;
    otherwise all slabs of the regions named, and ``tail`` buckets after the layout's, which become 0.
    """
    lanes, rows_per_slab = layout.lanes, layout.rows_per_slab
    sizes = torch.tensor(numels, dtype=torch.int64)
    begins = torch.tensor(starts, dtype=torch.int64)
    ends = begins + sizes

    # Tensors into their parts within a slab, then the parts into chunks of rows.
    slab_size = lanes * rows_per_slab
    first_slab = begins // slab_size
    slab_counts = torch.where(sizes > 0, (ends - 1) // slab_size - first_slab + 1, 0)
    tensor, place = _within(slab_counts)
    slab = first_slab[tensor] + place
    first_row = torch.maximum(begins[tensor] // lanes, slab * rows_per_slab)
    last_row = torch.minimum((ends[tensor] + (lanes - 1)) // lanes, (slab + 1) * rows_per_slab)
    counts = (last_row - first_row + (chunk_rows - 1)) // chunk_rows
    part, place = _within(counts)
    tensor, slab = tensor[part], slab[part]
    row = first_row[part] + place * chunk_rows
    end_row = torch.minimum(row + chunk_rows, last_row[part])

    origin = row * lanes
    begin = (begins[tensor] - origin).clamp(min=0)
    end = torch.minimum(ends[tensor], end_row * lanes) - origin
    region = torch.tensor(regions, dtype=torch.int64)[tensor]
    index_offsets = torch.tensor([layout.index_offsets[r] for r in regions], dtype=torch.int64)
    word = (index_offsets[tensor] + origin) // 32
    high = word >> 32
    keys = torch.zeros(len(word), 2, dtype=torch.int64)
    for value in torch.unique(high).tolist():
        keys[high == value] = torch.tensor([sign_key(layout.seed, value), sign_key(layout.seed, value + 1)])

    # Slots in the order of slabs, and within a slab in the order of the list.
    bucket_offsets = torch.tensor([layout.bucket_offsets[r] for r in regions], dtype=torch.int64)
    bucket = bucket_offsets[tensor] + slab * lanes
    order = torch.argsort(bucket, stable=True)
    slot = torch.empty_like(order)
    slot[order] = torch.arange(len(order))
    table = torch.stack([tensor, origin - begins[tensor], begin, end, word & 0xFFFFFFFF, slot, *keys.unbind(1)], dim=1)

    if accumulate:
        key = torch.unique(torch.stack([region, slab], dim=1), dim=0)
        parts = [_slabs_of(layout, r, s, s + 1) for r, s in key.tolist()]
    else:
        parts = [
            _slabs_of(layout, r, 0, -(-layout.region_size(layout.numels[r]) // lanes)) for r in sorted(set(regions))
        ]
        first = torch.arange(0, tail, lanes)
        parts.append(
            torch.stack([first + layout.size, (tail - first).clamp(max=lanes), torch.zeros_like(first)], dim=1)
        )
    targets = torch.cat(parts) if parts else torch.zeros(0, 3, dtype=torch.int64)
    in_order = bucket[order]
    first_slot = torch.searchsorted(in_order, targets[:, 0].contiguous())
    last_slot = torch.searchsorted(in_order, targets[:, 0].contiguous(), right=True)
    slabs = torch.stack([targets[:, 0], targets[:, 1], first_slot, last_slot, targets[:, 2]], dim=1)

    chunk_counts = torch.bincount(tensor, minlength=len(numels))
    return SketchChunks(table, _ranges(chunk_counts), len(table), _group_ends(chunk_counts, group_sizes), slabs=slabs)

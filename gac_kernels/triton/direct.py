"""Repeated calls of ``sketch`` and ``absorb_sketch_``, straight to their two launches.

Where the host is what a step waits for, checks and plans of a call that was made before cost more than its launches.
One pass in C over everything that a call is given (:func:`gac_kernels.arguments.describe`) answers what the checks ask:
types, one device, contiguity, dtypes, elements, addresses. A call that agrees in all but addresses with one that was
checked is right, too, and needs the launches of that one. Addresses go into the tables, or to the launch.

Everything else goes the checked way: other types, lists with several dtypes, moments of each tensor, scales of blocks,
vectors at addresses that are no multiple of 16, CUDA graphs, another current device, and profilers that watch launches.
"""

from __future__ import annotations

import struct
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gac_kernels import arguments
from gac_kernels import layout as layouts
from gac_kernels.triton import launch
from gac_kernels.triton.grouping import ends
from gac_kernels.triton.launch import scalar_arguments
from gac_kernels.triton.tables import is_capturing

_raw_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)


class Seen(NamedTuple):
    """What one pass over a call's tensors has told: a key of calls like it, and addresses of tensors and vectors."""

    key: tuple
    addresses: bytes
    tensors: list
    seconds: list | None
    stream: int


def seen(tensors: Any, seconds: Any, vectors: list, options: tuple) -> Seen | None:
    """A call, as it came. None where it has to be checked.

    Args:
        tensors, seconds: the arguments of these names.
        vectors: what it writes, ``[m]`` tensors, and its scale where that is one.
        options: everything else, hashable.
    """
    if type(tensors) is not list or (seconds is not None and type(seconds) is not list):
        return None
    tensors = tensors.copy()  # before it is looked at: another thread may change the caller's
    everything = tensors + vectors if seconds is None else tensors + seconds + vectors
    numbers = arguments.describe(everything)
    if numbers is None or vectors[0].dim() != 1 or vectors[1].dim() > 1:
        return None
    index = vectors[0].get_device()
    stream = _raw_stream(index) if index >= 0 and _raw_stream else 0
    cut = 8 + 8 * len(everything)
    key = (numbers[cut:], len(tensors), seconds is None, index, stream, layouts.SKETCH_CHUNK_ROWS, options)
    return Seen(key, numbers[8:cut], tensors, seconds, stream)


def _aligned(addresses: bytes, vectors: int) -> bool:
    return all(a % 16 == 0 for a in struct.unpack_from(f"{vectors}q", addresses, len(addresses) - 8 * vectors))


class Repeated:
    """The launches of calls that differ in addresses alone.

    Args:
        plan: theirs; lists of one dtype.
        eps: as kernels take it.
        finish: what the second kernel's slot is filled with. programs: of the second kernel.
        one: a call of them. vectors: how many it has.
    """

    def __init__(self, plan: Any, eps: tuple, finish: Any, programs: int, one: Seen, vectors: int) -> None:
        self.plan, self._vectors = plan, vectors
        total = plan.chunks.count * plan.blocks
        lanes = plan.chunks.count * plan.lanes * (8 if plan.wide else 4)  # bytes, a multiple of 16
        self._offset, self._room = lanes, lanes // 8 + 2 * total
        ((first, chunks),), (slot,) = ends(plan.chunks), plan.slots
        self._run, *kernel, values = slot.bound
        self._start = (*kernel, None, None, None)
        self._grid, self._rest = (chunks, plan.blocks, 1), (total, *eps, *values)
        self._first = first
        self._finish, *kernel, self._finish_values = finish
        self._finish_start = (*kernel, None, None, None)
        self._programs, self._total = programs, total
        self._addresses = b""
        self._where: Any = None
        self._on(one)

    def _on(self, one: Seen) -> bool:
        """Takes the addresses of a call, where vectors lie as those do that the kernels were compiled for."""
        if one.addresses == self._addresses:
            return True
        if not _aligned(one.addresses, self._vectors):
            return False
        count = len(one.tensors)
        seconds = None if one.seconds is None else (one.seconds, None, one.addresses[8 * count :])
        self._where = self.plan.where((one.tensors, None, one.addresses), seconds)
        self._addresses = one.addresses
        return True

    def ready(self, one: Seen) -> bool:
        """Whether a call can go this way now."""
        device = self.plan.device
        if device.type == "cuda" and (device.index != torch.cuda.current_device() or is_capturing(device)):
            return False
        return not launch.watched() and self._on(one)

    def run(self, one: Seen, written: tuple, scale: Tensor | float, result: Tensor, last: tuple) -> None:
        """Starts both kernels.

        Args:
            one: the call.
            written: tensors that the second kernel takes before the scale. result: where moments go.
            last: arguments of the second kernel after those that both second kernels share.
        """
        plan, stream, grid = self.plan, one.stream, self._grid
        workspace = torch.empty(self._room, dtype=torch.float64, device=plan.device)
        sums = workspace.data_ptr() + self._offset
        self._run(*grid, stream, *self._start, *self._where, plan.table, self._first, workspace, sums, *self._rest)
        self._finish(
            self._programs, 1, 1, stream, *self._finish_start, workspace, plan.slabs, *written,
            *scalar_arguments(scale), sums, self._total, plan.ranges, result, *last, *self._finish_values,
        )  # fmt: skip


_MOST = 256


def remembered(
    kept: dict[tuple, Repeated], plan: Any, eps: tuple, finish: launch.Slot, programs: int, one: Seen, vectors: int
) -> None:
    """Keeps the launches of a call that has just been made the checked way, where all is there that they need."""
    bound = isinstance(plan.order, range) and plan.chunks.count and finish.bound and all(s.bound for s in plan.slots)
    if bound and _aligned(one.addresses, vectors) and not is_capturing(plan.device):
        if len(kept) >= _MOST:
            del kept[next(iter(kept))]
        kept[one.key] = Repeated(plan, eps, finish.bound, programs, one, vectors)


def listed(values: Any) -> tuple | None:
    """Regions or starts as part of a key."""
    return None if values is None else tuple(values)

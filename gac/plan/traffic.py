"""Bytes, calls and launches of measuring: by the objects that a training run would use, built of fake tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from gac.observe.ledger import Ledger
from gac.observe.pending import bucket_bytes
from gac.plan.device import Device
from gac.plan.parameters import Parameters
from gac.statistics.branch import Branch
from gac_kernels.layout import LANES, SketchLayout, sketch_chunk_rows

HOOK_SECONDS = 2.5e-6
"""Host time of the hook of one parameter in one backward pass; measured, benchmarks/results/cpu.json, host/hook."""

TENSOR_SECONDS = 1.4e-6
"""Host time of one tensor of a kernel call's list; measured, docs/kernels.md."""

LAUNCH_SECONDS = 10e-6
"""Host time of one kernel launch; the range seen for Triton is 6 to 30 us."""

STEP_OPERATIONS = 215
"""Small tensor operations of one ``mixer.step()`` that ends in torch; counted by the tests. For law ``gac``, whose
steps end in one piece, this is an upper bound: nobody has timed that on a GPU yet."""

OPERATION_SECONDS = 7e-6
"""Host time of one of them; measured, 1.3 ms a step on the CPU of cpu.json."""

REPLICA_NUMBERS, SHARD_NUMBERS = 10, 7
"""Numbers in the message of replicas, beside both branches' sketches, and of shards, beside two a contribution."""

SKETCH_LAUNCHES, ABSORB_LAUNCHES = 2, 1
"""Kernels of one call on gradients of one dtype, whichever operation reads them, and of ``absorb_``."""


def buckets(numels: Sequence[int], itemsize: int, *, sharded: bool, running: bool) -> list[list[int]]:
    """Parameters (by index) of each kernel call of a backward pass, which reaches the last parameter first."""
    if running:  # a ledger reads them when the pass is over
        return [list(reversed(range(len(numels))))] if numels else []
    full = bucket_bytes(sharded=sharded, running=running)
    found: list[list[int]] = [[]]
    pending = 0
    for index in reversed(range(len(numels))):
        found[-1].append(index)
        pending += numels[index] * itemsize
        if pending >= full:
            found.append([])
            pending = 0
    return [bucket for bucket in found if bucket]


def workspace_bytes(numels: Sequence[int], layout: SketchLayout) -> int:
    """Bytes that the two stages of one sketch call on a GPU write and read between them."""
    rows = [-(-n // LANES) for n in numels]
    slab = layout.rows_per_slab
    chunk = sketch_chunk_rows(sum(rows), LANES, slab)
    chunks = sum(r // slab * -(-slab // chunk) + -(-(r % slab) // chunk) for r in rows)
    return 2 * 4 * LANES * chunks


def ledger_after(numels: Sequence[int], *, lossless: bool, running: bool, contributions: int) -> Ledger:
    """A ledger of fake tensors, without memory, that has seen so many contributions: its sums grow with them."""
    with FakeTensorMode(), torch.device("cpu"):
        ledger = Ledger(numels, torch.device("cpu"), lossless=lossless, running=running)
        scale = torch.ones(())
        for _ in range(contributions):
            ledger.begin()
            ledger.end(Branch.SFT, scale)
    return ledger


def kernel_bytes(local: Parameters, calls: list[list[int]], ledger: Ledger, device: Device) -> int:
    """What one backward pass's kernels move besides the gradients that they read."""
    size = ledger.layout.size
    if ledger.lossless:  # added to the branch's total, and to what running sums were
        return (2 + 2 * ledger.running) * 4 * size
    between = 0
    if not device.synchronous:  # the CPU library adds up in cache
        between = sum(workspace_bytes([local.numels[k] for k in bucket], ledger.layout) for bucket in calls)
    if ledger.running:  # the total and what was there before, read and written
        return between + 4 * 4 * size
    return between + 4 * size + 3 * 4 * size  # written; then read, and added to the total

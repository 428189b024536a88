"""What the real code does while nothing is computed or sent."""

from __future__ import annotations

import pytest
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

import gac.observe.ledger

READING = ("sketch", "accumulate_", "absorb_sketch_")
"""The operations that read gradients."""


@pytest.fixture
def recorded(monkeypatch):
    """Calls of the kernels by the ledgers: ``(operation, bytes of the gradients or of the vectors)``; nothing runs."""
    calls = []

    def reading(operation):
        def read(tensors, out, *others, **options):
            both = [*tensors, *(options.get("second_moments") or ())]
            calls.append((operation, sum(t.numel() * t.element_size() for t in both)))

        return read

    def absorb_(current, previous, total, scale, **options):
        calls.append(("absorb_", sum(t.nbytes for t in (current, previous, total) if t is not None)))

    for operation in READING:
        monkeypatch.setattr(gac.observe.ledger, operation, reading(operation))
    monkeypatch.setattr(gac.observe.ledger, "absorb_", absorb_)
    # planned are GPUs, where every contribution goes through these
    monkeypatch.setattr(gac.observe.ledger.Adding, "__call__", lambda *a, **k: False)
    return calls


@pytest.fixture
def ranks(request):
    """A process group that sends nothing, with this process as its first rank."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=request.param)
    yield request.param
    dist.destroy_process_group()

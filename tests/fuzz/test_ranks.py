"""The fuzzer on two ranks: a few draws with gradients that stay on the ranks, and a fault that they show."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path

import pytest
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from gac.observe.observer import Observer
from tests.fuzz.drawing import drawn
from tests.fuzz.ranks import WORLD, judge
from tests.gac.distributed.processes import on_ranks

pytestmark = pytest.mark.timeout(120)

SEED, DRAWS = 20_000, 8


def _without_sync() -> list[int]:
    """Draws of DDP in which some pass does not synchronise."""
    found = (n for n in range(200) if any(not p.sync for s in drawn(SEED, n, engine="ddp").steps for p in s.passes))
    return [number for number, _ in zip(found, range(DRAWS), strict=False)]


def _passes_without_sync_unseen() -> None:
    """Contributions whose gradients stay on the rank are given up."""
    real_no_sync, real_finish, synced = DistributedDataParallel.no_sync, Observer.finish, [True]

    @contextmanager
    def no_sync(self):
        synced[0] = False
        try:
            with real_no_sync(self):
                yield
        finally:
            synced[0] = True

    def finish(self, *, note=True):
        if not synced[0]:
            self._drop()
        real_finish(self, note=note)

    DistributedDataParallel.no_sync, Observer.finish = no_sync, finish


def _work(rank: int, world: int, numbers: list[int]) -> dict[str, list[str | None]]:
    found = {"as it is": [judge(drawn(SEED, number, engine="ddp"), rank) for number in numbers]}
    dist.barrier()
    _passes_without_sync_unseen()
    found["planted"] = [judge(drawn(SEED, number, engine="ddp"), rank) for number in numbers]
    return found


def test_passes_without_sync(tmp_path: Path):
    found = on_ranks(WORLD, tmp_path, _work, _without_sync(), preload="tests.fuzz.ranks", seconds=100)
    for rank in found:
        assert rank["as it is"] == [None] * DRAWS
        assert any(what is not None and "has to be" in what for what in rank["planted"])

"""Engines on a GPU: collectives on streams of their own, gradients that are still on their way when a hook runs.

NCCL takes one rank a device, so sharding runs with a single rank there; two ranks that share the device use gloo.
"""

from __future__ import annotations

import traceback

import pytest
import torch

from tests.gac.distributed import cases, engines
from tests.gac.distributed.processes import on_ranks
from tests.gac.distributed.test_engines import agreed, assert_agree

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(300),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

DEVICE = "cuda"

WIDTH = 256
"""Of the model: large enough for a kernel that starts too early to read what is not there yet."""

REPLICAS = {
    "ddp": engines.ddp(),
    "ddp, no_sync": engines.ddp(no_sync=True),
    "ddp, gradient_as_bucket_view": engines.ddp(no_sync=True, gradient_as_bucket_view=True),
}
SHARDS = {
    "fsdp2": engines.fsdp(),
    "fsdp2, cpu offload": engines.fsdp(offload=True),
}


def on_the_gpu(rank: int, world: int, names: list[str], device: str) -> dict:
    engines.DEVICE = device
    found = {}
    for name in names:
        for estimator in cases.ESTIMATORS:
            try:
                found[f"{name}, {estimator}"] = (REPLICAS | SHARDS)[name](rank, world, width=WIDTH, estimator=estimator)
            except Exception:
                found[f"{name}, {estimator}"] = {"error": traceback.format_exc()}
    return found


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[int, list[dict]]:
    return {
        world: on_ranks(
            world, tmp_path_factory.mktemp("ranks"), on_the_gpu, names, DEVICE,
            preload=cases.__name__, backend=backend, seconds=120,
        )
        for world, backend, names in (
            (1, "cpu:gloo,cuda:nccl", [*REPLICAS, *SHARDS]),
            (2, "gloo", [*REPLICAS]),
        )
    }  # fmt: skip


@pytest.fixture
def alone(monkeypatch):
    """The same steps without an engine, in this process."""
    monkeypatch.setattr(engines, "DEVICE", DEVICE)

    def run(world: int, estimator: str) -> dict:
        model = engines.new_model(width=WIDTH)
        return engines.alone(world, together=False, model=model, estimator=estimator)

    return run


@pytest.mark.parametrize("estimator", cases.ESTIMATORS)
@pytest.mark.parametrize("engine", [*REPLICAS, *SHARDS])
def test_one_rank_equals_no_engine(results, alone, engine, estimator):
    assert_agree(agreed(results[1], f"{engine}, {estimator}"), alone(1, estimator))


@pytest.mark.parametrize("estimator", cases.ESTIMATORS)
@pytest.mark.parametrize("engine", REPLICAS)
def test_two_ranks_equal_one_process(results, alone, engine, estimator):
    assert_agree(agreed(results[2], f"{engine}, {estimator}"), alone(2, estimator))

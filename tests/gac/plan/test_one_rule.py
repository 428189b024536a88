"""Rules that a run and its plan share are changed in one place, and both follow."""

from __future__ import annotations

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import gac
from gac import plan
from gac.bench import prediction
from gac.plan import DEVICES, Parameters, Setup, make_plan
from gac.plan.shapes import MODELS
from gac_kernels.layout import LANES, SketchLayout
from tests.gac.plan.conftest import READING
from tests.gac.plan.models import Listed, parameters_of

H100 = DEVICES["h100"]


def test_the_plan_follows_the_mixers_own_rules(monkeypatch):
    """Which estimator and how it reads is decided in one place; the plan asks there."""
    model = Listed([(300, 70), (500,)], torch.float32)
    setup = Setup(parameters_of(model), H100, dtype="fp32")
    chosen = []
    for limit in (32 * 2**20, 0):
        monkeypatch.setattr("gac.observe.choice.EXACT_BYTES", limit)
        monkeypatch.setattr("gac.observe.choice.EXACT_SHARE", 0.0)
        with gac.patch(model) as mixer:
            chosen.append((mixer.estimator, setup.chosen_estimator(), make_plan(setup).estimator))
    assert chosen == [("exact",) * 3, ("sketch",) * 3]


@pytest.mark.parametrize("ranks", [4], indirect=True)
def test_the_limit_of_replicas_is_one(ranks, monkeypatch):
    """Under DDP the exact estimator keeps two float32 vectors, which travel."""
    model = Listed([(300, 70), (500,)])
    setup = Setup(parameters_of(model), H100, ranks=ranks, dtype="fp32")
    chosen = []
    for limit in (8 * parameters_of(model).total, 8 * parameters_of(model).total - 1):
        monkeypatch.setattr("gac.observe.choice.EXACT_BYTES_REDUCED", limit)
        with gac.patch(model) as mixer:
            chosen.append((mixer.estimator, setup.chosen_estimator()))
    assert chosen == [("exact",) * 2, ("sketch",) * 2]


@pytest.mark.parametrize("ranks", [4], indirect=True)
def test_the_limit_of_shards_is_one(ranks, monkeypatch):
    """Shards are read as running sums, so the exact estimator keeps four vectors of them."""
    model = Listed([(400, 70), (800,)])
    setup = Setup(parameters_of(model), H100, ranks=ranks, sharding="fsdp", dtype="fp32")
    local = setup.on_this_rank(setup.observed).total
    fully_shard(model, mesh=init_device_mesh("cpu", (ranks,)))
    monkeypatch.setattr("gac.observe.choice.EXACT_SHARE", 0.0)
    chosen = []
    for limit in (16 * local, 16 * local - 1):
        monkeypatch.setattr("gac.observe.choice.EXACT_BYTES", limit)
        with gac.patch(model) as mixer:
            chosen.append((mixer.estimator, setup.chosen_estimator()))
    assert chosen == [("exact",) * 2, ("sketch",) * 2]


@pytest.mark.parametrize("ranks", [1, 4], indirect=True)
def test_the_size_of_buckets_is_one(ranks, recorded, monkeypatch):
    model = Listed(MODELS["10M"].shapes())
    setup = Setup(Parameters.of("10M"), H100, ranks=ranks, estimator="sketch", dtype="fp32")
    calls = []
    for size in (2**30, 2**22):
        for name in ("RUNNING_BUCKET_BYTES", "BUCKET_BYTES"):
            monkeypatch.setattr(f"gac.observe.pending.{name}", size)
        recorded.clear()
        model.zero_grad()
        with gac.patch(model, estimator="sketch") as mixer, mixer.sft():
            mixer.backward(model())
        reads = sum(operation in READING for operation, _ in recorded)
        calls.append((reads, make_plan(setup).calls_per_backward))
    assert calls[0] == (1, 1)
    assert calls[1][0] == calls[1][1]
    assert calls[1][0] > 5 if ranks > 1 else calls[1][0] == 1  # running sums are read when the pass is over


def test_the_size_of_a_sketch_is_one(monkeypatch):
    model = Listed([(3000, 70), (500,)])
    setup = Setup(parameters_of(model), H100, estimator="sketch", dtype="fp32")
    operations = {}
    for smallest in (65_536, 4096):
        monkeypatch.setattr("gac.observe.ledger.SMALLEST_SKETCH", smallest)
        with gac.patch(model, estimator="sketch") as mixer:
            assert mixer._observer.ledgers[0].layout.size == make_plan(setup).sketch_size
        operations[smallest] = {row["operation"]: row["bytes"] for row in prediction.operations("0.1B")}
    monkeypatch.setattr("gac.observe.ledger.ELEMENTS_PER_BUCKET", 256)
    finer = {row["operation"]: row["bytes"] for row in prediction.operations("0.1B")}
    assert finer["sketch"] > operations[4096]["sketch"]
    assert finer["moments"] == operations[4096]["moments"]


@pytest.mark.parametrize("fewest", [64, 16])
def test_the_rows_of_a_chunk_are_one(fewest, monkeypatch):
    """The kernel's own workspace holds as many lanes as the plan says."""
    triton = pytest.importorskip("gac_kernels.triton")
    from gac_kernels.triton import launch as starting

    monkeypatch.setattr("gac_kernels.layout.SKETCH_CHUNK_ROWS", (fewest, fewest))
    launched = []
    monkeypatch.setattr(starting, "launch", lambda kernel, grid, device, *args, **constants: launched.append(args))
    monkeypatch.setattr(starting, "check_device", lambda device: None)
    x = torch.zeros(300_000)
    layout = SketchLayout.per_tensor([x.numel()], size=4096)
    triton.sketch([x], torch.zeros(layout.size), layout=layout)
    lane_partials = next(a for a in launched[0] if isinstance(a, torch.Tensor) and a.dim() == 2 and a.shape[1] == LANES)
    assert plan.workspace_bytes([x.numel()], layout) == 2 * lane_partials.nbytes

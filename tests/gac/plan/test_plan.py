"""Whole plans against whole steps: memory, FSDP2, the CPU as measured."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import gac
from gac import plan
from gac.observe.ledger import Ledger
from gac.plan import DEVICES, Parameters, Setup, make_plan
from gac.plan.shapes import MODELS
from tests.gac.models import sft_loss, tiny_model, tokens
from tests.gac.plan.models import a_step, parameters_of

RESULTS = Path(__file__).parents[3] / "benchmarks" / "results"
H100 = DEVICES["h100"]


@pytest.mark.parametrize("estimator", ["sketch", "exact"])
@pytest.mark.parametrize("micro_batches", [1, 9])
def test_sketch_memory_of_a_step(estimator, micro_batches):
    model = tiny_model()
    with gac.patch(model, estimator=estimator, interval=1, report_interval=None) as mixer:
        batch = tokens(1, 0)[0]
        a_step(mixer, lambda: sft_loss(model, batch), micro_batches)
        mixer.step()
        held = sum(ledger.nbytes for ledger in mixer._observer.ledgers)
        held += sum(v.nbytes for means in mixer._measurement._means for v in means.state.values() if v.dim())
    found = make_plan(Setup(parameters_of(model), H100, estimator=estimator, micro_batches=micro_batches, dtype="fp32"))
    assert found.sketch_bytes == held


@pytest.mark.parametrize("name", ["10M", "0.1B", "1B", "8B", "405B"])
def test_sketch_memory_of_large_models(name):
    numels = [math.prod(shape) for shape in MODELS[name].shapes()]
    for ranks, running in ((1, True), (64, False)):
        held = Ledger(numels, torch.device("meta"), lossless=False, running=running).nbytes
        found = make_plan(Setup(Parameters.of(name), H100, ranks=ranks, estimator="sketch"))
        assert found.sketch_bytes == held
        assert found.sketch_share == held / (2 * sum(numels))


@pytest.mark.parametrize("ranks", [4, 64], indirect=True)
@pytest.mark.parametrize("estimator", ["sketch", "exact"])
def test_a_step_of_fsdp2(ranks, estimator, recorded, monkeypatch):
    """Memory, bytes read and sent, launches: of the real engine's first rank."""
    model = tiny_model()
    whole = parameters_of(model)
    fully_shard(model, mesh=init_device_mesh("cpu", (ranks,)))
    batch, sent = tokens(1, 0)[0], []
    real = dist.all_reduce
    monkeypatch.setattr(dist, "all_reduce", lambda t, *a, **k: (sent.append(t.nbytes), real(t, *a, **k))[1])
    with gac.patch(model, estimator=estimator, interval=1, report_interval=None) as mixer:
        a_step(mixer, lambda: sft_loss(model, batch), 2)
        mixer.step()
        held = sum(ledger.nbytes for ledger in mixer._observer.ledgers)
    calls = list(recorded)
    setup = Setup(whole, H100, ranks=ranks, sharding="fsdp", estimator=estimator, micro_batches=2, dtype="fp32")
    found = make_plan(setup)
    assert found.sketch_bytes == held
    assert sent == [found.all_reduce_bytes]
    assert calls == [("accumulate_", found.read_bytes_per_backward)] * 4  # no sketch of so small a model loses anything
    assert found.launches_per_backward == plan.SKETCH_LAUNCHES


def test_cpu_overhead_is_the_measured_one_within_a_factor_of_two():
    results = json.loads((RESULTS / "cpu.json").read_text())
    for row in results["step"]:
        setup = Setup(
            Parameters.of(row["model"]),
            DEVICES["cpu"],
            tokens=row["tokens"],
            micro_batches=row["micro_batches_per_branch"],
            dtype={"float32": "fp32", "bfloat16": "bf16"}[row["dtype"]],
        )
        found = make_plan(setup)
        assert found.parameters == row["parameters"]
        assert found.estimator == row["estimator"]
        assert found.gradient_bytes == row["gradient_bytes"]
        measured = row["intervals"]["1"]
        assert 0.5 < found.gac_seconds / measured["seconds_in_gac"] < 2.0
        assert 0.5 < found.share / measured["share_in_gac"] < 2.0
        said = (
            f"the plan says {1e3 * found.gac_seconds:.1f} ms a step in GAC and {found.share:.2%} of it; measured were "
            f"{1e3 * measured['seconds_in_gac']:.1f} ms and {measured['share_in_gac']:.2%}"
        )
        assert said in (RESULTS.parents[1] / "docs" / "scaling.md").read_text()


def test_interval_divides_the_overhead_and_lora_shrinks_it():
    whole = make_plan(Setup(Parameters.of("8B"), H100))
    every_tenth = make_plan(Setup(Parameters.of("8B"), H100, interval=10))
    assert every_tenth.share == pytest.approx(whole.share / 10)
    lora = make_plan(Setup(Parameters.of("8B"), H100, trainable=40_000_000))
    assert lora.trainable == 40_000_000
    assert lora.estimator == "exact"
    assert lora.step_seconds == pytest.approx(whole.step_seconds * 4 / 6, rel=0.01)
    assert lora.read_bytes_per_backward == 2 * 40_000_000
    assert lora.read_seconds < whole.read_seconds / 20
    assert lora.share < whole.share / 10

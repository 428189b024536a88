"""Whole-step overhead and host time, on a model small enough for a test."""

import pytest
import torch

from gac.bench import host, step
from gac.plan.shapes import LlamaShape

CPU = torch.device("cpu")
TINY = LlamaShape("tiny", 300, 32, 48, 2, 2, 1, 16, tied=True)


def options(**changes):
    return step.StepOptions(
        **{"shape": TINY, "device": CPU, "dtype": torch.float32, "tokens": 32, "seconds": 0.01, "rounds": (3, 3)}
        | changes
    )


def test_results_hold_every_arm_and_interval():
    result = step.run(options())
    assert set(result["arms"]) == set(step.ARMS)
    assert result["rounds"] == 3
    gac = {arm: found["gac"] for arm, found in result["arms"].items()}
    assert gac["plain"] == 0 < gac["unmeasured"] < gac["measured"]
    one, ten = result["intervals"]["1"], result["intervals"]["10"]
    assert one["seconds_in_gac"] == pytest.approx(gac["measured"])
    assert ten["share_in_gac"] < one["share_in_gac"]
    assert result["gradient_bytes"] == 4 * TINY.numel()
    assert result["sketch_bytes"] > 0


def test_the_interval_weighs_measured_steps():
    samples = {
        "plain": [{"wall": 1.0, "gac": 0.0}] * 3,
        "unmeasured": [{"wall": 1.01, "gac": 0.001}] * 3,
        "measured": [{"wall": 1.1, "gac": 0.05}] * 3,
    }
    found = step._overhead(samples, 10)
    assert found["share_in_gac"] == pytest.approx((0.05 + 9 * 0.001) / 10)
    assert found["whole_step"] == pytest.approx((1.1 + 9 * 1.01) / 10 - 1)


def test_large_logits_give_the_same_loss(monkeypatch):
    trainer = step.Trainer(options())
    whole = trainer.loss(trainer.batches[0]).detach()
    monkeypatch.setattr(step, "_LARGE_LOGITS", 0)
    monkeypatch.setattr(step, "_SEQUENCE", 10)
    pieces = trainer.loss(trainer.batches[0]).detach()
    assert float(pieces) == pytest.approx(float(whole), rel=1e-5)


def test_arms_do_the_same_training_step():
    one, other = step.Trainer(options()), step.Trainer(options())
    one.plain()
    with other.patch(interval=1) as mixer:
        assert float(mixer.mu) == step._MU
        other.mixed(mixer)
    for a, b in zip(one.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_hook_cost_is_positive():
    found = host.hook_cost(CPU, parameters=200, rounds=5)
    assert 0 < found["hook"] < 1e-3
    assert found["hook_and_read"] > 0
    alone = host.hook_cost_alone(CPU, rounds=2, processes=2)
    assert (alone["processes"], alone["rounds"]) == (2, 2)
    assert 0 < alone["hook"] < 1e-3


def test_import_time_is_measured_in_a_new_process():
    found = host.import_time(rounds=1)
    assert 0 < found["p50"] < 60

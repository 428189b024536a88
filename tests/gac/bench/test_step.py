"""Whole-step overhead and host time, on a model small enough for a test."""

import itertools

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
    seen = []
    result = step.run(options(), lambda found: seen.append(dict(found)))
    assert seen == [result], "on a GPU there is more after it"
    assert set(result["arms"]) == set(step.ARMS)
    assert result["rounds"] == 3
    gac = {arm: found["gac"] for arm, found in result["arms"].items()}
    assert gac["plain"] == 0 < min(gac["unmeasured"], gac["measured"])  # which is more, a busy machine may hide
    one, ten = result["intervals"]["1"], result["intervals"]["10"]
    assert one["seconds_in_gac"] == pytest.approx(gac["measured"])
    assert ten["share_in_gac"] > 0
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


def test_sequences_are_measured_whether_logits_are_large_or_not(monkeypatch):
    for large in (1 << 30, 0):
        monkeypatch.setattr(step, "_LARGE_LOGITS", large)
        monkeypatch.setattr(step, "_SEQUENCE", 8)
        trainer = step.Trainer(options(estimator="sequence"))
        with trainer.patch(interval=1) as mixer:
            trainer.mixed(mixer)
            assert mixer.coverage.share == 1.0
            assert (mixer.statistics.n_s, mixer.statistics.n_r) == (8, 8)  # 2 passes of 4 sequences
    result = step.run(options(estimator="sequence"))
    assert result["estimator"] == "sequence"
    assert result["sketch_bytes"] == 4 * (2 + 4) * mixer_width()


def mixer_width():
    with step.Trainer(options(estimator="sequence")).patch(interval=1) as mixer:
        return mixer.coverage.width


def test_hook_cost_is_the_pass_above_its_twin_without_the_ledgers_calls(monkeypatch):
    """By a clock that moves one second at each reading: no test of this machine's speed."""
    ticks = itertools.count()
    monkeypatch.setattr(host, "perf_counter", lambda: next(ticks))
    calls = 3  # of the ledger in a pass whose parameters fill one bucket: begin, read, end
    found = host.hook_cost(CPU, parameters=20, rounds=3)
    assert (found["parameters"], found["rounds"]) == (20, 3)
    # a timed call reads the clock twice: within the pass that is two seconds, in the ledger's own count one
    assert found["hook_and_read"] * 20 == pytest.approx(2 * calls)
    assert found["hook"] * 20 == pytest.approx(calls)


def test_hook_cost_comes_from_new_processes():
    found = host.hook_cost_alone(CPU, rounds=2, processes=2)
    assert (found["processes"], found["rounds"]) == (2, 2)
    assert all(abs(found[name]) < 1e-3 for name in ("hook", "hook_and_read"))


def test_import_time_is_measured_in_a_new_process():
    found = host.import_time(rounds=1)
    assert 0 < found["p50"] < 60

"""One run from its data to its record, at a few steps."""

import dataclasses
import json
import math

import pytest
import torch

from benchmarks.study import training
from benchmarks.study.drift import mean_kl
from benchmarks.study.models import build
from benchmarks.study.rows import Row

ROW = Row("tuning", "spell_backward", "small", "gac", "", 3e-4, 7)
TIMINGS = ("seconds", "seconds_per_step", "gac_share")


@pytest.fixture(autouse=True)
def short_runs(monkeypatch):
    """Four steps, two evaluations, a warm start of three steps."""
    from benchmarks.study.tasks import TASKS

    monkeypatch.setattr(training, "STEPS", 4)
    monkeypatch.setattr(training, "EVALUATE_EVERY", 2)
    monkeypatch.setitem(TASKS["spell_backward"].warm_start_steps, "small", 3)
    threads, onednn = torch.get_num_threads(), torch.backends.mkldnn.enabled
    yield
    torch.set_num_threads(threads)
    torch.backends.mkldnn.enabled = onednn


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def test_a_row_gives_the_same_numbers_twice_and_a_whole_record(cache):
    records = [training.train_row(ROW, cache) for _ in range(2)]
    first, second = ({k: v for k, v in record.items() if k not in TIMINGS} for record in records)
    assert first == second
    assert [step for step, _ in first["accuracy"]] == [0, 2, 4]
    assert [step for step, _ in first["kl"]] == [0, 2, 4]
    assert first["kl"][0][1] == 0.0
    assert first["kl"][2][1] > 0.0
    assert len(first["mu"]) == 4
    assert first["rollouts"] == 4 * training.ROLLOUTS
    assert first["broke_at"] is None
    assert 250_000 < first["parameters"] < 350_000
    json.dumps(records[0], allow_nan=False)


def test_a_run_may_end_in_a_step_without_rollouts(cache):
    """A queue that every step fills makes every second step supervised."""
    record = training.train_row(dataclasses.replace(ROW, method="relift", setting="queue=8"), cache)
    assert 0 < record["rollouts"] < 4 * training.ROLLOUTS
    assert record["tokens"] > record["rollouts"]
    json.dumps(record, allow_nan=False)


def test_a_run_whose_weights_break_keeps_what_it_reached(cache, monkeypatch):
    evaluate = training._Recorder.evaluate

    def poison(recorder, step):
        evaluate(recorder, step)
        if step == 2:
            with torch.no_grad():
                next(recorder.model.parameters()).fill_(math.nan)

    monkeypatch.setattr(training._Recorder, "evaluate", poison)
    record = training.train_row(ROW, cache)
    assert record["broke_at"] == 2
    assert [step for step, _ in record["accuracy"]] == [0, 2, 4]
    assert record["accuracy"][-1][1] == 0.0


def test_an_error_that_is_not_the_weights_is_raised(cache, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("no reward today")

    monkeypatch.setattr(training._Recorder, "reward", fail)
    with pytest.raises(RuntimeError, match="no reward today"):
        training.train_row(ROW, cache)


def test_drift_is_the_divergence_summed_over_the_vocabulary():
    rows = [{"prompt": text} for text in ("ab=", "bca=")]
    initial, tokenizer = build("small", ["abc="], seed=0)
    policy, _ = build("small", ["abc="], seed=0)
    assert mean_kl(policy, initial, tokenizer, rows, length=3) == pytest.approx(0.0, abs=1e-6)
    with torch.no_grad():
        policy.get_input_embeddings().weight[tokenizer.convert_tokens_to_ids("a")] *= 3.0
    state = torch.get_rng_state()
    measured = mean_kl(policy, initial, tokenizer, rows[:1] * 64, length=1)
    assert torch.equal(state, torch.get_rng_state())
    batch = tokenizer("ab=", return_tensors="pt")
    with torch.no_grad():
        logs = [model(batch["input_ids"]).logits[0, -1].double().log_softmax(-1) for model in (policy, initial)]
    expected = (logs[0].exp() * (logs[0] - logs[1])).sum().item()
    assert measured == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("method", ["gac", "hpt"])
def test_every_prompt_may_have_a_demonstration(cache, monkeypatch, method):
    """Laws draw from all solutions instead of a third of them; a rule finds one beside every prompt."""
    from gac.trainers import HybridGRPOTrainer
    from gac.trainers.prompts import COLUMN

    made = []
    init = HybridGRPOTrainer.__init__

    def spy(self, model, reward, args, prompts, demonstrations, **kwargs):
        made.append((prompts, demonstrations))
        init(self, model, reward, args, prompts, demonstrations, **kwargs)

    monkeypatch.setattr(HybridGRPOTrainer, "__init__", spy)
    records = [
        training.train_row(dataclasses.replace(ROW, method=method, setting=setting), cache)
        for setting in ("", "every-prompt")
    ]
    assert records[0]["law"] == records[1]["law"]
    (some, few), (all_of_them, many) = made
    if method == "gac":
        assert (len(few), len(many)) == (400, 1200)
        assert {row["prompt"] for row in few} < {row["prompt"] for row in many}
        assert list(many[0]) == list(few[0]) == ["prompt", "completion", "answer"]
    else:
        assert few is many is None
        assert sum(text is not None for text in some[COLUMN]) == 400
        assert all_of_them[COLUMN] == all_of_them["completion"]

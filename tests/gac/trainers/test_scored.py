"""``sft_weights="reward"``: demonstrations that the trainer's reward functions score, and weighs them by it."""

import json

import pytest
import torch

from gac.losses import sft_token_loss
from gac.tasks.characters import build_character_tokenizer
from gac.trainers.demonstrations import DemonstrationCollator, EpochSampler
from gac.trainers.hybrid_grpo import complete_checkpoints
from tests.gac.trainers.conftest import DEMONSTRATIONS, PROMPTS, tiny_model, with_demonstrations
from tests.gac.trainers.test_hybrid_grpo import Gradients, assert_same, histories
from tests.gac.trainers.test_sft_columns import ask, reply, tokenizer

HALF_WRONG = [row | {"completion": row["completion"] if k % 2 else "x"} for k, row in enumerate(DEMONSTRATIONS)]


class Judge:
    """Exact match on a column, which remembers what it was asked and logs as reward functions may."""

    __name__ = "judge"

    def __init__(self):
        self.calls = []

    def __call__(self, prompts, completions, completion_ids, answer, log_extra, log_metric, **_):
        text = lambda x: x if isinstance(x, str) else x[-1]["content"]
        self.calls.append(
            [(text(p), text(c), tuple(i)) for p, c, i in zip(prompts, completions, completion_ids, strict=True)]
        )
        log_extra("asked", [text(p) for p in prompts])
        log_metric("asked", float(len(prompts)))
        # rollouts of an untrained model are never right: some are given half of it
        return [
            1.0 if text(c) == a else 0.5 * (len(text(c)) % 2 == 0) * (text(c) != "x")
            for c, a in zip(completions, answer, strict=True)
        ]

    def of_demonstrations(self, rows):
        shown = {(row["prompt"], row["completion"]) for row in rows}
        return [call for call in self.calls if all(pair[:2] in shown for pair in call)]


def weights_by_hand(run, judge, index, rows=HALF_WRONG):
    """From the rewards that the log has of the first generation."""
    scores = torch.tensor([float(rows[k]["completion"] == rows[k]["answer"]) for k in index])
    policy = run._values.policy_values(index)
    return (scores - policy).clamp(min=0)


@pytest.mark.parametrize("estimator", ["exact", "sequence"])
def test_the_gradient_is_that_of_the_weighted_loss(trainer, estimator):
    judge, kept = Judge(), Gradients()
    model = tiny_model()
    run = trainer(
        mu=1.0, max_steps=1, sft_weights="reward", estimator=estimator, sft_dataset=HALF_WRONG, reward=judge,
        sft_batch_size=3, callbacks=[kept], model=model,
    )  # fmt: skip
    reference = tiny_model()
    run.train()
    index = EpochSampler(len(HALF_WRONG), 42).take(0, 6)
    weights = weights_by_hand(run, judge, index)
    assert 0 < (weights == 0).sum() < 6
    assert ((weights > 0) & (weights < 1)).any()
    batch = DemonstrationCollator(build_character_tokenizer(), HALF_WRONG)(index)
    logits = reference(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    loss = sft_token_loss(logits, batch.labels, num_tokens=batch.count_tokens(), weights=weights)
    loss.backward()
    for name, parameter in reference.named_parameters():
        torch.testing.assert_close(kept.steps[0][name], parameter.grad, rtol=1e-4, atol=1e-7)
    entry = run.state.log_history[0]
    assert entry["gac/sft_loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert entry["gac/sft_weight"] == pytest.approx(weights.mean().item(), rel=1e-6)
    assert entry["gac/sft_weight_se"] == pytest.approx(weights.std().item() / 6**0.5, rel=1e-6)
    right = sum(HALF_WRONG[k]["completion"] != "x" for k in index)
    assert entry["gac/sft_reward"] == pytest.approx(right / 6)


def test_the_loss_of_rows_by_hand():
    logits = torch.randn(3, 5, 7, dtype=torch.float64, requires_grad=True)
    labels, weights = torch.randint(0, 7, (3, 5)), torch.tensor([0.0, 0.25, 1.0])
    labels[:, :2] = -100
    each = [sft_token_loss(x, y, num_tokens=9, phi=True) for x, y in zip(logits, labels, strict=True)]
    expected = sum(w * loss for w, loss in zip(weights.double(), each, strict=True))
    found = sft_token_loss(logits, labels, num_tokens=9, phi=True, weights=weights)
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=0)
    (wanted,) = torch.autograd.grad(expected, logits)
    torch.testing.assert_close(torch.autograd.grad(found, logits)[0], wanted, rtol=1e-13, atol=1e-16)
    with pytest.raises(ValueError, match=r"weights must be one for each row, \(3,\); got \(3, 5\)"):
        sft_token_loss(logits, labels, weights=torch.ones(3, 5))


def test_each_demonstration_is_scored_once_and_logged_nowhere(trainer):
    judge = Judge()
    few = HALF_WRONG[:8]
    run = trainer(
        law="gac", max_steps=4, sft_weights="reward", sft_dataset=few, sft_batch_size=2, reward=judge,
        log_completions=False,
    )  # fmt: skip
    run.train()
    asked = judge.of_demonstrations(few)
    assert [len(call) for call in asked] == [4, 4], "two steps draw all of them, two draw them again"
    assert sorted(pair[:2] for call in asked for pair in call) == sorted((r["prompt"], r["completion"]) for r in few)
    encode = build_character_tokenizer()
    assert all(list(pair[2]) == [*encode(pair[1])["input_ids"], encode.eos_token_id] for call in asked for pair in call)
    assert all(entry["asked"] == 8.0 for entry in run.state.log_history if "asked" in entry)
    assert len(run._logs["extra"]["asked"]) == len(run._logs["prompt"])
    run.rescore_demonstrations()
    assert not run._values.are_scored([0])


@pytest.mark.parametrize("columns", ["chats", "messages"])
def test_conversations_are_scored_by_their_last_words(trainer, columns):
    judge = Judge()
    shape = {
        "chats": lambda row: {"prompt": [ask(row)], "completion": [reply(row)]},
        "messages": lambda row: {"messages": [ask(row), reply(row), {"role": "user", "content": "?"}]},
    }[columns]
    rows = [shape(row) | {"answer": row["answer"]} for row in HALF_WRONG]
    prompts = [{"prompt": [ask(row)], "answer": row["answer"]} for row in PROMPTS]
    run = trainer(
        law="gac", max_steps=1, sft_weights="reward", sft_dataset=rows, prompts=prompts, reward=judge,
        processing_class=tokenizer(),
    )  # fmt: skip
    run.train()
    (asked,) = judge.of_demonstrations(HALF_WRONG)
    index = EpochSampler(len(rows), 42).take(0, 8)
    assert [pair[:2] for pair in asked] == [(HALF_WRONG[k]["prompt"], HALF_WRONG[k]["completion"]) for k in index]
    assert run._values.scores(index).tolist() == [float(HALF_WRONG[k]["completion"] != "x") for k in index]


def test_resume_continues_bit_for_bit(trainer, tmp_path):
    common = {
        "max_steps": 4, "save_strategy": "steps", "save_steps": 2, "sft_weights": "reward", "gac_interval": 1,
        "sft_dataset": HALF_WRONG[:8], "sft_batch_size": 1,
    }  # fmt: skip
    whole = trainer(output_dir=str(tmp_path / "whole"), reward=Judge(), **common)
    whole.train()
    checkpoint, judge = complete_checkpoints(str(tmp_path / "whole"))[0], Judge()
    resumed = trainer(output_dir=str(tmp_path / "resumed"), model=tiny_model(seed=9), reward=judge, **common)
    resumed.train(resume_from_checkpoint=checkpoint)
    assert json.dumps(histories(whole)[2:4]) == json.dumps(histories(resumed)[2:4])
    assert_same(whole.model.state_dict(), resumed.model.state_dict())
    assert sum(map(len, judge.of_demonstrations(HALF_WRONG[:8]))) == 4, "those of the first steps are known"
    other = trainer(output_dir=str(tmp_path / "other"), **common | {"sft_weights": None})
    with pytest.raises(ValueError, match="has no place for values: it was written with another sft_weights"):
        other.train(resume_from_checkpoint=checkpoint)


def test_rewards_that_say_nothing_change_no_bit(trainer):
    """Where no reward judges, all weigh 1."""
    found = []
    for weights in (None, "reward"):
        run = trainer(
            law="gac", max_steps=2, gac_interval=1, sft_weights=weights, reward=nothing
        )  # fmt: skip
        run.train()
        found.append(run.model.state_dict())
    assert_same(*found)


def nothing(completions, **_):
    return [0.0] * len(completions)


@pytest.mark.parametrize("estimator", ["exact", "sequence"])
def test_weights_of_a_column_are_the_users(trainer, estimator):
    """Those of rewards, given as a column, train the same."""
    found, rows = [], [row | {"share": k % 4 / 2} for k, row in enumerate(DEMONSTRATIONS)]
    common = {"mu": 0.5, "max_steps": 1, "estimator": estimator, "sft_dataset": rows}
    kept = Gradients()
    run = trainer(sft_weight_column="share", callbacks=[kept], **common)
    run.train()
    drawn = torch.tensor([rows[k]["share"] for k in EpochSampler(len(rows), 42).take(0, 8)], dtype=torch.float64)
    entry = run.state.log_history[0]
    assert entry["gac/sft_weight"] == pytest.approx(drawn.mean().item(), rel=1e-6)
    assert entry["gac/sft_weight_se"] == pytest.approx(drawn.std().item() / 8**0.5, rel=1e-6)
    for weight, subset in ((0.5, 1), (1.0, 2), (1.5, 3)):
        alone = Gradients()
        only = [row | {"share": float(k % 4 == subset)} for k, row in enumerate(DEMONSTRATIONS)]
        trainer(sft_weight_column="share", callbacks=[alone], **common | {"sft_dataset": only, "mu": 1.0}).train()
        found.append({name: 0.5 * weight * gradient for name, gradient in alone.steps[0].items()})
    rl = Gradients()
    trainer(callbacks=[rl], **common | {"mu": 0.0}).train()
    for name, gradient in kept.steps[0].items():
        expected = 0.5 * rl.steps[0][name] + sum(part[name] for part in found)
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf"), "1", None, True])
def test_weights_that_are_none_are_refused_by_row(trainer, value):
    rows = [row | {"share": 1.0 if k else value} for k, row in enumerate(DEMONSTRATIONS)]
    with pytest.raises(ValueError, match="sft_dataset row 0: column 'share' must hold a finite number from 0 on, got"):
        trainer(law="gac", sft_weight_column="share", sft_dataset=rows)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sft_weights": None, "sft_weight_column": "x"}, "sft_weight_column='x' is no column of sft_dataset"),
        ({"sft_weight_column": "x"}, "sft_weights='reward' and sft_weight_column='x' both weigh demonstrations"),
        ({"sft_weights": "loss"}, "unknown sft_weights 'loss'; known: reward, source, or None"),
        ({"sft_packing": True, "sft_max_length": 8}, "sft_weights='reward' weighs each demonstration, and sft_packing"),
        ({"estimator": "coefficient"}, "sft_weights='reward'.*coefficient estimator reads none"),
        ({"observe_tokens": True}, "sft_weights='reward'.*without observe_tokens"),
        ({"law": "hpt"}, "law='hpt' chooses demonstrations by the rewards.*leave sft_weights='reward' out"),
        ({"sft_dataset": [{"text": "1+1=2"}]}, "row 0 needs 'prompt' and 'completion', or 'messages'; it has .'text'"),
    ],
)
def test_what_has_no_meaning_is_refused(trainer, options, message):
    with pytest.raises(ValueError, match=message):
        trainer(prompts=with_demonstrations(), **{"sft_weights": "reward", **options})


def test_columns_that_a_reward_function_misses_are_named(trainer):
    rows = [{"prompt": row["prompt"], "completion": row["completion"]} for row in DEMONSTRATIONS]
    run = trainer(law="gac", sft_weights="reward", sft_dataset=rows, reward=Judge())
    with pytest.raises(
        ValueError, match=r"could not score demonstrations \(.*'answer'.*and has \['completion', 'prompt'\]"
    ):
        run.train()
    with pytest.raises(RuntimeError, match="set sft_weights='reward'"):
        trainer(law="gac").rescore_demonstrations()

"""``sft_weights="source"``: demonstrations weigh what their source's gradient is worth beside that of the rewards."""

import json

import pytest
import torch

from gac.losses import sft_token_loss
from gac.sequences.source_trust import LEAST, SourceTrust
from gac.tasks.characters import build_character_tokenizer
from gac.trainers.demonstrations import DemonstrationCollator, EpochSampler
from gac.trainers.hybrid_grpo import complete_checkpoints
from gac.trainers.sourced import MOST_SOURCES
from tests.gac.trainers.conftest import DEMONSTRATIONS, tiny_model
from tests.gac.trainers.test_hybrid_grpo import Gradients, assert_same, histories

TWO = [row | {"teacher": "ab"[k % 2]} for k, row in enumerate(DEMONSTRATIONS)]
COMMON = {
    "sft_weights": "source", "gac_source_column": "teacher", "estimator": "sequence", "gac_interval": 1,
    "sft_dataset": TWO,
}  # fmt: skip


def test_the_gradient_is_that_of_the_weighted_loss(trainer, monkeypatch):
    """With one source against the reward, for certain."""
    judged = dict.fromkeys("ab", 1.0) | {"b": LEAST}
    weights_of = lambda self, labels: torch.tensor([judged[label] for label in labels], dtype=torch.float64)
    monkeypatch.setattr(SourceTrust, "weights", weights_of)
    kept, model, reference = Gradients(), tiny_model(), tiny_model()
    run = trainer(mu=1.0, max_steps=1, sft_batch_size=3, callbacks=[kept], model=model, **COMMON)
    run.train()
    index = EpochSampler(len(TWO), 42).take(0, 6)
    weights = torch.tensor([judged[TWO[k]["teacher"]] for k in index])
    assert 0 < (weights < 1).sum() < 6
    batch = DemonstrationCollator(build_character_tokenizer(), TWO)(index)
    logits = reference(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    sft_token_loss(logits, batch.labels, num_tokens=batch.count_tokens(), weights=weights).backward()
    for name, parameter in reference.named_parameters():
        torch.testing.assert_close(kept.steps[0][name], parameter.grad, rtol=1e-4, atol=1e-7)
    assert run.state.log_history[0]["gac/sft_weight"] == pytest.approx(weights.mean().item(), rel=1e-6)


def test_every_measured_step_is_taken_in_and_told(trainer):
    run = trainer(law="gac", max_steps=4, per_device_train_batch_size=8, reward=lengths, **COMMON)
    run.train()
    known = run.source_trust.known()
    assert [trust.steps for trust in known.values()] == [4, 4]
    assert all(trust.weight == 1.0 for trust in known.values()), "too few steps to judge by"
    for entry in run.state.log_history[:4]:
        assert entry["gac/source_weight/a"] == entry["gac/source_weight/b"] == entry["gac/sft_weight"] == 1.0
        assert entry["gac/source_trust/a"] == 0.7
    unmeasured = trainer(law="gac", max_steps=4, reward=lengths, **COMMON | {"gac_interval": 2})
    unmeasured.train()
    assert [trust.steps for trust in unmeasured.source_trust.known().values()] == [2, 2]


def lengths(completions, **_):
    return [float(len(completion) % 3) for completion in completions]


def test_resume_continues_bit_for_bit(trainer, tmp_path, monkeypatch):
    monkeypatch.setattr("gac.sequences.source_trust.FEWEST", 2)
    common = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "reward": lengths, **COMMON}
    whole = trainer(output_dir=str(tmp_path / "whole"), **common)
    whole.train()
    checkpoint = complete_checkpoints(str(tmp_path / "whole"))[0]
    resumed = trainer(output_dir=str(tmp_path / "resumed"), model=tiny_model(seed=9), **common)
    resumed.train(resume_from_checkpoint=checkpoint)
    assert any(trust.weight < 1.0 for trust in whole.source_trust.known().values()), "or nothing is shown"
    assert resumed.source_trust.known() == whole.source_trust.known()
    assert json.dumps(histories(whole)[2:4]) == json.dumps(histories(resumed)[2:4])
    assert_same(whole.model.state_dict(), resumed.model.state_dict())
    other = trainer(output_dir=str(tmp_path / "other"), **common | {"sft_weights": None})
    with pytest.raises(ValueError, match="has no place for sources: it was written with another sft_weights"):
        other.train(resume_from_checkpoint=checkpoint)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"estimator": "exact", "gac_source_column": None}, "needs estimator='sequence' and gac_source_column, got"),
        ({"gac_source_column": None}, "needs estimator='sequence' and gac_source_column, got 'sequence' and None"),
        ({"sft_weight_column": "x"}, "sft_weights='source' and sft_weight_column='x' both weigh demonstrations"),
        (
            {"sft_dataset": [row | {"teacher": k} for k, row in enumerate(TWO * MOST_SOURCES)]},
            f"column 'teacher' has {len(TWO) * MOST_SOURCES} labels, and at most {MOST_SOURCES} sources",
        ),
    ],
)
def test_what_has_no_meaning_is_refused(trainer, options, message):
    with pytest.raises(ValueError, match=message):
        trainer(law="gac", **COMMON | options)

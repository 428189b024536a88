"""What the trainer tells the mixer about tokens: how many each contribution adds up, and their probabilities."""

import math

import pytest
import torch

from gac.losses import shift_labels
from gac.mixer import Mixer
from gac.trainers import token_stats
from tests.gac.trainers.conftest import with_demonstrations


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_label_logprobs_and_entropies(dtype, monkeypatch):
    monkeypatch.setattr(token_stats, "_CHUNK_BYTES", 4 * 7 * 3)  # chunks of three tokens
    torch.manual_seed(0)
    logits = (3 * torch.randn(2, 5, 7)).to(dtype)
    labels = torch.tensor([[-100, -100, 3, 1, 0], [-100, 6, 2, -100, -100]])
    logits[1, 3:] = float("nan")  # nothing is predicted there
    logprobs, kept = token_stats.label_logprobs(logits, labels)
    assert kept.tolist() == [[False, True, True, True, False], [True, True, False, False, False]]
    full = logits.double().log_softmax(-1)
    expected = full.gather(2, shift_labels(labels).clamp(min=0)[..., None])[..., 0].masked_fill(~kept, 0.0)
    torch.testing.assert_close(logprobs.double(), expected, rtol=0, atol=3e-6)
    entropy = torch.distributions.Categorical(logits=logits.double().nan_to_num(0.0)).entropy()
    expected = (entropy * kept).sum(1) / kept.sum(1)
    torch.testing.assert_close(token_stats.mean_entropy(logits, labels).double(), expected, rtol=0, atol=3e-6)


def test_a_row_without_labels_has_no_entropy():
    assert token_stats.mean_entropy(torch.randn(2, 3, 4), torch.full((2, 3), -100)).tolist() == [0.0, 0.0]


class Spy:
    """Records what reaches the mixer."""

    def __init__(self, monkeypatch):
        self.tokens = {"sft": [], "rl": []}
        self.observed = []
        for branch in ("sft", "rl"):
            self._wrap(monkeypatch, branch)
        observe = Mixer.observe_tokens

        def observing(mixer, *arguments):
            self.observed.append([value.clone() for value in arguments])
            return observe(mixer, *arguments)

        monkeypatch.setattr(Mixer, "observe_tokens", observing)

    def _wrap(self, monkeypatch, branch):
        enter = getattr(Mixer, branch)

        def entering(mixer, *, tokens=None):
            self.tokens[branch].append(None if tokens is None else float(tokens))
            return enter(mixer, tokens=tokens)

        monkeypatch.setattr(Mixer, branch, entering)


@pytest.mark.parametrize("loss_type", ["dapo", "cispo", "vespo", "grpo", "bnpo", "dr_grpo", "sapo"])
def test_contributions_are_weighted_where_losses_add_up_tokens(trainer, monkeypatch, loss_type):
    spy = Spy(monkeypatch)
    run = trainer(max_steps=1, loss_type=loss_type, gradient_accumulation_steps=3)
    run.train()
    assert len(spy.tokens["sft"]) == len(spy.tokens["rl"]) == 3
    assert len(set(spy.tokens["sft"])) > 1  # unequal, or the test shows nothing
    if loss_type in ("dapo", "cispo", "vespo"):
        total = sum(part["completion_mask"].sum().item() for part in run._buffered_inputs)
        assert sum(spy.tokens["rl"]) == total == run._buffered_inputs[0]["num_items_in_batch"].item()
    else:
        assert spy.tokens["rl"] == [None] * 3
    assert not spy.observed


@pytest.mark.parametrize("options", [{"estimator": "coefficient"}, {"observe_tokens": True}])
def test_tokens_of_both_branches_are_observed_once_for_each_micro_batch(trainer, monkeypatch, options):
    spy = Spy(monkeypatch)
    run = trainer(max_steps=1, **options)
    model = run.model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    run.train()
    assert [bool(expert.all()) for *_, expert in spy.observed] == [False, True, False, True]
    entry = run.state.log_history[0]
    assert all(math.isfinite(entry[f"gac/{name}"]) for name in ("sigma_s2", "sigma_r2", "delta_g2"))
    if "estimator" in options:
        assert run.mixer.metrics()["estimator"] == "coefficient"
    else:
        assert run.mixer.coefficient is not None
    model.load_state_dict(before)
    for logprobs, advantages, mask, expert in spy.observed:
        assert logprobs.shape == mask.shape
        assert len(advantages) == len(expert) == len(logprobs)
        assert not logprobs.requires_grad
    # the rollouts' probabilities are those of the policy that the gradients belong to
    part = run._buffered_inputs[0]
    logprobs, advantages, mask, _ = spy.observed[0]
    ids = torch.cat([part["prompt_ids"], part["completion_ids"]], 1)
    attention = torch.cat([part["prompt_mask"], part["completion_mask"]], 1)
    with torch.no_grad():
        full = model(input_ids=ids, attention_mask=attention).logits.log_softmax(-1)
    length = part["completion_ids"].shape[1]
    expected = full[:, -length - 1 : -1].gather(2, part["completion_ids"][..., None])[..., 0]
    torch.testing.assert_close(logprobs * mask, expected * mask, rtol=1e-4, atol=1e-5)
    assert torch.equal(advantages, part["advantages"])
    assert torch.equal(mask, part["completion_mask"])


def test_a_joined_demonstration_is_observed_as_one(trainer, monkeypatch):
    spy = Spy(monkeypatch)
    run = trainer(max_steps=1, law="luffy", observe_tokens=True, prompts=with_demonstrations(), sft_dataset=None)
    run.train()
    joined = [part["gac_joined"] for part in run._buffered_inputs]
    assert 0 < sum(int(rows.sum()) for rows in joined) <= 2
    for (*_, expert), rows in zip(spy.observed, joined, strict=True):
        assert torch.equal(expert, rows)

"""The OpenRLHF adapter, with a stand-in that has the signatures of 0.11.2, and with its loss where it is importable.

From openrlhf/models/loss.py (``PolicyLoss``), openrlhf/trainer/ray/ppo_actor.py (``ActorPPOTrainer.ppo_train``,
``training_step``) and openrlhf/utils/loss_utils.py (what divides a step's losses).
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from gac.trainers.adapters import openrlhf as adapter
from tests.gac.trainers.adapters.samples import (
    CLIP,
    Policy,
    clipped,
    losses_by_hand,
    row_gradients,
    samples,
    token_mean,
)

INSTALLED = importlib.util.find_spec("openrlhf") is not None


class PolicyLoss(nn.Module):
    def forward(
        self,
        log_probs,
        old_log_probs,
        advantages,
        action_mask=None,
        rollout_log_probs=None,
        dp_size=1,
        batch_num_tokens=None,
        global_batch_size=None,
    ):
        losses = clipped(log_probs, old_log_probs, advantages)
        loss = (losses * action_mask).sum() / batch_num_tokens * dp_size
        return loss, torch.zeros(()), torch.zeros(()), None, None


def published_loss(monkeypatch):
    """OpenRLHF's own loss; its package imports flash-attn and DeepSpeed, which this module does not use."""
    if importlib.util.find_spec("deepspeed") is None:
        monkeypatch.setitem(sys.modules, "deepspeed", types.ModuleType("deepspeed"))
    folder = importlib.util.find_spec("openrlhf").submodule_search_locations[0]
    parent = types.ModuleType("openrlhf.models")
    parent.__path__ = [f"{folder}/models"]
    monkeypatch.setitem(sys.modules, "openrlhf.models", parent)
    for name in ("openrlhf.models.loss", "openrlhf.models.utils"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return importlib.import_module("openrlhf.models.loss").PolicyLoss(clip_eps_low=CLIP, clip_eps_high=CLIP)


class Trainer:
    """As much of ``ActorPPOTrainer`` as the adapter touches: steps of ``accumulation`` micro-batches of the buffer."""

    def __init__(self, policy_loss, experiences, accumulation, lr=0.0):
        self.strategy = SimpleNamespace()
        self.actor_loss_fn = policy_loss
        self.replay_buffer = SimpleNamespace(items=[item for e in experiences for item in singles(e)])
        self.experiences, self.accumulation = experiences, accumulation
        self.optimizer = torch.optim.SGD([e.logprobs for e in experiences], lr=lr)

    def ppo_train(self, kl_ctl):
        statuses = []
        for begin in range(0, len(self.experiences), self.accumulation):
            window = self.experiences[begin : begin + self.accumulation]
            masks = torch.cat([e.action_mask for e in window])
            info = {
                "dp_size": 1,
                "batch_num_tokens": masks.sum() / self.accumulation,
                "global_batch_size": (masks.sum(1) > 0).sum() / self.accumulation,
            }
            for step, experience in enumerate(window):
                statuses.append(self.training_step(experience, kl_ctl, begin + step, info))
            self.optimizer.step()
        return statuses

    def training_step(self, experience, kl_ctl, step, loss_batch_info=None):
        loss, *_ = self.actor_loss_fn(
            experience.logprobs,
            experience.action_log_probs,
            experience.advantages,
            action_mask=experience.action_mask,
            rollout_log_probs=None,
            **loss_batch_info,
        )
        (loss / self.accumulation).backward()  # as DeepSpeed does
        return {"metrics": {"policy_loss": loss.detach()}, "weights": {"policy_loss": "token"}}


def experience(s):
    return SimpleNamespace(
        logprobs=s.logprobs,
        action_log_probs=s.old_logprobs,
        advantages=s.advantages,
        action_mask=s.mask,
        info={"is_expert": s.is_expert.float()},
    )


def singles(e):
    """The replay buffer holds samples one by one, without the padding."""
    return [
        SimpleNamespace(action_mask=mask[mask > 0], info={"is_expert": label})
        for mask, label in zip(e.action_mask, e.info["is_expert"], strict=True)
    ]


@pytest.fixture(params=["stand-in", *(["openrlhf"] if INSTALLED else [])])
def policy_loss(request, monkeypatch):
    return PolicyLoss() if request.param == "stand-in" else published_loss(monkeypatch)


def test_a_step_over_the_whole_buffer_has_token_means_of_both_branches(policy_loss):
    parts = [samples(seed=0), samples(seed=1)]
    trainer = Trainer(policy_loss, [experience(s) for s in parts], accumulation=2)
    adapter.attach(trainer, law="fixed", mu=0.3)
    statuses = trainer.ppo_train(0.0)
    others = [samples(seed=0), samples(seed=1)]
    sft, rl = ([row for s in others for row in losses_by_hand(s)[k]] for k in (0, 1))
    expected = 0.3 * token_mean(sft) + 0.7 * token_mean(rl)
    expected.backward()
    total = sum(status["metrics"]["policy_loss"] for status in statuses) / 2
    torch.testing.assert_close(total, expected.detach())
    for ours, theirs in zip(parts, others, strict=True):
        torch.testing.assert_close(ours.logprobs.grad, theirs.logprobs.grad)
    assert statuses[-1]["metrics"]["gac/mu"] == pytest.approx(0.3)
    assert statuses[-1]["weights"]["gac/mu"] is None


def test_mu_follows_the_optimizer(policy_loss):
    parts = [samples(seed=seed) for seed in range(4)]
    trainer = Trainer(policy_loss, [experience(s) for s in parts], accumulation=2)
    mixed = adapter.attach(trainer)
    statuses = trainer.ppo_train(0.0)
    assert mixed.mixer.controller.steps == 2
    assert mixed.mixer.statistics.n_s == 4
    assert statuses[0]["metrics"]["gac/mu"] == statuses[1]["metrics"]["gac/mu"] != statuses[2]["metrics"]["gac/mu"]
    mixed.close()


@pytest.mark.parametrize("expert", [True, False])
def test_a_buffer_with_one_branch(policy_loss, expert):
    s = samples()
    s.is_expert = torch.full_like(s.is_expert, expert)
    trainer = Trainer(policy_loss, [experience(s)], accumulation=1)
    mixed = adapter.attach(trainer)
    trainer.ppo_train(0.0)
    assert s.logprobs.grad.isfinite().all()
    assert torch.isfinite(mixed.mu)
    mixed.close()


def test_errors(policy_loss):
    trainer = Trainer(policy_loss, [experience(samples())], accumulation=1)
    adapter.attach(trainer)
    with pytest.raises(RuntimeError, match="already"):
        adapter.attach(trainer)
    with pytest.raises(RuntimeError, match="which rows are demonstrations"):
        trainer.actor_loss_fn(*torch.zeros(3, 2, 2))
    with pytest.raises(KeyError, match="is_expert"):
        adapter.expert_rows(SimpleNamespace(info={}))


class ByModel(Trainer):
    """Whose log-probabilities are a model's, called as ``Actor`` does: packed, or a row for each sequence."""

    def __init__(self, experiences, *, packing):
        super().__init__(PolicyLoss(), experiences, 1)
        self.actor = SimpleNamespace(model=Policy())
        self.strategy.args = SimpleNamespace(packing_samples=packing)
        self.optimizer = torch.optim.SGD(self.actor.model.parameters(), lr=0.0)

    def training_step(self, experience, *args):
        ids = experience.sequences
        packed = self.strategy.args.packing_samples
        out = self.actor.model(ids.flatten()[None])[0].view(ids.shape) if packed else self.actor.model(ids)
        experience.logprobs = out[:, -experience.action_mask.shape[1] :]
        return super().training_step(experience, *args)


@pytest.mark.parametrize("packing", [False, True])
def test_sequences_are_measured_at_the_actors_layers(packing):
    s = samples(rows=7)
    s.is_expert = torch.tensor([True, False, False, True, False, False, True])
    e = experience(s)
    e.sequences = torch.randint(0, 60, (7, 8), generator=torch.Generator().manual_seed(1))
    e.attention_mask, e.prompts = torch.ones(7, 8), ["x", "a", "b", "y", "b", "a", "z"]
    trainer = ByModel([e], packing=packing)
    mixed = adapter.attach(trainer, estimator="sequence", sketch_size=64, law="fixed", mu=0.3)
    trainer.ppo_train(0.0)
    found = mixed.mixer.statistics
    tokens = s.mask.sum(1)
    gradients = row_gradients(s, e.sequences, (tokens[s.is_expert].sum(), tokens[~s.is_expert].sum()))
    rl = torch.stack([gradients[1] + gradients[5], gradients[2] + gradients[4]])
    assert (float(found.n_s), float(found.n_r)) == (3, 2)
    assert float(found.sigma_r2) == pytest.approx(float(2 * rl.var(0).sum()), rel=1e-4)
    total = sum(gradients[k] for k in (0, 3, 6))
    assert float(found.distance2) == pytest.approx(float((total - rl.sum(0)).square().sum()), rel=1e-4)
    mixed.close()


def test_parts_of_sequences_are_refused():
    trainer = ByModel([experience(samples())], packing=True)
    trainer.strategy.ring_attn_group = object()
    with pytest.raises(ValueError, match=r"ring attention.*coefficient"):
        adapter.attach(trainer, estimator="sequence")

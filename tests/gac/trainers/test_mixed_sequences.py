"""A mixed batch whose statistics are those of the gradients of its sequences."""

from __future__ import annotations

import pytest
import torch

from gac.trainers.mixed_batch import MixedBatch
from tests.gac.trainers.test_mixed_batch import HIDDEN, LENGTH, VOCABULARY, batch, loss_of, policy, ppo, rows_of


class TinyPolicy(torch.nn.Module):
    """Tokens to log-probabilities of the next ones, in layers."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = torch.nn.Embedding(VOCABULARY, HIDDEN)
        self.head = torch.nn.Linear(HIDDEN, VOCABULARY)

    def forward(self, ids):
        return self.head(self.embed(ids).cumsum(-2).tanh()).log_softmax(-1)


def train_by_sequences(packed=False, **options):
    """A step of two micro-batches whose rollouts are two prompts' each; what was found, and each row's gradient."""
    model = TinyPolicy()
    mixed = MixedBatch(estimator="sequence", sketch_size=64, law="fixed", mu=0.3, **options).watch(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    rows = []
    for seed in range(2):
        data = batch(rows=8, experts=4, seed=seed)
        ids = torch.cat([data["taken"][:, :1], data["taken"]], 1)[:, :-1]
        told = {"groups": [-1] * 4 + [0, 1, 0, 1]}
        take = lambda out, taken=data["taken"]: out.gather(-1, taken[..., None])[..., 0]
        if packed:  # no attention, so that a sequence's states are those of its own tokens
            told["lengths"] = [LENGTH] * 8
            model.forward = lambda x: TinyPolicy.forward(model, x.view(-1, LENGTH)).flatten(0, 1)[None]
            logprobs = take(model(ids.flatten()[None]).view(8, LENGTH, VOCABULARY))
            del model.forward
        else:
            logprobs = take(model(ids))
        counts = 30.0
        mixed_loss = mixed.loss(
            logprobs=logprobs,
            old_logprobs=logprobs.detach() + data["shift"],
            advantages=data["advantages"],
            mask=data["mask"],
            is_expert=data["is_expert"],
            policy_loss=ppo(counts),
            sft_tokens=counts,
            **told,
        )
        mixed_loss.loss.backward()
        rows.append((data, ids))
    optimizer.step()
    return mixed, model, rows


def gradients_of_rows(rows):
    """By branch; rollouts of a prompt added up. In double precision."""
    model = TinyPolicy().double()
    found = [], []
    for data, ids in rows:
        own = {}
        for k in range(8):
            logp = model(ids[k : k + 1]).gather(-1, data["taken"][k : k + 1, :, None])[0, :, 0]
            mask = data["mask"][k].double()
            if k < 4:
                loss = -(logp * mask).sum() / 30
            else:
                old = logp.detach() + data["shift"][k].double()
                loss = ppo(30.0)(logp, old, data["advantages"][k].double(), mask)
            gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])
            if k < 4:
                found[0].append((gradient, mask.sum()))
            else:
                own[k % 2] = own.get(k % 2, 0.0) + gradient
        found[1].extend(own.values())
    return found


@pytest.mark.parametrize("packed", [False, True])
def test_sequences_of_a_mixed_batch_are_measured_at_the_layers(packed):
    mixed, model, rows = train_by_sequences(packed)
    statistics = mixed.mixer.statistics
    sft, rl = gradients_of_rows(rows)
    assert (float(statistics.n_s), float(statistics.n_r)) == (8, 4)
    tokens = torch.stack([t for _, t in sft])
    x, weight = torch.stack([g for g, _ in sft]), tokens / tokens.sum()
    sigma_s2 = ((x.square().sum(1) / weight).sum() - x.sum(0).square().sum()) / (8 - 1)
    y = torch.stack(rl)
    sigma_r2 = 4 * y.var(0).sum()
    assert float(statistics.sigma_s2) == pytest.approx(float(sigma_s2), rel=1e-4)
    assert float(statistics.sigma_r2) == pytest.approx(float(sigma_r2), rel=1e-4)
    distance2 = (x.sum(0) - y.sum(0)).square().sum()
    assert float(statistics.distance2) == pytest.approx(float(distance2), rel=1e-4)
    assert mixed.metrics()["gac/n_r"] == 4
    assert mixed.mixer.coverage.share == 1
    mixed.close()
    assert not any(module._forward_hooks for module in model.modules())


def test_what_sequences_of_a_mixed_batch_need():
    with pytest.raises(ValueError, match="coefficient or sequence, got 'sketch'"):
        MixedBatch(estimator="sketch")
    with pytest.raises(ValueError, match="sketch_size"):
        MixedBatch(estimator="sequence", sketch_size=5)
    mixed, data = MixedBatch(estimator="sequence"), batch()
    with pytest.raises(RuntimeError, match=r"call watch\(model\)"):
        loss_of(mixed, policy(), data)
    with pytest.raises(RuntimeError, match="feeds estimator"):
        mixed.observe(*torch.zeros(3, 2, 2), torch.zeros(2, dtype=torch.bool))
    model = policy()
    mixed.watch(model)
    loss_of(mixed, model, data).loss.backward()
    with pytest.raises(RuntimeError, match="another model"):
        mixed.watch(policy())
    with torch.no_grad():
        assert torch.isfinite(loss_of(mixed, model, data).loss)
    empty = loss_of(mixed, model, rows_of(data, slice(0, 0)))
    empty.loss.backward()
    mixed.step()
    assert mixed.mixer.controller.steps == 1
    mixed.close()

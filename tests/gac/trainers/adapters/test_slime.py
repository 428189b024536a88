"""The slime adapter, with a stand-in that has the signatures of slime 0.3.1; slime needs Megatron, so only that.

From slime/backends/megatron_utils/loss.py (``loss_function``, which calls ``func(args, batch, logits,
sum_of_sample_mean)`` and rescales; ``policy_loss_function``; ``get_log_probs_and_entropy``; the custom advantage
function) and cp_utils.py (``get_sum_of_sample_mean``).
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from gac.trainers.adapters import slime as adapter
from tests.gac.trainers.adapters.samples import clipped, losses_by_hand, row_mean, samples, token_mean


def get_log_probs_and_entropy(
    logits,
    *,
    args,
    unconcat_tokens,
    total_lengths,
    response_lengths,
    with_entropy=False,
    non_loss_data=True,
    top_p_token_ids=None,
    top_p_token_offsets=None,
):
    """The stand-in's 'logits' are the responses' log-probabilities, one after another."""
    return None, {"log_probs": list(logits[0].split(response_lengths))}


def policy_loss_function(args, batch, logits, sum_of_sample_mean):
    losses = clipped(logits[0], torch.cat(batch["log_probs"]), torch.cat(batch["advantages"]))
    loss = sum_of_sample_mean(losses)
    return loss, {"loss": loss.detach(), "pg_loss": loss.detach()}


def sum_of_sample_mean(batch, per_token):
    def reduce(x):
        parts = zip(x.split(batch["response_lengths"]), batch["loss_masks"], strict=True)
        return sum((part * mask).sum() / (1 if per_token else mask.sum().clamp(min=1)) for part, mask in parts)

    return reduce


def loss_function(args, batch, num_microbatches, step_global_batch_size, logits):
    """Loss and number of tokens, as Megatron takes them: it divides the former by the latter's sum when per token."""
    loss, log = adapter.loss(args, batch, logits, sum_of_sample_mean(batch, args.calculate_per_token_loss))
    if args.calculate_per_token_loss:
        return loss, sum(mask.sum() for mask in batch["loss_masks"]), log
    return loss * num_microbatches / step_global_batch_size, 1, log


@pytest.fixture(autouse=True)
def slime(package, monkeypatch):
    package(
        {
            "megatron.core": {"mpu": SimpleNamespace(get_data_parallel_group=lambda: None)},
            "slime.backends.megatron_utils.loss": {
                "get_log_probs_and_entropy": get_log_probs_and_entropy,
                "policy_loss_function": policy_loss_function,
            },
        }
    )
    monkeypatch.setattr(adapter, "_Run", type("_Run", (), {"mixed": None, "counts": None}))
    yield
    if adapter._Run.mixed is not None:
        adapter._Run.mixed.close()


def arguments(per_token=False, **options):
    return SimpleNamespace(calculate_per_token_loss=per_token, context_parallel_size=1, **options)


def rollout_data(s):
    """What the advantage function gets: responses without padding."""
    kept = [mask > 0 for mask in s.mask]
    return {
        "kl": [torch.zeros(int(k.sum())) for k in kept],
        "rewards": [float(a[0]) for a in s.advantages],
        "loss_masks": [mask[k] for mask, k in zip(s.mask, kept, strict=True)],
        "log_probs": [old[k] for old, k in zip(s.old_logprobs, kept, strict=True)],
        "source_names": ["demonstration" if e else "math" for e in s.is_expert],
    }


def micro_batch(data, s, rows):
    batch = {key: [data[key][r] for r in rows] for key in ("loss_masks", "log_probs", "advantages", "returns")}
    lengths = [len(mask) for mask in batch["loss_masks"]]
    batch |= {"response_lengths": lengths, "total_lengths": lengths, "unconcat_tokens": None}
    return batch, torch.cat([s.logprobs[r][s.mask[r] > 0] for r in rows])[None]


def train_step(args, s, cuts):
    data = rollout_data(s)
    adapter.advantages(args, data)
    total, tokens = 0.0, 0
    for rows in cuts:
        loss, number, log = loss_function(
            args, *(micro_batch(data, s, rows)[:1]), len(cuts), 4, micro_batch(data, s, rows)[1]
        )
        total, tokens = total + loss, tokens + number
    total = total / (tokens if args.calculate_per_token_loss else len(cuts))
    total.backward()
    return total.detach(), log


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("cuts", [[[0, 1, 2, 3]], [[0, 3], [1, 2]]], ids=["one", "two"])
def test_branches_are_means_over_their_own_samples_or_tokens(per_token, cuts):
    s, other = samples(), samples()
    total, log = train_step(arguments(per_token, gac={"law": "fixed", "mu": 0.3}), s, cuts)
    sft, rl = losses_by_hand(other)
    mean = token_mean if per_token else row_mean
    expected = 0.3 * mean(sft) + 0.7 * mean(rl)
    expected.backward()
    torch.testing.assert_close(total, expected.detach())
    torch.testing.assert_close(s.logprobs.grad, other.logprobs.grad)
    share = sum(float(s.mask[r].sum()) for r in cuts[-1]) if per_token else len(cuts[-1])
    assert float(log["gac/mu"]) == pytest.approx(0.3 * share), "slime divides it by the step's samples or tokens"
    assert "pg_loss" in log


def test_mu_follows_the_optimizer():
    s = samples()
    train_step(arguments(), s, [[0, 1], [2, 3]])
    before = float(adapter._Run.mixed.mu)
    torch.optim.SGD([s.logprobs], lr=0.0).step()
    assert float(adapter._Run.mixed.mu) != before
    assert adapter._Run.mixed.mixer.statistics.n_s == 2


@pytest.mark.parametrize("expert", [True, False])
def test_one_branch_alone(expert):
    s = samples()
    s.is_expert = torch.full_like(s.is_expert, expert)
    train_step(arguments(), s, [[0, 1, 2, 3]])
    assert s.logprobs.grad.isfinite().all()
    adapter._Run.mixed.step()
    assert torch.isfinite(adapter._Run.mixed.mu)


def test_errors():
    with pytest.raises(ValueError, match="--use-tis does not go"):
        adapter.mixed_batch(arguments(use_tis=True))
    with pytest.raises(ValueError, match="context parallelism"):
        adapter.mixed_batch(SimpleNamespace(context_parallel_size=2))
    with pytest.raises(ValueError, match=r"handed no model.*coefficient"):
        adapter.mixed_batch(SimpleNamespace(gac={"estimator": "sequence"}))
    data = rollout_data(samples())
    del data["source_names"]
    with pytest.raises(KeyError, match="source_name"):
        adapter.advantages(arguments(), data)
    with pytest.raises(RuntimeError, match="custom-advantage-function-path"):
        adapter.loss(arguments(), {}, torch.zeros(1, 2), None)

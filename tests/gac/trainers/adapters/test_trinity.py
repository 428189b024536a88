"""The Trinity-RFT adapter, with a stand-in that has the signatures of 0.6.0, and with Trinity where it is importable.

From trinity/algorithm/policy_loss_fn/mix_policy_loss.py (``MIXPolicyLossFn``) and policy_loss_fn.py (the metaclass that
reads the names of ``__call__``'s arguments).
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys

import pytest
import torch

from tests.gac.trainers.adapters.samples import CLIP, clipped, losses_by_hand, row_mean, samples

INSTALLED = importlib.util.find_spec("trinity") is not None and importlib.util.find_spec("ray") is not None
SIZES = {
    "ppo_mini_batch_size": 4,
    "ppo_micro_batch_size_per_gpu": 4,
    "train_batch_size_usual": 2,
    "train_batch_size_expert": 2,
}
ADAPTER = "gac.trainers.adapters.trinity"


class MIXPolicyLossFn:
    """Row-weighted means with a constant ``mu``, in the mode ``seq-mean-token-mean``."""

    def __init__(
        self,
        backend="verl",
        mu=0.1,
        clip_range=None,
        clip_range_low=None,
        clip_range_high=None,
        use_dynamic_bsz=None,
        ppo_mini_batch_size=1,
        ppo_micro_batch_size_per_gpu=1,
        ngpus_trainer=1,
        train_batch_size_usual=1,
        train_batch_size_expert=1,
        loss_agg_mode="token-mean",
        sft_loss_agg_mode=None,
        grpo_loss_agg_mode=None,
    ):
        self.mu = mu
        self.accumulation = ppo_mini_batch_size // ppo_micro_batch_size_per_gpu
        self.usual, self.expert = train_batch_size_usual, train_batch_size_expert

    def __call__(self, logprob, old_logprob, action_mask, advantages, expert_mask, **kwargs):
        def rows(losses, kept, size):
            means = (losses * action_mask).sum(1) / action_mask.sum(1)
            return means[kept].sum() * self.accumulation / size if kept.any() else torch.tensor(0.0)

        grpo = rows(clipped(logprob, old_logprob, advantages), ~expert_mask, self.usual)
        sft = rows(-logprob, expert_mask, self.expert)
        loss = (1 - self.mu) * grpo + self.mu * sft
        return loss, {"loss": loss.item()}

    @classmethod
    def default_args(cls):
        return {"mu": 0.1, "clip_range": 0.2, "loss_agg_mode": "token-mean"}


@pytest.fixture(params=["stand-in", *(["trinity"] if INSTALLED else [])])
def loss_cls(request, package, monkeypatch):
    monkeypatch.delitem(sys.modules, ADAPTER, raising=False)
    if request.param == "stand-in":
        package({"trinity.algorithm.policy_loss_fn.mix_policy_loss": {"MIXPolicyLossFn": MIXPolicyLossFn}})
    yield importlib.import_module(ADAPTER).GacMixPolicyLossFn
    sys.modules.pop(ADAPTER, None)


def call(loss_fn, s):
    return loss_fn(
        logprob=s.logprobs,
        old_logprob=s.old_logprobs,
        action_mask=s.mask,
        advantages=s.advantages,
        expert_mask=s.is_expert,
    )


def build(loss_cls, **options):
    return loss_cls(clip_range=CLIP, loss_agg_mode="seq-mean-token-mean", **SIZES, **options)


def test_loss_and_gradient(loss_cls):
    loss_fn, s, other = build(loss_cls, law="fixed", law_options={"mu": 0.3}), samples(), samples()
    loss, metrics = call(loss_fn, s)
    loss.backward()
    sft, rl = losses_by_hand(other)
    expected = 0.3 * row_mean(sft) + 0.7 * row_mean(rl)
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(s.logprobs.grad, other.logprobs.grad)
    assert metrics["gac/mu"] == pytest.approx(0.3)


def test_mu_follows_the_optimizer(loss_cls):
    loss_fn, s = build(loss_cls), samples()
    call(loss_fn, s)[0].backward()
    before = float(loss_fn.mixed.mu)
    torch.optim.SGD([s.logprobs], lr=0.0).step()
    after = float(loss_fn.mixed.mu)
    assert before != after
    assert call(loss_fn, s)[1]["gac/mu"] == pytest.approx(after)
    assert float(loss_fn.mu) == after
    loss_fn.mixed.close()


@pytest.mark.parametrize("expert", [True, False])
def test_one_branch_alone(loss_cls, expert):
    loss_fn, s = build(loss_cls), samples()
    s.is_expert = torch.full_like(s.is_expert, expert)
    loss, _ = call(loss_fn, s)
    loss.backward()
    assert s.logprobs.grad.isfinite().all()
    loss_fn.mixed.step()
    assert torch.isfinite(loss_fn.mixed.mu)
    loss_fn.mixed.close()


def test_what_trinity_reads_of_the_class(loss_cls):
    assert "mu" not in loss_cls.default_args()
    assert build(loss_cls, **{k: v for k, v in loss_cls.default_args().items() if k == "law"}).mixed is not None
    with pytest.raises(ValueError, match="set by the law"):
        build(loss_cls, mu=0.1)
    if hasattr(loss_cls, "select_keys"):  # made by Trinity's metaclass from the names of the arguments
        wanted = {"old_log_probs", "response_mask", "advantages", "expert_mask"}
        assert set(build(loss_cls).select_keys) == wanted
    else:
        names = list(inspect.signature(loss_cls.__call__).parameters)
        assert names == ["self", "logprob", "old_logprob", "action_mask", "advantages", "expert_mask", "kwargs"]


if INSTALLED:

    def test_found_by_its_path():
        from trinity.algorithm import POLICY_LOSS_FN

        found = POLICY_LOSS_FN.get(f"{ADAPTER}.GacMixPolicyLossFn")
        assert found.__name__ == "GacMixPolicyLossFn"

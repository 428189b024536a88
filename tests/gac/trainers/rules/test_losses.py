"""Token losses of the rules on tiny tensors, and their normalisation."""

import math

import pytest
import torch

from gac.losses import sft_token_loss
from gac.trainers.rules import LossTerms
from gac.trainers.rules.losses import clipped_surrogate, normalized, shaped_off_policy
from tests.gac.trainers.rules.test_selection import rule

LOG = math.log


def test_shaped_off_policy_loss_and_gradient():
    logprobs = torch.tensor([[LOG(0.1), LOG(0.9)], [LOG(0.4), LOG(1e-6)]], dtype=torch.float64, requires_grad=True)
    loss = shaped_off_policy(logprobs, torch.tensor([2.0, -1.0], dtype=torch.float64), 0.1)
    assert loss.tolist() == [pytest.approx([-2 * 0.5, -2 * 0.9]), pytest.approx([0.8, 1e-6 / 0.100001])]
    loss.sum().backward()
    slope = lambda p: 0.1 * p / (p + 0.1) ** 2  # of p / (p + 0.1) in log p
    expected = [[-2 * slope(0.1), -2 * slope(0.9)], [slope(0.4), slope(1e-6)]]
    torch.testing.assert_close(logprobs.grad, torch.tensor(expected, dtype=torch.float64))


def test_clipped_surrogate_stops_where_ppo_does():
    old = torch.zeros(1, 4)
    logprobs = torch.tensor([[0.0, LOG(1.5), LOG(0.5), LOG(1.1)]], requires_grad=True)
    better = clipped_surrogate(logprobs, old, torch.tensor([2.0]), (0.2, 0.3))
    assert better.tolist() == [pytest.approx([-2.0, -2.6, -1.0, -2.2])]
    worse = clipped_surrogate(logprobs, old, torch.tensor([-2.0]), (0.2, 0.3))
    assert worse.tolist() == [pytest.approx([2.0, 3.0, 1.6, 2.2])]
    better.sum().backward()
    assert logprobs.grad.tolist() == [pytest.approx([-2.0, 0.0, -1.0, -2.2])]


def test_normalisation_is_trls():
    losses = torch.tensor([[1.0, 2.0, 9.0], [4.0, float("nan"), 9.0]])
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    expected = {
        "grpo": (1.5 + 4.0) / 2 / 4,
        "sapo": (1.5 + 4.0) / 2 / 4,
        "bnpo": 7.0 / 3 / 4,
        "dr_grpo": 7.0 / (2 * 10) / 4,
        "luspo": 7.0 / 2 / 4,
        "dapo": 7.0 / 25,
        "cispo": 7.0 / 25,
        "vespo": 7.0 / 25,
    }
    for name, value in expected.items():
        got = normalized(losses, mask, name, step_tokens=25.0, micro_batches=4, max_length=10)
        assert got.item() == pytest.approx(value), name
    empty = normalized(losses, torch.zeros(2, 3), "dapo", step_tokens=25.0, micro_batches=4, max_length=10)
    assert empty.item() == 0.0
    with pytest.raises(ValueError, match="'other'"):
        normalized(losses, mask, "other", step_tokens=1.0, micro_batches=1, max_length=1)


def terms(inputs, logprobs, entropies, mask):
    tensors = {name: torch.tensor(value) for name, value in inputs.items()}
    return LossTerms(logprobs, torch.tensor(entropies), torch.tensor(mask), tensors, (0.2, 0.2))


def test_srft_weights_rollouts_by_their_entropy():
    logprobs = torch.full((3, 2), LOG(0.3), requires_grad=True)
    given = terms(
        {"gac_on_policy": [0.0, 1.0, -1.0], "gac_off_policy": [0.5, 0.0, 0.0]},
        logprobs,
        [[9.0, 9.0], [0.2, 0.6], [0.7, 5.0]],
        [[1, 1], [1, 1], [1, 0]],
    )
    losses = rule("srft").rl_terms(given)
    correct = 0.1 * math.exp(0.4)  # H is the mean over the row's unmasked tokens
    expected = [[-0.5 * 0.75] * 2, [-correct] * 2, [1.0] * 2]
    assert [row.tolist() for row in losses] == [pytest.approx(row) for row in expected]
    losses.sum().backward()
    slope = 0.1 * 0.3 / 0.4**2
    assert logprobs.grad[:, 0].tolist() == pytest.approx([-0.5 * slope, -correct, 1.0])


def test_srft_clips_against_the_policy_that_sampled():
    logprobs = torch.tensor([[0.0, LOG(2.0)], [0.0, LOG(2.0)]], requires_grad=True)
    given = terms(
        {"gac_on_policy": [1.0, -1.0], "gac_off_policy": [0.0, 0.0], "old_per_token_logps": [[0.0, 0.0]] * 2},
        logprobs,
        [[0.0, 0.0]] * 2,
        [[1, 1]] * 2,
    )
    losses = rule("srft", rl_weight=1.0).rl_terms(given)
    assert [row.tolist() for row in losses] == [pytest.approx([-1.0, -1.2]), pytest.approx([1.0, 2.0])]


def test_srft_weights_demonstrations_by_their_entropy():
    torch.manual_seed(0)
    logits = torch.randn(2, 4, 5, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([[-100, 1, 2, 3], [-100, -100, 4, -100]])
    loss = rule("srft").sft_loss(logits, labels, 7.0)
    entropy = torch.distributions.Categorical(logits=logits.detach()).entropy()
    means = [entropy[0, :3].mean(), entropy[1, 1]]
    nll = [
        torch.nn.functional.cross_entropy(logits[0, :3], labels[0, 1:], reduction="sum"),
        torch.nn.functional.cross_entropy(logits[1, 1:2], labels[1, 2:3], reduction="sum"),
    ]
    expected = sum(0.5 * math.exp(-h) * value for h, value in zip(means, nll, strict=True)) / 7.0
    torch.testing.assert_close(loss, expected)
    (gradient,) = torch.autograd.grad(loss, logits)
    (wanted,) = torch.autograd.grad(expected, logits)
    torch.testing.assert_close(gradient, wanted)  # the entropy's own gradient is not in it


@pytest.mark.parametrize("name", ["hpt", "srft", "relift"])
def test_no_demonstration_costs_nothing_and_can_be_differentiated(name):
    logits = torch.randn(1, 1, 5, requires_grad=True)
    loss = rule(name).sft_loss(logits, torch.tensor([[-100]]), 0.0)
    loss.backward()
    assert loss.item() == 0.0
    assert logits.grad.abs().max() == 0.0


def test_chord_phi_weights_tokens():
    logits = torch.tensor([[[0.0, LOG(3.0)], [0.0, 0.0]]])  # the label's probability is 3/4
    labels = torch.tensor([[-100, 1]])
    assert rule("chord-phi").sft_loss(logits, labels, 2.0).item() == pytest.approx(-0.75 * 0.25 * LOG(0.75) / 2)
    assert rule("hpt").sft_loss(logits, labels, 2.0) == sft_token_loss(logits, labels, num_tokens=2.0)

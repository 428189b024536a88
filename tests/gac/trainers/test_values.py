"""What demonstrations are worth: weights by hand, what they do not depend on, and the state."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gac.state import read
from gac.trainers.values import HALF_LIFE, DemonstrationValues, prompt_key

A, B, C = (prompt_key(text) for text in ("1+1=", "1+2=", "1+3="))


def told(*generations, scores=(1.0, 0.0, 1.0), prompts=(A, A, C)):
    values = DemonstrationValues(len(scores))
    for keys, rewards in generations:
        values.take_rollouts(keys, torch.tensor(rewards))
    values.take_scores(range(len(scores)), prompts, torch.tensor(scores))
    return values


def test_a_demonstration_weighs_what_it_is_above_the_policy():
    values = told(([A] * 4 + [B] * 4, [1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0]))
    # prompt C has no rollouts: the mean of all stands in
    assert values.weights([0, 1, 2]).tolist() == [0.75, 0.0, 1 - 3 / 8]
    values.take_rollouts([A] * 4, torch.tensor([1.0, 1.0, 1.0, 0.0]))  # the newest count
    kept = 0.5 ** (1 / HALF_LIFE)
    mean = (kept * 3 / 8 + 3 / 4) / (kept + 1)
    assert values.weights([2, 0]).tolist() == pytest.approx([1 - mean, 0.25], rel=1e-15)


def test_without_rollouts_the_lowest_reward_stands_in():
    assert told(scores=(3.0, 1.0, 2.0)).weights([0, 1, 2]).tolist() == [1.0, 0.0, 0.5]


def test_what_says_nothing_leaves_demonstrations_as_they_are():
    zeros = told(([A, A], [0.0, 0.0]), scores=(0.0, 0.0, 0.0))
    assert zeros.weights([0, 1, 2]).tolist() == [1.0, 1.0, 1.0]
    unjudged = told(([A, B], [0.0, 1.0]), scores=(math.nan, 0.0, 1.0))
    assert unjudged.weights([0, 1]).tolist() == [1.0, 0.0]
    for value in (math.inf, -math.inf):  # no finite number is no judgement, and no end of the range
        endless = told(([A, B, C], [0.0, 1.0, value]), scores=(value, 0.0, 1.0))
        assert endless.weights([0, 1, 2]).tolist() == [1.0, 0.0, 0.5]
    rollouts = told(([A, A, B], [math.nan, 0.5, math.nan]), scores=(1.0, 0.0, 1.0))
    assert rollouts.weights([0, 2]).tolist() == [0.5, 0.5]  # A's other rollout has a reward, B's has none


@settings(max_examples=60, deadline=None)
@given(
    rewards=st.lists(st.integers(-8, 8), min_size=2, max_size=9),
    scores=st.lists(st.integers(-8, 8), min_size=3, max_size=3),
    factor=st.sampled_from([0.25, 1.0, 64.0]),
    shift=st.integers(-1000, 1000),
)
def test_units_of_rewards_change_nothing_and_weights_are_shares(rewards, scores, factor, shift):
    """Factors and shifts are exact in float32; the mean of a few is rounded once or twice in float64."""
    keys = [(A, B, C)[k % 3] for k in range(len(rewards))]
    plain = told((keys, [float(x) for x in rewards]), scores=[float(x) for x in scores], prompts=(A, B, C))
    other = told(
        (keys, [factor * x + shift for x in rewards]), scores=[factor * x + shift for x in scores], prompts=(A, B, C)
    )
    weights = plain.weights([0, 1, 2])
    torch.testing.assert_close(other.weights([0, 1, 2]), weights, rtol=0, atol=1e-12)
    assert ((weights >= 0) & (weights <= 1)).all()
    by_prompt = {key: [r for k, r in zip(keys, rewards, strict=True) if k == key] for key in (A, B, C)}
    extent = max(*rewards, *scores) - min(*rewards, *scores)
    for weight, score, key in zip(weights.tolist(), scores, (A, B, C), strict=True):
        policy = np.mean(by_prompt[key] or rewards)
        assert weight == pytest.approx(max(score - policy, 0) / extent if extent else 1.0, abs=1e-12)


def test_keys_are_the_same_in_every_process():
    assert A == -6917944471448154088
    assert prompt_key([{"role": "user", "content": "1"}]) == prompt_key([{"content": "1", "role": "user"}])
    assert len({A, B, C, prompt_key([{"role": "user", "content": "1+1="}])}) == 4


def test_the_state_goes_on():
    values = told(([A] * 2 + [B], [1.0, 0.0, 0.5]))
    entries, saved = values.entries(), values.state_dict()
    after = DemonstrationValues(3)
    after.load_state_dict(read(saved, entries, then="try another"))
    for each in (values, after):
        each.take_rollouts([C], torch.tensor([0.25]))
    assert torch.equal(after.weights([0, 1, 2]), values.weights([0, 1, 2]))
    assert after.are_scored([0, 1, 2])
    assert all(
        torch.equal(x, after_x) for x, after_x in zip(*(v.state_dict().values() for v in (values, after)), strict=True)
    )
    fresh = DemonstrationValues(3)
    fresh.load_state_dict(read(fresh.state_dict(), entries, then="try another"))  # nothing seen yet: infinite bounds
    with pytest.raises(ValueError, match=r'"scores".*shape \(4,\), got \(3,\); try another'):
        read(saved, DemonstrationValues(4).entries(), then="try another")
    with pytest.raises(ValueError, match=r'"scored"\]\[1\] must be a whole number in \[0, 1\], got 0.5'):
        read(saved | {"scored": torch.tensor([0.0, 0.5, 1.0])}, entries, then="try another")


def test_scores_are_forgotten_on_request():
    values = told(([A], [0.5]))
    assert values.are_scored([0, 2])
    values.forget_scores()
    assert not values.are_scored([0])
    values.take_scores([0], [A], torch.tensor([0.0]))
    assert values.are_scored([0])
    assert not values.are_scored([0, 1])

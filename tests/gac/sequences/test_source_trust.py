"""Weights of sources: on gradients whose truth is known."""

import math

import pytest
import torch

from gac.sequences.source_trust import FEWEST, LEAST, WINDOW, SourceTrust
from gac.sequences.sources import SourceSums, cosine_of, products_with_rl, table_of
from gac.statistics.branch import Branch
from gac.statistics.trust import probability_right

SIZE, ROWS = 64, 8


class Steps:
    """Steps of three sources beside rollouts: one points with the reward, one against it, one aside."""

    def __init__(self, seed, *, noise=3.0, signal=1.0):
        self.draw = torch.Generator().manual_seed(seed)
        self.noise, self.signal = noise, signal
        reward = torch.zeros(SIZE)
        reward[0] = 1.0
        beside = torch.zeros(SIZE)
        beside[1] = 1.0
        self.truth = {"right": 0.5 * reward + beside, "wrong": -0.5 * reward + beside, "none": 2 * beside}
        self.reward = reward

    def rows(self, mean):
        return self.signal * mean + self.noise / SIZE**0.5 * torch.randn(ROWS, SIZE, generator=self.draw)

    def step(self, weights):
        tables = [w * self.rows(self.truth[label]) for label, w in zip(self.truth, weights, strict=True)]
        tables.append(self.rows(self.reward))
        table = torch.cat(tables)
        labels = [label for label in [*self.truth, "rollouts"] for _ in range(ROWS)]
        counts = torch.zeros(2, len(labels))
        counts[0, : 3 * ROWS] = counts[1, 3 * ROWS :] = 1.0
        squares = table.double().square().sum(1)
        sums = SourceSums()
        sums.take(labels, counts.double(), table, squares, torch.ones(2, dtype=torch.float64))
        totals = counts @ table
        return sums.record(totals, counts.double() @ squares, counts.double().sum(1))


def test_right_wrong_and_useless_sources_are_told_apart():
    """As the weights change what the steps show of the sources, and the truth does not."""
    trust = SourceTrust(["right", "wrong", "none", "unseen"])
    steps = Steps(0)
    for number in range(100):
        assert number >= FEWEST or all(known.weight == 1.0 for known in trust.known().values())
        trust.take(steps.step(trust.weights(["right", "wrong", "none"]).float()))
    right, wrong, none, unseen = trust.known().values()
    assert right.probability > 0.99
    assert right.weight == 1.0
    assert wrong.probability < 0.01
    assert wrong.weight == LEAST
    assert 0.05 < none.probability < 0.95
    assert (unseen.probability, unseen.weight) == (0.7, 1.0)
    assert math.isnan(unseen.product)
    for known, truth in ((right, 0.5), (wrong, -0.5), (none, 0.0)):
        assert abs(known.product - truth) < 4 * known.product_se
    assert trust.weights(["wrong", "right"]).tolist() == [wrong.weight, 1.0]


def test_errors_are_those_of_the_products():
    """Standardised products of many runs have a mean of 0 and a spread of 1, whatever weights the steps had."""
    found = []
    for seed in range(60):
        trust, steps = SourceTrust(["right", "wrong", "none"]), Steps(seed)
        for _ in range(40):
            trust.take(steps.step(trust.weights(["right", "wrong", "none"]).float()))
        known = zip(trust.known().values(), (0.5, -0.5, 0.0), strict=True)
        found += [(one.product - truth) / one.product_se for one, truth in known]
    values = torch.tensor(found, dtype=torch.float64)
    # standard errors of a mean and of a standard deviation of 180 numbers; Student's t of 39 widens by 2.7%
    assert abs(values.mean()) < 4 / len(values) ** 0.5
    assert abs(values.std() - 1.027) < 4 / (2 * len(values)) ** 0.5


def test_what_a_source_was_is_forgotten():
    trust, steps = SourceTrust(["right", "wrong", "none"]), Steps(1)
    for _ in range(60):
        trust.take(steps.step([1.0, 1.0, 1.0]))
    assert trust["wrong"].weight == LEAST
    steps.truth["wrong"] = steps.truth["right"]
    for _ in range(WINDOW + 10):
        trust.take(steps.step(trust.weights(["right", "wrong", "none"]).float()))
    assert trust["wrong"].steps == WINDOW
    assert trust["wrong"].weight == 1.0


def test_nothing_is_judged_without_evidence():
    """Noise alone: neither all of the weight nor none of it."""
    weights = []
    for seed in range(40):
        trust, steps = SourceTrust(["right", "wrong", "none"]), Steps(seed, signal=0.0)
        for _ in range(30):
            trust.take(steps.step([1.0, 1.0, 1.0]))
        weights += [known.weight for known in trust.known().values()]
    assert 0.6 < sum(weights) / len(weights) < 0.95
    assert sum(w == LEAST for w in weights) <= 6


def test_a_state_goes_on_alike():
    trust, steps = SourceTrust(["right", "wrong", "none"]), Steps(2)
    for _ in range(20):
        trust.take(steps.step([1.0, 1.0, 1.0]))
    again = SourceTrust(["right", "wrong", "none"])
    again.load_state_dict(trust.state_dict())
    step = steps.step([1.0, 1.0, 1.0])
    trust.take(step)
    again.take(step)
    assert again.known() == trust.known()
    torch.testing.assert_close(again.state_dict(), trust.state_dict(), rtol=0, atol=0, equal_nan=True)


def test_products_are_those_of_the_table():
    steps = [Steps(3).step([1.0, 1.0, 1.0]) for _ in range(5)]
    table = table_of(steps)
    for label in ("right", "wrong", "none"):
        own = [products_with_rl(step)[label, Branch.SFT] for step in steps]
        assert (table[label].cosine, table[label].cosine_se) == cosine_of(own)


@pytest.mark.parametrize("labels", [[], ["a", "a"]])
def test_labels_that_make_no_sense_are_refused(labels):
    with pytest.raises(ValueError, match="labels must name each source once"):
        SourceTrust(labels)


def test_a_probability_goes_with_the_evidence():
    c = torch.tensor([-3.0, -1.0, 0.0, 1.0, 3.0], dtype=torch.float64)
    found = probability_right(c, torch.ones(5, dtype=torch.float64), torch.ones(5, dtype=torch.float64), 0.7)
    assert (found.diff() > 0).all()
    unknown = probability_right(c[:1], torch.tensor([math.nan], dtype=torch.float64), c[-1:], 0.7)
    assert unknown.item() == pytest.approx(0.7)

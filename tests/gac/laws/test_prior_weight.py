"""A prior weighted by the standard error: the rule by hand, and what it gains over a fixed share.

``pytest tests/gac/laws/test_prior_weight.py -rP`` prints the table of docs/laws.md.
"""

from __future__ import annotations

import math

import pytest
import torch

import gac
from tests.gac.laws.draws import Truth, estimates

S = gac.Statistics
FREE = {"cap": 1.0, "mu_min": 0.0, "mu_max": 1.0}


def test_the_rule_by_hand():
    """s = 1, r = 3: mu = .75, mu_se = sqrt(.25*V_r + .25*V_s + (1/16)*V_D)/4 = .1 for V = (.16, .16, 1.28)."""
    controller = gac.Controller("gac", prior=0.25, prior_sd=0.3, **FREE)
    errors = {"sigma_s2_se": 0.4, "sigma_r2_se": 0.4, "distance2_se": math.sqrt(1.28)}
    mu = controller.update(S(1.0, 3.0, 0.0, **errors))
    assert float(controller.law.state["mu_se"]) == pytest.approx(0.1)
    assert float(mu) == pytest.approx(0.75 + 0.1 * (0.25 - 0.75), rel=1e-12)


@pytest.mark.parametrize(
    ("error", "expected"),
    [(0.0, 0.75), (math.nan, 0.5), (1e200, 0.25), (1e-200, 0.75)],
    ids=["sure", "unknown: half", "unsure", "all but sure"],
)
def test_its_ends(error, expected):
    errors = dict.fromkeys(("sigma_s2_se", "sigma_r2_se", "distance2_se"), error)
    mu = gac.Controller("gac", prior=0.25, **FREE).update(S(1.0, 3.0, 0.0, **errors))
    assert float(mu) == pytest.approx(expected)


def test_a_number_fixes_the_share():
    errors = dict.fromkeys(("sigma_s2_se", "sigma_r2_se", "distance2_se"), 1e-9)
    mu = gac.Controller("gac", prior=0.25, prior_weight=0.3, **FREE).update(S(1.0, 3.0, 0.0, **errors))
    assert float(mu) == pytest.approx(0.7 * 0.75 + 0.3 * 0.25)


def test_priors_from_the_device():
    """A tensor is not read: clipped to [0, 1], and no prior at all where it is not finite."""
    for prior, expected in ((torch.tensor(2.0), 1.0), (torch.tensor(math.nan), 0.5), (torch.tensor(0.25), 0.25)):
        for name, options in (("gac", {"prior_weight": 1.0}), ("paper", {"blend": 0.0, "mu_max": 1.0})):
            options = {"mu_change_cap": 1.0} | options if name == "paper" else FREE | options
            mu = gac.Controller(name, **options).update(S(1.0, 1.0, 0.0), prior=prior)
            assert float(mu) == pytest.approx(expected), (name, prior)


RULES = {"none": 0.0, "half": 0.5, "alone": 1.0, "se .1": (0.1,), "se .2": (0.2,), "se .3": (0.3,)}
MISSES = (0.0, 0.1, 0.2, 0.4)
DIRECTIONS = (1, 4, 20, 200)
"""Independent directions of the noise: the fewer, the noisier a step's statistics."""


def _excess(truth: Truth, raw: torch.Tensor, error: torch.Tensor, rule: float | tuple, miss: float) -> float:
    """Error of the mixed gradient above the oracle's, in percent, averaged over runs, steps and both sides."""
    weight = error**2 / (error**2 + rule[0] ** 2) if isinstance(rule, tuple) else rule
    best = truth.mu()
    off = [(1 - weight) * (raw - best) + weight * side * miss for side in (-1, 1)]
    squared = torch.stack([torch.as_tensor(x).square().mean() for x in off]).mean()
    return float(100 * squared * truth.distance2 / truth.error(best))


def test_what_it_gains():
    """Over the first 20 steps of runs with s = 1, r = 4, delta = 1 (mu* = .75), by how far the prior misses mu*.

    What the default rests on: a prior that is right helps; one that is off by its ``prior_sd`` costs next to nothing
    wherever the estimate is worth anything; one that is off by twice as much costs far less than half the prior would.
    With all noise along a single direction the first estimates are too poor to overrule a prior, right or wrong.
    """
    table: dict[tuple[int, float], dict[str, float]] = {}
    for directions in DIRECTIONS:
        truth = Truth(1.0, 4.0, 1.0, directions)
        raw, error = estimates(truth, runs=40, steps=20, seed=directions)
        for miss in MISSES:
            row = {name: _excess(truth, raw, error, rule, miss) for name, rule in RULES.items()}
            table[directions, miss] = row
            print(
                f"| {directions} | {(raw - truth.mu()).square().mean().sqrt():.3f} | {miss} | "
                + " | ".join(f"{value:.2f}" for value in row.values())
                + " |"
            )
    for directions in DIRECTIONS:
        right, off, far = (table[directions, miss] for miss in (0.0, 0.2, 0.4))
        assert right["se .2"] < right["none"]
        assert off["half"] > 6.0, "a fixed share costs a quarter of the prior's error for ever"
        if directions >= 4:
            assert off["se .2"] <= 1.2 * off["none"]
            assert far["se .2"] < far["half"] / 3
    total = {name: sum(row[name] for row in table.values()) for name in RULES}
    assert total["se .2"] < total["half"] < total["alone"]


def test_the_law_blends_as_the_table_does():
    truth = Truth(1.0, 4.0, 1.0, directions=4)
    raw, error = estimates(truth, runs=1, steps=5, prior=0.4)
    drawn = truth.draw(1, 5, generator=torch.Generator().manual_seed(0))
    controller = gac.Controller("gac", prior=0.4, **FREE)
    for step in range(5):
        mu = float(controller.update(S(**{name: value[0, step] for name, value in drawn.items()})))
        weight = error[0, step] ** 2 / (error[0, step] ** 2 + 0.2**2)
        assert mu == pytest.approx(float(raw[0, step] + weight * (0.4 - raw[0, step])), rel=1e-9)

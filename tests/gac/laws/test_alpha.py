"""``alpha="kl"``: the rule by hand, and what it promises: smooth, bounded, with hysteresis."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

import gac
from gac.laws.gac import ALPHA_MAX, ALPHA_MIN, KL_TARGET


def after(*kls: float) -> float:
    """alpha after steps with these KL divergences."""
    controller = gac.Controller(law="gac", alpha="kl")
    for kl in kls:
        controller.update(None, kl=kl)
    return float(controller.law.state["alpha"])


def test_alpha_follows_kl():
    controller = gac.Controller(law="gac", alpha="kl", cap=1.0)
    statistics = gac.Statistics(sigma_s2=1.0, sigma_r2=1.0, delta_g2=98.0)
    alpha = lambda: float(controller.law.state["alpha"])
    controller.update(statistics, kl=0.021)
    assert alpha() == 0.5, "inside the dead band"
    controller.update(statistics, kl=0.121)  # smoothed: 0.9 * 0.021 + 0.1 * 0.121 = 0.031, error 0.55
    assert alpha() == pytest.approx(0.5 + 0.2 * 0.45 * 0.45)
    assert float(controller.mu) == pytest.approx((alpha() * 98 + 1) / 100)
    for _ in range(300):
        controller.update(statistics, kl=1.0)
    assert 0.9 < alpha() <= 0.95
    for _ in range(300):
        controller.update(statistics, kl=0.0)
    assert 0.10 <= alpha() < 0.11
    with pytest.raises(ValueError, match="follows kl"):
        controller.update(statistics)


def test_the_way_down_by_hand():
    """KL 0.01: e = -.5, so alpha loses .30 * .4 * (.5 - .1)."""
    assert after(0.01) == pytest.approx(0.5 - 0.3 * 0.4 * 0.4)


def test_it_is_smooth():
    """Over all KL up to twice the target, alpha changes by at most its slope: .3 * (alpha - .1) a unit of error."""
    alphas = [after(KL_TARGET * k / 100) for k in range(201)]
    jumps = [abs(b - a) for a, b in itertools.pairwise(alphas)]
    assert max(jumps) <= 0.3 * 0.4 / 100 + 1e-9
    assert alphas == sorted(alphas)


def test_it_is_bounded():
    generator = torch.Generator().manual_seed(0)
    controller = gac.Controller(law="gac", alpha="kl")
    for kl in (10 ** (6 * torch.rand(300, generator=generator) - 5)).tolist():
        controller.update(None, kl=kl)
        assert ALPHA_MIN <= float(controller.law.state["alpha"]) <= ALPHA_MAX
    assert after(*[1e300] * 400) <= ALPHA_MAX
    assert after(*[0.0] * 400) >= ALPHA_MIN


def test_it_has_hysteresis():
    """The same KL in the end, inside the dead band: alpha remembers from where it came, and does not chatter."""
    from_above = after(*[0.1] * 20, *[KL_TARGET] * 200)
    from_below = after(*[0.0] * 20, *[KL_TARGET] * 200)
    assert from_above > 0.8
    assert from_below < 0.2
    wobble = [KL_TARGET * (1 + 0.09 * (-1) ** k) for k in range(50)]
    assert after(*wobble) == 0.5


def test_an_unknown_kl_moves_nothing():
    assert after(math.nan, math.inf) == 0.5
    assert after(0.01, math.nan) == pytest.approx(after(0.01, 0.01), abs=0.05)

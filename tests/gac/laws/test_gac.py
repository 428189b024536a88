"""The default law: hand-computed values, and mu finite and bounded whatever it is fed."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gac

S = gac.Statistics
NAN = math.nan


def free(**options) -> gac.Controller:
    """Without guardrails, so that mu is the blend itself."""
    return gac.Controller(law="gac", **{"cap": 1.0, "mu_min": 0.0, "mu_max": 1.0} | options)


def test_closed_form_minimises_the_expected_error():
    s, r, d, alpha = 2.0, 3.0, 5.0, 0.3
    mu = float(free(alpha=alpha).update(S(sigma_s2=s, sigma_r2=r, delta_g2=d)))
    assert mu == pytest.approx((alpha * d + r) / (d + s + r))

    def error(m):
        return (m - alpha) ** 2 * d + m**2 * s + (1 - m) ** 2 * r

    assert error(mu) < min(error(mu - 1e-4), error(mu + 1e-4))


def test_averages_are_bias_corrected_and_clamped_after_smoothing():
    controller = free(half_life=1.0)
    controller.update(S(sigma_s2=1.0, sigma_r2=4.0, delta_g2=-3.0))
    assert controller.law.smoothed().tolist() == pytest.approx([1.0, 4.0, 0.0])
    controller.update(S(sigma_s2=4.0, sigma_r2=4.0, delta_g2=6.0))
    # weights 1/4 and 1/2 of the two measurements, over 3/4
    assert controller.law.smoothed().tolist() == pytest.approx([3.0, 4.0, 3.0])
    assert float(controller.mu) == pytest.approx((0.5 * 3 + 4) / 10)


def test_half_life_is_in_steps_also_when_few_are_measured():
    every, fourth = free(half_life=8.0), free(half_life=8.0)
    for controller, gap in ((every, 1), (fourth, 4)):
        for _ in range(100):
            controller.update(S(sigma_s2=1.0, sigma_r2=1.0, delta_g2=0.0))
        for k in range(8):
            measured = (k + 1) % gap == 0
            controller.update(S(sigma_s2=3.0, sigma_r2=1.0, delta_g2=0.0) if measured else None)
        assert float(controller.law.smoothed()[0]) == pytest.approx(2.0, rel=1e-3), "half old, half new"


def test_cap_bounds_and_start():
    controller = gac.Controller(law="gac", cap=0.02, start=0.5)
    mus = [float(controller.update(S(sigma_s2=0.0, sigma_r2=1.0, delta_g2=0.0))) for _ in range(40)]
    assert mus[0] == pytest.approx(0.52)
    assert mus[-1] == pytest.approx(0.95)
    steps = [b - a for a, b in zip([0.5, *mus], mus, strict=False)]
    assert max(steps) <= 0.02 + 1e-12


def test_prior():
    controller = free(prior=0.2, prior_weight=0.25)
    assert float(controller.update(None)) == pytest.approx(0.2), "before the first measurement the prior alone"
    mu = controller.update(S(sigma_s2=1.0, sigma_r2=3.0, delta_g2=0.0))
    assert float(mu) == pytest.approx(0.75 * 0.75 + 0.25 * 0.2)
    mu = controller.update(S(sigma_s2=1.0, sigma_r2=3.0, delta_g2=0.0), prior=1.0, alpha=0.1)
    assert float(mu) == pytest.approx(0.75 * 0.75 + 0.25)
    scheduled = free(prior={"warmup": 0, "decay": 10, "peak": 0.9, "valley": 0.1}, prior_weight=1.0)
    scheduled.update(None)
    assert float(scheduled.mu) == pytest.approx(gac.schedules.warmup_cosine(1, 0, 10, 0.9, 0.1))


def test_without_knowledge_mu_stays():
    for statistics in (None, S(), S(sigma_s2=1.0), S(sigma_s2=1.0, sigma_r2=1.0), S(0.0, 0.0, 0.0)):
        controller = gac.Controller(law="gac", start=0.4)
        assert float(controller.update(statistics)) == pytest.approx(0.4)


def test_a_branch_missing_for_a_hundred_steps():
    controller = gac.Controller(law="gac")
    for _ in range(50):
        controller.update(S(sigma_s2=1.0, sigma_r2=2.0, delta_g2=1.0))
    known = float(controller.mu)
    for _ in range(100):
        controller.update(S(sigma_s2=1.0))
    assert float(controller.mu) == pytest.approx(known)


edge = st.sampled_from([0.0, 1e-30, 1e-300, 5e-324, 1e30, 1.0, -1.0, -1e30, NAN, math.inf, -math.inf])


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(edge, edge, edge, st.sampled_from([0.0, 0.0, 0.0, 2.0])), min_size=1, max_size=8))
def test_mu_is_finite_and_bounded_whatever_comes(rows):
    controller = gac.Controller(law="gac", prior=0.3)
    last = 0.5
    for sigma_s2, sigma_r2, delta_g2, nonfinite in rows:
        mu = float(controller.update(S(sigma_s2, sigma_r2, delta_g2, nonfinite=nonfinite)))
        assert 0.05 <= mu <= 0.95
        assert abs(mu - last) <= 0.02 + 1e-12
        if nonfinite:
            assert mu == last
        last = mu


def test_smoothing_before_clamping_is_less_biased():
    """delta_g2 = 0.2 under noise of size 1: the clamped values average far above the truth."""
    generator = torch.Generator().manual_seed(0)
    draws = 0.2 + torch.randn(4000, generator=generator)
    controller = free(half_life=50.0)
    ours, clamped_first = [], 0.0
    for k, draw in enumerate(draws.tolist()):
        controller.update(S(sigma_s2=1.0, sigma_r2=1.0, delta_g2=draw))
        clamped_first += max(draw, 0.0) / len(draws)
        if k > 400:
            ours.append(float(controller.law.smoothed()[2]))
    assert abs(sum(ours) / len(ours) - 0.2) < 0.05
    assert clamped_first > 0.45


def test_state_round_trip(tmp_path):
    a, b = gac.Controller(law="gac"), gac.Controller(law="gac")
    for k in range(5):
        a.update(S(sigma_s2=1.0 + k, sigma_r2=2.0, delta_g2=0.5))
    torch.save(a.state_dict(), tmp_path / "c.pt")
    b.load_state_dict(torch.load(tmp_path / "c.pt", weights_only=True))
    statistics = S(sigma_s2=7.0, sigma_r2=2.0, delta_g2=0.5)
    assert torch.equal(a.update(statistics), b.update(statistics))
    assert a.steps == b.steps == 6
    with pytest.raises(ValueError, match="lacks"):
        b.load_state_dict({"law": "gac"})


def test_wrong_arguments():
    controller = gac.Controller()
    with pytest.raises(TypeError, match=r"gac.Statistics"):
        controller.update({"sigma_s2": 1.0})
    with pytest.raises(ValueError, match=r"prior must be in \[0, 1\]"):
        controller.update(None, prior=2.0)
    with pytest.raises(ValueError, match="one number"):
        S(sigma_s2=torch.zeros(3))

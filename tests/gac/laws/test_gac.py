"""The default law: its rule by hand-computed values. test_edges.py feeds it impossible numbers."""

from __future__ import annotations

import math

import pytest
import torch

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


def test_smoothing_before_clamping_is_less_biased():
    """delta_g2 = 0.2 under noise of size 1: the clamped values average far above the truth."""
    generator = torch.Generator().manual_seed(0)
    draws = 0.2 + torch.randn(2500, generator=generator)
    controller = free(half_life=50.0)
    ours, clamped_first = [], 0.0
    for k, draw in enumerate(draws.tolist()):
        controller.update(S(sigma_s2=1.0, sigma_r2=1.0, delta_g2=draw))
        clamped_first += max(draw, 0.0) / len(draws)
        if k > 400:
            ours.append(float(controller.law.smoothed()[2]))
    assert abs(sum(ours) / len(ours) - 0.2) < 0.05
    assert clamped_first > 0.45


def test_wrong_arguments():
    controller = gac.Controller()
    with pytest.raises(ValueError, match="lacks"):
        controller.load_state_dict({"law": "gac"})
    with pytest.raises(TypeError, match=r"gac.Statistics"):
        controller.update({"sigma_s2": 1.0})
    with pytest.raises(ValueError, match=r"prior must be in \[0, 1\]"):
        controller.update(None, prior=2.0)
    with pytest.raises(ValueError, match="one number"):
        S(sigma_s2=torch.zeros(3))

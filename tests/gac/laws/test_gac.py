"""The default law: its rule by hand-computed values. test_edges.py feeds it impossible numbers."""

from __future__ import annotations

import itertools
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


@pytest.mark.parametrize("gap", [1, 4])
def test_half_life_is_in_steps_also_when_few_are_measured(gap):
    """Eight steps on, what 100 measured steps left has half its weight; each measurement since has that of its age."""
    controller = free(half_life=8.0)
    keep = 2 ** (-1 / 8)
    for _ in range(100):
        controller.update(S(sigma_s2=1.0, sigma_r2=1.0, delta_g2=0.0))
    for k in range(8):
        measured = (k + 1) % gap == 0
        controller.update(S(sigma_s2=3.0, sigma_r2=1.0, delta_g2=0.0) if measured else None)
    old = 0.5 * sum(keep**age for age in range(100))
    new = sum(keep**age for age in range(0, 8, gap))
    assert float(controller.law.smoothed()[0]) == pytest.approx((old + 3 * new) / (old + new), rel=1e-12)


def test_a_late_first_measurement_is_one_measurement():
    """However long it took: the second counts as much, up to its age."""
    controller = free(half_life=1.0)
    for _ in range(1000):
        controller.update(None)
    controller.update(S(1.0, 1.0, 0.0))
    controller.update(S(4.0, 4.0, 0.0))
    assert controller.law.smoothed().tolist() == pytest.approx([3.0, 3.0, 0.0])


RAW_0, RAW_1 = S(1.0, 0.0, 0.0), S(0.0, 1e9, 0.0)  # the latter outweighs any number of the former


def test_cap_bounds_and_start():
    controller = gac.Controller(law="gac", cap=0.02, start=0.5)
    mus = [float(controller.update(RAW_0)) for _ in range(100)]
    assert mus[0] == pytest.approx(0.05), "nothing speaks for the start once something is measured"
    mus = [mus[-1]] + [float(controller.update(RAW_1)) for _ in range(60)]
    assert mus[-1] == pytest.approx(0.95)
    keep = 2 ** (-1 / 69)
    extra = [(1 - keep) * keep ** (n - 1) / (1 - keep**n) for n in range(101, 161)]
    assert extra[0] < 0.006, "about 1/100 or less"
    steps = [b - a for a, b in itertools.pairwise(mus)]
    reached = next(k for k, mu in enumerate(mus) if mu == mus[-1])
    assert steps[: reached - 1] == pytest.approx([0.02 + x for x in extra[: reached - 1]])


def test_steps_until_the_averages_have_settled_by_hand():
    """Half-life 1. Shares of the newest 1, 2/3, 4/7; left of 1 since the first: 1, 1/2, 1/4."""
    controller = gac.Controller("gac", half_life=1.0, cap=0.02, mu_min=0.0, mu_max=1.0)
    assert float(controller.update(RAW_0)) == pytest.approx(0.0)
    assert float(controller.update(RAW_1)) == pytest.approx(0.02 + 1 / 3)
    assert float(controller.update(RAW_1)) == pytest.approx(0.04 + 1 / 3 + 1 / 7)
    assert float(controller.update(None)) == pytest.approx(0.06 + 1 / 3 + 1 / 7), "not measured: the cap alone"


def test_a_measurement_after_a_gap_adds_its_share_times_what_is_left():
    """Half-life 1, two steps apart: shares 1, 4/5; left 1, 1/4."""
    controller = gac.Controller("gac", half_life=1.0, cap=0.0, mu_min=0.0, mu_max=1.0)
    controller.update(RAW_0)
    controller.update(None)
    assert float(controller.update(RAW_1)) == pytest.approx(4 / 5 * 1 / 4)


def test_one_measurement_gives_no_licence_for_later_steps():
    """A branch measured once and then away: whatever else moves the target, mu moves by the cap."""
    controller = gac.Controller("gac", cap=0.02)
    controller.update(S(1.0, 1.0, 98.0))
    assert float(controller.mu) == pytest.approx(0.5)
    for k in range(100):
        before = float(controller.mu)
        told = S(sigma_s2=1.0) if k % 2 else None
        controller.update(told, alpha=float(k % 20 < 10))
        # the other branch has its own measurements, of which this is the n-th
        assert abs(float(controller.mu) - before) <= 0.02 + (1 / (1 + (k + 1) // 2) if told else 0.0) + 1e-12


def test_a_branch_that_returns_adds_nothing_again():
    controller = gac.Controller("gac", half_life=7.0, cap=0.02)
    for _ in range(50):
        controller.update(RAW_0)
    for _ in range(1000):
        controller.update(S(sigma_s2=1.0))
    mus = [float(controller.mu)] + [float(controller.update(RAW_1)) for _ in range(5)]
    assert [b - a for a, b in itertools.pairwise(mus)] == pytest.approx([0.02] * 5, abs=1e-3)


def test_measurements_of_another_number_do_not_use_it_up():
    """One branch alone for 200 steps, then both: mu goes where the first complete measurement says."""
    controller = gac.Controller("gac")
    for _ in range(200):
        assert float(controller.update(S(sigma_s2=1.0))) == 0.5
    assert float(controller.update(S(1.0, 9.0, 0.0))) == pytest.approx(0.9)


def test_a_prior_moves_by_the_cap():
    """Only the estimate's share in the blend is news."""
    alone = gac.Controller("gac", prior=0.1, prior_weight=1.0)
    assert float(alone.update(S(sigma_s2=1.0))) == pytest.approx(0.48)
    assert float(alone.update(RAW_1)) == pytest.approx(0.46)
    half = gac.Controller("gac", prior=0.1, prior_weight=0.5, start=0.9)
    assert float(half.update(S(sigma_s2=1.0))) == pytest.approx(0.88), "no estimate yet"
    assert float(half.update(S(1.0, 0.0, 0.0))) == pytest.approx(0.36), "from .88 by .02 and half of 1"


def test_a_step_with_nonfinite_gradients_does_not_count():
    controller = gac.Controller("gac", half_life=1.0, cap=0.0, mu_min=0.0, mu_max=1.0)
    assert float(controller.update(S(1.0, 0.0, 0.0, nonfinite=3.0))) == 0.5
    assert float(controller.update(RAW_0)) == pytest.approx(0.0), "still the first measurement"


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


@pytest.mark.parametrize("half_life", ["auto", 5.0])
def test_an_estimate_is_made_once_and_again_where_something_changed(half_life, monkeypatch):
    """Steps between measurements are most steps at a large interval; their host time is what GAC costs then."""
    kept, again = gac.Controller(law="gac", half_life=half_life), gac.Controller(law="gac", half_life=half_life)
    monkeypatch.setattr(again.law, "_is_estimated", lambda alpha: False)
    made, estimate = [], kept.law._estimate
    monkeypatch.setattr(kept.law, "_estimate", lambda alpha: made.append(1) or estimate(alpha))
    told = S(sigma_s2=1.0, sigma_r2=9.0, delta_g2=2.0, sigma_s2_se=0.1, sigma_r2_se=0.2, distance2_se=0.3)

    def update(statistics=None, **options):
        made.clear()
        for controller in (kept, again):
            controller.update(statistics, **options)
        for name, value in again.law.state.items():
            torch.testing.assert_close(kept.law.state[name], value, rtol=0, atol=0, equal_nan=True)
        return len(made)

    assert update(told) == 1
    assert [update() for _ in range(3)] == [0, 0, 0]
    assert update(alpha=0.25) == 1
    assert update(alpha=torch.tensor(0.25)) == 1  # who knows what is in it
    assert kept.law._is_estimated(0.5) is False, "a tensor would be read on the host"
    assert update() == 1
    assert update() == 0
    kept.law.momentum = again.law.momentum = 0.9
    assert update() == 1
    assert update(told) == 1
    assert update() == 0
    kept.load_state_dict(kept.state_dict())
    assert update() == 1

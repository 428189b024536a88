"""Intervals and tests against simulation, and the pieces against known values."""

import math

import numpy as np
import pytest

from benchmarks.study.inference import compare, hedges, holm, interval, sign_flip, spearman, t_cdf, t_quantile


@pytest.mark.parametrize(
    ("p", "dof", "value"),
    [
        (0.975, 1, 12.7062),
        (0.975, 2, 4.30265),
        (0.975, 4, 2.77645),
        (0.975, 19, 2.09302),
        (0.95, 10, 1.81246),
        (0.995, 120, 2.61742),
    ],
)
def test_t_quantiles(p, dof, value):
    assert t_quantile(p, dof) == pytest.approx(value, abs=1e-4)
    assert t_quantile(1 - p, dof) == pytest.approx(-value, abs=1e-4)


def test_t_of_one_and_two_degrees_in_closed_form():
    for t in (-3.0, 0.1, 2.0):
        assert t_cdf(t, 1) == pytest.approx(0.5 + math.atan(t) / math.pi, abs=1e-12)
        assert t_cdf(t, 2) == pytest.approx(0.5 + t / (2 * math.sqrt(2 + t * t)), abs=1e-12)
    with pytest.raises(ValueError, match="dof positive"):
        t_quantile(0.9, 0)


def test_holm_by_hand():
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005}) == pytest.approx(
        {"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02}
    )
    assert holm({"a": 0.9, "b": 0.8}) == {"a": 1.0, "b": 1.0}


def test_interval_by_hand():
    # variances of the means 1/3 and 4/3, so 0.5 * sqrt(5/3), and (5/3)^2 / ((1/3)^2 / 2 + (4/3)^2 / 2) degrees
    groups = [np.array([0.0, 1.0, 2.0]), np.array([3.0, 5.0, 7.0])]
    mean, low, high = interval(groups)
    assert mean == 3.0
    assert high - mean == pytest.approx(mean - low) == pytest.approx(t_quantile(0.975, 50 / 17) * math.sqrt(5 / 3) / 2)


def test_interval_needs_two_pairs_somewhere():
    assert all(math.isnan(value) for value in interval([np.array([1.0]), np.array([2.0])])[1:])
    _, low, high = interval([np.array([1.0, 3.0]), np.array([2.0])])  # pooled variance 2 with one degree
    assert high - low == pytest.approx(2 * t_quantile(0.975, 1) * math.sqrt(2 / 2 + 2) / 2)


@pytest.mark.parametrize("spread", [(1.0, 1.0, 1.0, 1.0), (0.2, 0.5, 1.0, 3.0)])
def test_coverage(spread):
    """Task means far apart and unequal noise: the interval is about seeds, and covers what it should."""
    random, means, runs = np.random.default_rng(1), np.array([-3.0, 0.0, 1.0, 4.0]), 1500
    hits = 0
    for _ in range(runs):
        groups = [random.normal(mean, scale, 5) for mean, scale in zip(means, spread, strict=True)]
        _, low, high = interval(groups)
        hits += low <= means.mean() <= high
    assert 0.93 < hits / runs < 0.975


@pytest.mark.parametrize("seeds", [3, 5])
def test_size_of_the_sign_flip_test(seeds):
    """Exact (12 pairs) and with random flips (20): under no difference p is below 0.05 in 5% of runs."""
    random, runs = np.random.default_rng(2), 250 if seeds == 5 else 600
    scales = np.array([0.2, 0.5, 1.0, 3.0])[:, None]
    p = [sign_flip(list(random.standard_t(3, (4, seeds)) * scales)) for _ in range(runs)]
    assert abs(np.mean(np.array(p) < 0.05) - 0.05) < 3 * math.sqrt(0.05 * 0.95 / runs)


def test_sign_flip_counts():
    assert sign_flip([np.array([1.0, 2.0, 3.0, 4.0])]) == 2 / 16
    assert sign_flip([np.array([-1.0, 1.0])]) == 1.0
    strong = [np.full(10, 1.0), np.full(10, 2.0)]
    assert sign_flip(strong) == sign_flip(strong) == pytest.approx(1 / 20_000)


def test_comparison_of_two_tasks():
    found = compare({"a": [0.1, 0.3], "b": [0.0, -0.2, 0.4]})
    assert found.mean == pytest.approx((0.2 + 0.2 / 3) / 2)
    assert found.by_task == pytest.approx({"a": 0.2, "b": 0.2 / 3})
    assert (found.pairs, found.won) == (5, pytest.approx(3.5 / 5))
    spread = math.sqrt((0.02 + 0.56 / 3) / 3)
    assert found.effect == pytest.approx(found.mean / spread * hedges(3))
    assert found.tasks_low < found.low


def test_hedges_and_ranks():
    assert hedges(4) == pytest.approx(0.79788, abs=1e-5)
    assert hedges(19) == pytest.approx(1 - 3 / 75, abs=1e-3)
    assert spearman([1, 2, 3, 4], [10, 20, 20, 90]) == pytest.approx(0.94868, abs=1e-5)
    assert math.isnan(spearman([1, 2], [1, 2]))


@pytest.mark.parametrize("bad", [{}, {"a": []}, {"a": [0.1, math.nan]}])
def test_refused(bad):
    with pytest.raises(ValueError, match="differences"):
        compare(bad)

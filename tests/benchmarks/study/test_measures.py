"""Measures of hand-made records."""

import math

import pytest

from benchmarks.study.measures import late_accuracy, read_run
from tests.benchmarks.study.fakes import record


def _small(**changes):
    """Four steps with everything in plain sight."""
    made = record(
        steps=4,
        accuracy=[[0, 0.4], [1, 0.5], [3, 0.7], [4, 0.3]],
        kl=[[0, 0.0], [2, 0.1], [4, 0.3]],
        mu=[0.5, 0.506, 0.4, 0.9],  # of steps 2, 3, 4, and of a fifth that is never made
        seconds_per_step=0.2,
        gac_share=0.01,
    )
    return made | changes


def test_by_hand():
    found = read_run(_small()).measures
    assert (found.warm, found.final) == (0.4, 0.3)
    assert found.area == pytest.approx((0.45 + 2 * 0.6 + 0.5) / 4)
    assert found.late == pytest.approx(0.5) == late_accuracy(_small())
    assert found.gain == pytest.approx(-0.1)
    assert found.kl_area == pytest.approx(0.1 + 0.4)
    assert found.large_mu_events == pytest.approx(2 / 2)  # 0.006, 0.106
    assert found.mu_variation == pytest.approx(0.112)
    assert found.mean_mu == pytest.approx(1.406 / 3)
    assert (found.seconds_per_step, found.gac_share) == (0.2, 0.01)


@pytest.mark.parametrize(
    ("final", "plain", "beyond"), [(0.41, False, False), (0.4, False, False), (0.39, True, False), (0.33, True, True)]
)
def test_collapse_with_and_without_chance(final, plain, beyond):
    found = read_run(_small(accuracy=[[0, 0.4], [1, 0.5], [3, 0.7], [4, final]])).measures
    assert (found.collapsed, found.collapsed_beyond_chance) == (plain, beyond)  # standard error of a difference: 0.03


def test_what_was_not_measured():
    found = read_run(_small(mu=[None] * 4, kl=[[0, 0.0], [4, None]])).measures
    assert found.large_mu_events is found.mu_variation is found.mean_mu is found.kl_area is None


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"task": None}, "task"),
        ({"lr": math.nan}, "lr"),
        ({"accuracy": [[0, 0.4], [4, 0.5]]}, "accuracy"),
        ({"accuracy": [[0, 0.4], [1, 0.5], [3, 0.7], [4, 51.0]]}, "accuracy"),
        ({"accuracy": [[0, 0.4], [3, 0.5], [1, 0.7], [4, 0.5]]}, "accuracy"),
        ({"accuracy": [[0, 0.4], [1, None], [3, 0.7], [4, 0.5]]}, "accuracy"),
        ({"kl": [[0, 0.0], [2, 0.1]]}, "kl"),
        ({"mu": [0.5, 0.5]}, "mu"),
    ],
)
def test_malformed(changes, field):
    with pytest.raises(ValueError, match=f"record comparison/.*: {field} must be"):
        read_run(_small(**changes))

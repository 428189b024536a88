"""What must not change the statistics, or must change them in a known way."""

from __future__ import annotations

import itertools

import pytest
import torch

import gac
from gac.observe.ledger import Ledger
from tests.gac.statistics.sources import ESTIMATES, KINDS, family, feed

NUMELS = (3500, 1500, 70)
CPU = torch.device("cpu")
SQUARED = (*ESTIMATES, "norm_s2", "norm_r2", "dot")


@pytest.fixture(autouse=True)
def _collisions(monkeypatch):
    monkeypatch.setattr("gac.observe.ledger.SMALLEST_SKETCH", 2048)


@pytest.fixture
def contributions():
    """4 and 3 contributions ``[n, P]`` whose disagreement is no small difference of large numbers."""
    generator = torch.Generator().manual_seed(1)
    s, r = (family("rows", NUMELS, 64, seed=k).to(torch.float32) for k in (1, 2))
    return 2 * s.draw(4, generator=generator) / 4, -r.draw(3, generator=generator) / 3


def statistics(kind: str, x_s: torch.Tensor, x_r: torch.Tensor, numels=NUMELS) -> dict[str, float]:
    found = feed(Ledger(numels, CPU, **KINDS[kind]), x_s, x_r)
    return {name: float(getattr(found, name)) for name in SQUARED}


def mu(found: dict[str, float]) -> float:
    """The estimate itself, without prior, cap or bounds."""
    controller = gac.Controller(law="gac", cap=1.0, mu_min=0.0, mu_max=1.0)
    return float(controller.update(gac.Statistics(**found)))


@pytest.mark.parametrize("kind", KINDS)
def test_scaling_all_gradients(kind, contributions):
    """By a power of two nothing rounds differently: bit for bit c^2. Otherwise to float32's rounding.

    Each element is rounded once more (2^-24), each running sum once for each of 7 additions, and its differences
    inherit that relative to the sum: 1e-5 leaves room for sums ten times a contribution.
    """
    before = statistics(kind, *contributions)
    for c, tolerance in ((2.0**-12, 0.0), (3.7, 1e-5), (1e-4, 1e-5)):
        after = statistics(kind, *(c * x for x in contributions))
        for name in SQUARED:
            scale = before["norm_s2"] + before["norm_r2"]
            assert after[name] / c**2 == pytest.approx(before[name], rel=tolerance, abs=tolerance * scale), name
        assert mu(after) == pytest.approx(mu(before), rel=0, abs=2 * tolerance + 1e-15)


@pytest.mark.parametrize("kind", KINDS)
def test_order_of_micro_batches(kind, contributions):
    """Every order of the three, some of the four; float32 totals of 4 and running sums of 7 terms may round apart."""
    x_s, x_r = contributions
    before = statistics(kind, x_s, x_r)
    scale = before["norm_s2"] + before["norm_r2"]
    for order_s, order_r in zip(
        itertools.islice(itertools.permutations(range(4)), 3, None, 4), itertools.permutations(range(3)), strict=True
    ):
        after = statistics(kind, x_s[list(order_s)], x_r[list(order_r)])
        assert after == pytest.approx(before, rel=1e-5, abs=1e-5 * scale)


@pytest.mark.parametrize("numels", [(5070,), (70, 3500, 1500), (1024, 1024, 1024, 1998), (1, 0, 5069), (507,) * 10])
def test_how_the_gradient_is_cut_into_parameters(numels, contributions):
    """Exact: the same elements whatever the list; sums in float64 of float32 squares added in another order."""
    before = statistics("exact", *contributions)
    after = statistics("exact", *contributions, numels=numels)
    scale = before["norm_s2"] + before["norm_r2"]
    assert after == pytest.approx(before, rel=1e-6, abs=1e-6 * scale)


def test_exchanging_the_branches(contributions):
    """SFT and RL swap places, and mu becomes 1 - mu at alpha = 1/2."""
    before, after = statistics("exact", *contributions), statistics("exact", *contributions[::-1])
    swapped = {"sigma_s2": "sigma_r2", "sigma_r2": "sigma_s2", "norm_s2": "norm_r2", "norm_r2": "norm_s2"}
    scale = before["norm_s2"] + before["norm_r2"]
    for name in SQUARED:
        assert after[name] == pytest.approx(before[swapped.get(name, name)], rel=1e-6, abs=1e-6 * scale), name
    assert mu(after) == pytest.approx(1 - mu(before), abs=1e-6)

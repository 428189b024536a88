"""Laws that look at no statistic."""

from __future__ import annotations

import pytest

import gac


def test_fixed():
    controller = gac.Controller(law="fixed", mu=0.1)
    for _ in range(3):
        assert float(controller.update(gac.Statistics(sigma_s2=1.0, sigma_r2=9.0, delta_g2=1.0))) == 0.1


@pytest.mark.parametrize("name", ["chord-mu", "chord"])
def test_chord(name):
    controller = gac.Controller(law=name)
    mus = [float(controller.mu)] + [float(controller.update(None)) for _ in range(250)]
    assert mus[0] == pytest.approx(0.9)
    assert mus[100] == pytest.approx(0.475)
    assert mus[200:] == pytest.approx([0.05] * 51)


def test_warmup_cosine():
    values = [gac.schedules.warmup_cosine(s, 10, 20, 0.8, 0.2) for s in (0, 5, 10, 20, 30, 99)]
    assert values == pytest.approx([0.0, 0.4, 0.8, 0.5, 0.2, 0.2])
    with pytest.raises(ValueError, match="negative"):
        gac.schedules.warmup_cosine(0, -1, 1, 0.5, 0.5)


def test_registry():
    assert {"gac", "paper", "fixed", "chord-mu"} <= set(gac.laws.available())
    with pytest.raises(ValueError, match="unknown law"):
        gac.Controller(law="nope")

"""Laws that look at no statistic."""

from __future__ import annotations

import math

import pytest
import torch

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


def test_sequential():
    controller = gac.Controller(law="sequential", split=3)
    assert [float(controller.mu)] + [float(controller.update(None)) for _ in range(4)] == [1.0, 1.0, 1.0, 0.0, 0.0]
    assert float(gac.Controller(law="sequential", split=0).mu) == 0.0


def test_kl_control():
    controller = gac.Controller(law="kl-ctrl", gain=0.5)
    assert float(controller.update(None, kl=0.022)) == pytest.approx(0.5 * (1 + 0.1 * 0.5))
    assert float(controller.update(None, kl=9.0)) == pytest.approx(0.525 * 1.1), "the error is clipped at 0.2"
    assert float(controller.update(None, kl=math.nan)) == pytest.approx(0.5775), "an unknown KL moves nothing"
    for _ in range(100):
        controller.update(None, kl=0.0)
    assert float(controller.mu) == pytest.approx(0.05)
    with pytest.raises(ValueError, match="follows kl: pass kl="):
        controller.update(None)


def test_entropy_control():
    controller = gac.Controller(law="entropy-ctrl", rate=0.1)
    assert float(controller.update(None, entropy=2.0)) == pytest.approx(0.5), "the first entropy is the target"
    assert float(controller.update(None, entropy=torch.tensor(1.5))) == pytest.approx(0.55)
    assert float(controller.update(None, entropy=4.0)) == pytest.approx(0.35)
    with pytest.raises(ValueError, match="follows entropy"):
        controller.update(None)

"""Law gac and standard errors where measurements are unevenly apart: what counts is the age in steps."""

import math
import random

import pytest
import torch

import gac
from gac.laws.gac import LONG, SHORT
from gac.statistics.uncertainty import SuccessiveDifferences

GAPS = (0, 0, 3, 0, 12, 29, 1)
"""Steps without statistics after each measurement, over and over."""


def measured(draw: random.Random, level: float = 1.0) -> gac.Statistics:
    s, r, delta = level * draw.lognormvariate(0, 0.5), draw.lognormvariate(0, 0.5), draw.lognormvariate(0, 0.5)
    return gac.Statistics(sigma_s2=s, sigma_r2=r, delta_g2=delta, distance2=delta + s + r)


def test_averages_and_evidence_weigh_by_age_in_steps():
    """From the definition: what a measurement counts for halves with every half-life of steps since."""
    draw, controller = random.Random(0), gac.Controller("gac", mu_min=0.0, mu_max=1.0)
    step, seen, evidence = 0, [], [0.0, 0.0]
    last = None
    for number in range(40):
        statistics = measured(draw)
        before = controller.law.state["mus"].tolist() if seen else [math.nan] * 2
        controller.update(statistics)
        value = [float(x) for x in (statistics.sigma_s2, statistics.sigma_r2, statistics.delta_g2)]
        short, long = before
        difference = (long - short) * ((long + short) * sum(value) - 2 * (0.5 * value[2] + value[1]))
        if math.isfinite(difference):
            keep = 2.0 ** (-(step - last) / LONG)
            evidence = [keep * evidence[0] + difference, keep**2 * evidence[1] + difference**2]
        seen.append((step, value))
        last = step
        assert controller.law.state["evidence"].tolist() == pytest.approx(evidence, rel=1e-9)
        for average, half_life in enumerate((SHORT, LONG)):
            weights = [2 ** (-(step - then) / half_life) for then, _ in seen]
            for k in range(3):
                mean = sum(w * v[k] for w, (_, v) in zip(weights, seen, strict=True)) / sum(weights)
                assert float(controller.law.smoothed(average)[k]) == pytest.approx(mean, rel=1e-9)
        for _ in range(GAPS[number % len(GAPS)]):
            controller.update(None)
        step += 1 + GAPS[number % len(GAPS)]


def test_standard_errors_do_not_mind_gaps():
    """Of what stands still: differences between measurements are as large however far these are apart."""
    generator = torch.Generator().manual_seed(0)
    differences = SuccessiveDifferences(200, torch.device("cpu"), torch.float64)
    held = []
    for number in range(300):  # the gaps are between the draws, which are independent
        estimate = 1 + 0.3 * torch.randn(200, generator=generator, dtype=torch.float64)
        error = differences.update(estimate, torch.tensor(True))
        if number > 50:
            held.append(((estimate - 1).abs() <= error).double().mean())
    assert 0.66 < float(torch.stack(held).mean()) < 0.71


@pytest.mark.parametrize("gap", [1, 5, 20])
def test_drift_over_a_gap_makes_standard_errors_larger_not_smaller(gap):
    """A trend of ``d`` a step adds ``(d g)^2 / 2`` to the square, relative to a level that moves with it."""
    generator = torch.Generator().manual_seed(0)
    differences = SuccessiveDifferences(2000, torch.device("cpu"), torch.float64)
    noise, slope = 0.05, 0.002
    for number in range(200):
        level = math.exp(slope * gap * number)
        estimate = level * (1 + noise * torch.randn(2000, generator=generator, dtype=torch.float64))
        error = differences.update(estimate, torch.tensor(True))
    expected = level * math.sqrt(noise**2 + (slope * gap) ** 2 / 2)
    assert 0.9 * expected < float(error.mean()) < 1.15 * expected
    assert float(error.mean()) > 0.9 * level * noise

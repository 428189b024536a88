"""What the half-life of law ``gac`` costs: the tables of docs/laws.md, from recorded runs and from theory.

``pytest tests/gac/laws/test_half_life.py -rP`` prints their rows.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

import gac
from gac.audit.figures import ratio_of_sums
from gac.laws.base import closed_form

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "laws.md").read_text()
HALF_LIVES = (7.0, 20.0, 69.0)
RECORDS = {
    "default": "audit_default_half_life_7",
    "default, seed 1": "audit_seed1_half_life_7",
    "short warm start": "audit_short_warm_start",
}


def on_page(*cells: str) -> None:
    row = "| " + " | ".join(cells) + " |"
    print(row)
    assert row in PAGE, f"docs/laws.md lacks the row {row}"


def replayed(estimates: list[list[float]], half_life: float | str, *, held: bool = False) -> torch.Tensor:
    """The mu ``[S]`` of law ``gac`` before each step of a recorded run; ``held`` by the cap from the first step on."""
    controller, mu = gac.Controller("gac", half_life=half_life), []
    if held:
        controller.law.state["unsettled"].zero_()
    for row in estimates:
        mu.append(float(controller.mu))
        controller.update(gac.Statistics(*row))
    return torch.tensor(mu, dtype=torch.float64)


@pytest.mark.parametrize("label", RECORDS)
def test_recorded_runs(label):
    """Error of the mixed gradient over the oracle's, for the statistics that were measured in training.

    The truth of a step is that of the nearest point where it was measured, as in ``gac audit``.
    """
    record = json.loads((ROOT / "benchmarks/results" / f"{RECORDS[label]}.json").read_text())["record"]
    estimates = record["estimates"]["exact"]
    points = torch.tensor([point["step"] for point in record["points"]])
    truth = torch.tensor([point["truth"] for point in record["points"]], dtype=torch.float64)
    truth = truth[(torch.arange(len(estimates))[:, None] - points).abs().argmin(1)]
    ratio = lambda mu: float(ratio_of_sums(mu, truth, record["alpha"]))
    best = min(ratio(torch.tensor(k / 1000, dtype=torch.float64)) for k in range(1001))
    found = [ratio(replayed(estimates, half_life)) for half_life in (*HALF_LIVES, "auto")]
    held = ratio(replayed(estimates, "auto", held=True))
    on_page(label, *(f"{x:.3f}" for x in [*found, held, best]))
    assert found[-1] < held, "nothing speaks for the start"
    assert found[-1] < min(found[:-1]) + 0.005, "the choice is as good as the best that could have been made"
    assert found[-1] < 1.1, "within 10% of the oracle"


NOISE = 0.29
"""``D * Var(mu) / MSE*`` of one step's statistics, as recorded in the default run: what :func:`test_noise` finds."""


def test_noise():
    """A step's statistics about their mean, on mu to first order: their spread in the default run."""
    record = json.loads((ROOT / "benchmarks/results/audit_default_half_life_7.json").read_text())["record"]
    measured = torch.tensor(record["estimates"]["exact"], dtype=torch.float64)
    mean = measured.mean(0)
    mu, total = float(closed_form(*mean.clamp(min=0), 0.5)), float(mean.clamp(min=0).sum())
    levers = torch.tensor([-mu, 1 - mu, 0.5 - mu], dtype=torch.float64) / total
    variance = float(((measured - mean) @ levers).var())
    truth = torch.tensor([point["truth"] for point in record["points"]], dtype=torch.float64)
    s, r, d = truth[:, :3].clamp(min=0).unbind(1)
    best = closed_form(s, r, d, 0.5)
    least = (best - 0.5) ** 2 * d + best**2 * s + (1 - best) ** 2 * r
    cost = float((s + r + d).sum() / least.sum()) * variance
    print(f"standard deviation {variance**0.5:.3f}, cost of one step alone {cost:.3f}")
    assert cost == pytest.approx(NOISE, abs=0.005)
    assert f"standard deviation of {variance**0.5:.2f}" in " ".join(PAGE.split())


@pytest.mark.parametrize("doubling", [100, 200, 400, 1000])
def test_drift(doubling):
    """``sigma_r2`` doubles every so many steps, for ever; taken when it equals ``sigma_s2``, without disagreement.

    The average of ``2^(t/T)`` with weights ``keep^age`` is ``(1-keep) / (1 - keep*2^(-1/T))`` of it, which biases mu;
    its variance is that of one step times ``(1-keep)/(1+keep)``.
    """
    cells = []
    for half_life in HALF_LIVES:
        keep = 2 ** (-1 / half_life)
        lagging = (1 - keep) / (1 - keep * 2 ** (-1 / doubling))
        bias = lagging / (1 + lagging) - 0.5
        lag = 2 * bias**2 / 0.5  # D = 2, least error 1/2
        noise = NOISE * math.tanh(math.log(2) / (2 * half_life))
        cells.append(f"{100 * lag:.1f} + {100 * noise:.1f}")
    on_page(str(doubling), *cells)


def test_the_average_lags_as_stated():
    """The law's own average, over a statistic that doubles every 100 steps."""
    controller = gac.Controller("gac")
    for t in range(1500):
        controller.update(gac.Statistics(1.0, 2 ** ((t - 1499) / 100), 0.0))
    keep = 2 ** (-1 / controller.law.half_life)
    assert float(controller.law.smoothed()[1]) == pytest.approx((1 - keep) / (1 - keep * 2 ** (-1 / 100)), rel=1e-4)

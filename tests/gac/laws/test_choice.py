"""``half_life="auto"``: the law's choice between a short and a long average."""

from __future__ import annotations

import math

import pytest
import torch

import gac
from gac.laws.gac import LONG, SHORT
from tests.gac.laws.draws import side_by_side

S = gac.Statistics
FREE = {"cap": 1.0, "mu_min": 0.0, "mu_max": 1.0}


def closed(s: float, r: float, d: float, alpha: float = 0.5, noise: float = 1.0) -> float:
    return (alpha * d + noise * r) / (d + noise * (s + r))


def averages(rows: list[tuple[float, float, float]], half_life: float) -> tuple[float, ...]:
    """Bias-corrected, of the three statistics, oldest first."""
    keep = 2 ** (-1 / half_life)
    weights = [keep ** (len(rows) - 1 - k) for k in range(len(rows))]
    return tuple(sum(w * row[i] for w, row in zip(weights, rows, strict=True)) / sum(weights) for i in range(3))


@pytest.mark.parametrize(("alpha", "momentum"), [(0.5, 0.0), (0.2, 0.0), (0.3, 0.9)])
def test_the_rule_by_hand(alpha, momentum):
    noise = (1 - momentum) / (1 + momentum)
    rows = [(1.0, 3.0, 0.5), (2.0, 1.0, 0.2), (0.5, 4.0, 1.0), (3.0, 3.0, -0.4), (1.0, 1.0, 2.0)]
    controller = gac.Controller("gac", alpha=alpha, momentum=momentum, **FREE)
    total = squares = 0.0
    for k, (s, r, d) in enumerate(rows):
        if k:
            short, long = (closed(*averages(rows[:k], h), alpha, noise) for h in (SHORT, LONG))
            error = {m: (m - alpha) ** 2 * d + noise * (m**2 * s + (1 - m) ** 2 * r) for m in (short, long)}
            keep = 2 ** (-1 / LONG)
            difference = error[long] - error[short] if k > 1 else 0.0  # after one step the averages are equal
            total, squares = keep * total + difference, keep**2 * squares + difference**2
        mu = float(controller.update(S(s, r, d)))
        short, long = (closed(*averages(rows[: k + 1], h), alpha, noise) for h in (SHORT, LONG))
        t = total / math.sqrt(squares) if squares else 0.0
        assert mu == pytest.approx(long + (short - long) / (1 + math.exp(-2 * (t - 2))), rel=1e-12)


def draws(seed: int, steps: int, trend) -> torch.Tensor:
    """``[steps, 3]``: chi-square statistics with 6 degrees of freedom about ``(1, trend(step), 0.3)``."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(steps, 3, 6, generator=generator, dtype=torch.float64).square().mean(2)
    mean = torch.tensor([[1.0, trend(step), 0.3] for step in range(steps)], dtype=torch.float64)
    return mean * noise


def run(rows: torch.Tensor, half_life: float | str) -> tuple[torch.Tensor, gac.Controller]:
    controller, mus = gac.Controller("gac", half_life=half_life, **FREE), []
    for row in rows.tolist():
        mus.append(float(controller.mu))
        controller.update(S(*row))
    return torch.tensor(mus, dtype=torch.float64), controller


def excess(mu: torch.Tensor, means: torch.Tensor) -> float:
    """Error over the oracle's, in percent, from step 50 on."""
    s, r, d = means.unbind(1)
    error = lambda m: ((m - 0.5).square() * d + m.square() * s + (1 - m).square() * r)[50:].sum()
    return 100 * float(error(mu) / error((0.5 * d + r) / (d + s + r)) - 1)


@pytest.mark.parametrize(("trend", "better"), [(lambda t: 2.0, LONG), (lambda t: 2.0 + 1.8 * math.sin(t / 25), SHORT)])
def test_it_takes_the_better_average(trend, better):
    """A standing and a swinging oracle: within a sixth of the gap to the better one, on average over 20 runs."""
    rows = torch.stack([draws(seed, 400, trend) for seed in range(20)])
    told = dict(zip(("sigma_s2", "sigma_r2", "delta_g2"), rows.unbind(-1), strict=True))
    means = torch.tensor([[1.0, trend(step), 0.3] for step in range(400)], dtype=torch.float64)
    found = {}
    for half_life in ("auto", SHORT, LONG):
        states = side_by_side("gac", told, half_life=half_life, **FREE)
        mus = torch.stack([torch.full((20,), 0.5, dtype=torch.float64), *(state["mu"] for state in states[:-1])], 1)
        found[half_life] = sum(excess(mu, means) for mu in mus) / 20
    worse = SHORT if better == LONG else LONG
    assert found[better] < found[worse]
    assert found["auto"] < found[better] + (found[worse] - found[better]) / 6, found


def test_units_do_not_matter():
    rows = draws(0, 60, lambda t: 1.0 + t / 20)
    mu = run(rows, "auto")[0]
    for scale in (1e-12, 1e12):
        torch.testing.assert_close(run(rows * scale, "auto")[0], mu, rtol=1e-9, atol=0)


def test_a_number_in_place_of_the_choice():
    """The short average of the choice is the average of that half-life, and the long one likewise."""
    rows = draws(1, 30, lambda t: 2.0)
    chooses, short, long = (run(rows, h)[1].law for h in ("auto", SHORT, LONG))
    torch.testing.assert_close(chooses.smoothed(0), short.smoothed(), rtol=1e-12, atol=0)
    torch.testing.assert_close(chooses.smoothed(), long.smoothed(), rtol=1e-12, atol=0)
    torch.testing.assert_close(chooses.standard_errors(0), short.standard_errors(), equal_nan=True)


def test_steps_that_say_nothing_change_no_evidence():
    controller = gac.Controller("gac")
    for row in draws(2, 20, lambda t: 2.0).tolist():
        controller.update(S(*row))
    evidence = controller.law.state["evidence"].clone()
    controller.update(None)
    controller.update(S(sigma_s2=1.0))
    controller.update(S(1.0, 1.0, 1.0, nonfinite=1.0))
    assert torch.equal(controller.law.state["evidence"], evidence)


def test_resume_is_exact():
    rows = draws(3, 60, lambda t: 1.0 + t / 10)
    whole, half = gac.Controller("gac"), gac.Controller("gac")
    for row in rows[:30].tolist():
        whole.update(S(*row))
    half.load_state_dict(whole.state_dict())
    for row in rows[30:].tolist():
        assert float(whole.update(S(*row))) == float(half.update(S(*row)))


def test_other_words_are_refused():
    with pytest.raises(ValueError, match="half_life must be a number of steps or 'auto'"):
        gac.Controller("gac", half_life="long")

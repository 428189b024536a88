"""The estimator for a lone contribution against theory: a mean that stands still, and one that drifts."""

from __future__ import annotations

import math

import pytest
import torch

import gac
from gac.observe.temporal import DECAY, MovingMeans
from gac.statistics import Branch
from tests.gac.statistics.sources import DRAWS, family

NUMELS = (50, 30, 20)
TIMES = (1, 2, 5, 50)


def estimates(source, drift: torch.Tensor) -> dict[int, float]:
    """Mean over 2,000 replicas of the estimate for the gradient that follows ``t`` earlier ones.

    Replicas stand side by side in one long vector: the squared distance then is the sum of theirs.
    """
    generator = torch.Generator().manual_seed(1)
    means, found = MovingMeans(torch.device("cpu")), {}
    healthy = torch.tensor(True)
    for t in range(max(TIMES) + 1):
        gradient = source.draw(DRAWS, generator=generator).add_(t * drift).flatten()
        if t in TIMES:
            found[t] = float(means.noise(Branch.SFT, gradient)) / DRAWS
        means.update(Branch.SFT, gradient, healthy)
    return found


def variance_of_mean(t: int) -> float:
    """Of the bias-corrected moving mean of ``t`` values of variance 1, from its weights."""
    weights = torch.tensor([DECAY**k for k in range(t)], dtype=torch.float64)
    return float((weights / weights.sum()).square().sum())


@pytest.mark.parametrize("name", ["isotropic", "rows"])
def test_unbiased_while_the_mean_stands_still(name):
    """The difference to the mean of t earlier gradients has the covariance ``(1+v)*C``: v is divided out.

    The standard error is that of a squared Gaussian vector, ``sqrt(2 tr(C^2) / draws)``.
    """
    source = family(name, NUMELS, 10, seed=1)
    error = math.sqrt(2 * source.product_trace(source) / DRAWS)
    found = estimates(source.to(torch.float32), torch.zeros(sum(NUMELS)))
    for t, value in found.items():
        print(f"{name}, t={t}: {value:.5g} of {source.trace:.5g}, {(value - source.trace) / error:+.2f} errors")
        assert abs(value - source.trace) < 4 * error, t


def test_drift_counts_as_noise():
    """``g_t = g + t*d`` adds ``|d|^2 L^2 / (1+v)``, with L the mean age of what the moving mean holds.

    ``L = 1/(1-rho) - t*rho^t/(1-rho^t)``: 1 after one gradient, 10 in the long run, where the excess is 95 ``|d|^2``.
    """
    source = family("isotropic", NUMELS, 10, seed=1)
    drift = 0.1 * torch.ones(sum(NUMELS), dtype=torch.float64)
    found = estimates(source.to(torch.float32), drift.float())
    for t, value in found.items():
        lag = 1 / (1 - DECAY) - t * DECAY**t / (1 - DECAY**t)
        share = 1 + variance_of_mean(t)
        excess = float(drift @ drift) * lag**2 / share
        variance = 2 * source.product_trace(source) + 4 * lag**2 * source.variance_along(drift) / share
        away = (value - source.trace - excess) / math.sqrt(variance / DRAWS)
        print(f"t={t}: {value:.5g}, noise {source.trace:.5g} + {excess:.4g}, {away:+.2f} errors")
        assert abs(away) < 4, t


def test_long_run_factors():
    """``1/(1+v)`` tends to ``(1+rho)/2`` and the lag to ``1/(1-rho)``."""
    assert 1 / (1 + variance_of_mean(500)) == pytest.approx((1 + DECAY) / 2)
    assert [variance_of_mean(t) for t in TIMES] == pytest.approx(
        [(1 - DECAY) * (1 + DECAY**t) / ((1 + DECAY) * (1 - DECAY**t)) for t in TIMES]
    )


def test_before_the_second_gradient_nothing_is_known():
    means = MovingMeans(torch.device("cpu"))
    gradient = torch.ones(4)
    assert math.isnan(float(means.noise(Branch.RL, gradient)))
    means.update(Branch.RL, gradient, torch.tensor(False))
    assert not math.isfinite(float(means.noise(Branch.RL, gradient))), "a gradient that was not healthy is none"
    means.update(Branch.RL, gradient, torch.tensor(True))
    assert float(means.noise(Branch.RL, gradient)) == pytest.approx(0.0, abs=1e-12)


GAPS = (1, 1, 4, 1, 13, 30, 2)
"""Steps between measurements, over and over."""


def weights_after(steps: list[int]) -> torch.Tensor:
    """Of the gradients of these steps in the mean, from the ages alone: each step takes ``1 - rho`` of what is left."""
    weights: list[float] = []
    last = steps[0] - 1
    for step in steps:
        keep = DECAY ** (step - last)
        weights, last = [keep * w for w in weights] + [1 - keep], step
    found = torch.tensor(weights, dtype=torch.float64)
    return found / found.sum()


def test_uneven_gaps():
    """Unbiased whatever lies between measurements; drift counts by the steps that lie between, not the measurements."""
    source = family("isotropic", NUMELS, 10, seed=1)
    drift = 0.02 * torch.ones(sum(NUMELS), dtype=torch.float64)
    for slope in (0.0, 1.0):
        generator = torch.Generator().manual_seed(1)
        means, steps, step = MovingMeans(torch.device("cpu")), [], 0
        for number in range(20):
            gradient = source.to(torch.float32).draw(DRAWS, generator=generator)
            gradient = gradient.add_(slope * step * drift.float()).flatten()
            if number in (2, 6, 7, 19):
                weights = weights_after(steps)
                lag = float(step - weights @ torch.tensor(steps, dtype=torch.float64))
                share = 1 + float(weights.square().sum())
                expected = source.trace + slope * float(drift @ drift) * lag**2 / share
                variance = 2 * source.product_trace(source) + 4 * slope * lag**2 * source.variance_along(drift) / share
                found = float(means.noise(Branch.SFT, gradient)) / DRAWS
                away = (found - expected) / math.sqrt(variance / DRAWS)
                print(f"slope {slope}, after {number} measurements: {found:.5g} of {expected:.5g}, {away:+.2f} errors")
                assert abs(away) < 4, (slope, number)
            means.update(Branch.SFT, gradient, torch.tensor(True), step)
            steps.append(step)
            step += GAPS[number % len(GAPS)]


def test_even_gaps_of_one_step_need_no_numbers():
    told, untold = MovingMeans(torch.device("cpu")), MovingMeans(torch.device("cpu"))
    for step in range(5):
        gradient = torch.randn(7, generator=torch.Generator().manual_seed(step))
        told.update(Branch.RL, gradient, torch.tensor(True), step)
        untold.update(Branch.RL, gradient, torch.tensor(True))
    assert all(torch.equal(value, untold.state[name]) for name, value in told.state.items())


@pytest.mark.parametrize("estimator", ["exact", "sketch"])
@pytest.mark.parametrize("size", [3.3e38, 1e60])
def test_gradients_beyond_float32_are_no_part_of_the_mean(estimator, size):
    """Their sums overflow though each is finite: what was known stays, the state loads, later steps are measured."""
    model = torch.nn.Linear(4, 3).double()
    mixer = gac.patch(model, estimator=estimator)

    def step(scale):
        for branch in (mixer.sft, mixer.rl):
            with branch():
                mixer.backward((model(torch.ones(4, dtype=torch.float64)) * scale).sum())
        mixer.step()
        model.zero_grad()

    for scale in (1.0, size, -size, size):
        step(scale)
    state = mixer.state_dict()
    mixer.load_state_dict(state)
    assert all(value.isfinite().all() for value in state["means"][0].values())
    if size == 1e60:  # the first step alone is in the mean: all are alike
        step(1.0)
        assert float(mixer.statistics.sigma_s2) <= 1e-10 * float(mixer.statistics.norm_s2)

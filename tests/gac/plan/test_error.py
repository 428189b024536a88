"""The standard error of mu against simulated steps, the law and the sketch."""

from __future__ import annotations

import math

import pytest
import torch

import gac
import gac_kernels
from gac.plan import Noise, mu_error
from gac_kernels.layout import SketchLayout


def simulated_steps(noise, n, steps, generator):
    """``[3, steps]``: sigma_s2, sigma_r2 and distance2 of draws with the noise that the plan assumes."""
    rank = int(noise.rank)

    def branch(variance, mean):
        x = torch.randn(steps, n, rank, generator=generator, dtype=torch.float64)
        if noise.excess:  # a contribution's own variance: gamma distributed, mean 1
            gamma = torch.distributions.Gamma(1 / noise.excess, 1 / noise.excess)
            x = x * gamma.sample((steps, n, 1)).double().sqrt()
        x = (x * math.sqrt(variance / n / rank) + mean / n).to(torch.float64)
        total = x.sum(1)
        return n / (n - 1) * (x.square().sum((1, 2)) - total.square().sum(1) / n), total

    torch.manual_seed(0)
    sigma_s, sigma_r = (q / (1 + noise.ratio) / n for q in (noise.ratio, 1.0))
    direction = torch.randn(rank, generator=generator, dtype=torch.float64)
    direction *= math.sqrt(noise.disagreement) / direction.norm()
    power_s, total_s = branch(sigma_s, direction)
    power_r, total_r = branch(sigma_r, 0 * direction)
    return torch.stack([power_s, power_r, (total_s - total_r).square().sum(1)])


@pytest.mark.parametrize(
    ("noise", "n", "alpha", "interval", "momentum"),
    [
        (Noise(rank=20, excess=0.0, disagreement=0.2, ratio=1.0), 4, 0.5, 1, 0.0),
        (Noise(rank=20, excess=0.0, disagreement=0.05, ratio=4.0), 8, 0.2, 1, 0.0),
        (Noise(rank=20, excess=1.0, disagreement=0.2, ratio=0.5), 4, 0.5, 1, 0.0),
        (Noise(rank=20, excess=1.0, disagreement=0.1, ratio=3.0), 6, 0.8, 3, 0.0),
        (Noise(rank=200, excess=0.0, disagreement=0.5, ratio=4.0), 8, 0.2, 1, 0.9),
        (Noise(rank=200, excess=1.0, disagreement=0.5, ratio=3.0), 6, 0.8, 3, 0.5),
    ],
)
def test_standard_error_is_that_of_simulated_steps(noise, n, alpha, interval, momentum):
    chains, length, half_life = 600, 40, 12.0
    values = simulated_steps(noise, n, chains * length, torch.Generator().manual_seed(1)).view(3, chains, length)
    keep = 2.0 ** (-interval / half_life)
    weights = keep ** torch.arange(length, dtype=torch.float64).flip(0)
    sigma_s, sigma_r, distance = (values * weights / weights.sum()).sum(2)
    left, delta = (1 - momentum) / (1 + momentum), distance - sigma_s - sigma_r
    mus = (alpha * delta + left * sigma_r) / (delta + left * (sigma_s + sigma_r))
    found = mu_error(noise, n, size=None, alpha=alpha, half_life=half_life, interval=interval, momentum=momentum)
    # the chain is cut off: its weights leave a little more variance than an endless one's
    cut = math.sqrt((1 + keep**length) / (1 - keep**length))
    sure = 1 / math.sqrt(2 * chains)
    assert float(mus.std()) == pytest.approx(found.smoothed * cut, rel=4 * sure)
    assert float(mus.mean()) == pytest.approx(found.mu, abs=0.25 * found.one_step)
    assert found.sketch == 0


def test_the_law_averages_as_the_plan_says():
    noise, n, steps = Noise(rank=20, excess=0.5), 8, 1000
    values = simulated_steps(noise, n, steps, torch.Generator().manual_seed(2)).tolist()
    controller, found = gac.Controller("gac", half_life=3.0), []
    for sigma_s, sigma_r, distance in zip(*values, strict=True):
        delta = distance - sigma_s - sigma_r
        statistics = gac.Statistics(sigma_s2=sigma_s, sigma_r2=sigma_r, delta_g2=delta, distance2=distance)
        controller.update(statistics)
        found.append(float(controller.law.state["raw"]))
    settled = torch.tensor(found[20:], dtype=torch.float64)
    independent = len(settled) * math.tanh(math.log(2) / 3.0 / 2)  # (1-k)/(1+k) of autocorrelated values
    expected = mu_error(noise, n, size=None, half_life=3.0).smoothed
    assert float(settled.std()) == pytest.approx(expected, rel=4 / math.sqrt(2 * independent))


def test_sketch_error_is_that_of_the_sketch():
    """Over seeds, with a gradient so long that its sketch is a good deal shorter."""
    size, numel, seeds = 1024, 64 * 1024, 200
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(numel, generator=generator)
    found = []
    for seed in range(seeds):
        layout = SketchLayout.per_tensor([numel], size=size, seed=seed)
        out = torch.zeros(layout.size)
        gac_kernels.sketch([x], out, layout=layout)
        found.append(float(out.double().square().sum() / x.double().square().sum()))
    spread = float(torch.tensor(found).std())
    noise = Noise(rank=1e9, excess=0.0, disagreement=0.0, ratio=1e-6)  # mu = 1 - |x|^2 / |x|^2 of the same vector
    predicted = mu_error(noise, 10**6, size=size, alpha=0.0).sketch
    assert predicted / math.sqrt(2) == pytest.approx(spread, rel=4 / math.sqrt(2 * seeds))

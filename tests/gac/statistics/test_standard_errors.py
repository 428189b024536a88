"""Standard errors from successive differences: how often ``estimate +- SE`` and ``+- 1.96 SE`` hold the truth."""

from __future__ import annotations

import math

import pytest
import torch

from gac.observe.ledger import Ledger
from gac.observe.temporal import MovingMeans
from gac.statistics import Branch
from gac.statistics.uncertainty import HALF_LIFE, SuccessiveDifferences, degrees_of_freedom
from tests.gac.statistics.sources import DRAWS, FAMILIES, KINDS, Source, family, feed, noise, truth

CPU, YES = torch.device("cpu"), torch.tensor(True)
NUMELS, ROW = (48, 24, 8), 4
NAMES = ("sigma_s2", "sigma_r2", "distance2", "delta_g2")
COUNTS = [(2, 2), (3, 3), (8, 8), (2, 8)]
WARM_UP, REPLICAS = 100, 8
NOMINAL = {1.0: 68.27, 1.96: 95.0}


def estimates(s: Source, n_s: int, r: Source, n_r: int, *, steps: int, replicas: int, seed: int, grow=None, tails=0.0):
    """``[steps, replicas, 4]``, in the order of NAMES, of steps whose gradients are ``grow[t]`` times as large.

    ``tails``: a micro-batch's noise has the factor ``exp(tails * z - tails^2)``, of mean square 1: a mixture of
    Gaussians, so that the covariance stays and the fourth moment is ``exp(4 tails^2)`` times as large.
    """
    generator = torch.Generator().manual_seed(seed)
    found = []
    for chunk in range(0, steps, 100):
        size = min(100, steps - chunk)
        parts = []
        for source, n in ((s, n_s), (r, n_r)):
            y = source.draw(size, replicas, n, generator=generator)
            if tails:
                z = torch.randn(size, replicas, n, 1, generator=generator)
                y = source.mean + (y - source.mean) * torch.exp(tails * z - tails**2)
            if grow is not None:
                y = y * grow[chunk : chunk + size, None, None, None]
            parts.append(y / n)
        a, b = (noise(x) for x in parts)
        distance2 = (parts[0].sum(2) - parts[1].sum(2)).square().sum(-1)
        found.append(torch.stack([a, b, distance2, distance2 - a - b], -1).double())
    return torch.cat(found)


def standard_errors(values: torch.Tensor) -> torch.Tensor:
    """Of ``[steps, ...]`` estimates, every column a sequence of its own."""
    flat = values.flatten(1)
    differences = SuccessiveDifferences(flat.shape[1], CPU, torch.float64)
    return torch.stack([differences.update(row, YES) for row in flat]).view_as(values)


def coverage(values: torch.Tensor, errors: torch.Tensor, true: torch.Tensor) -> dict[float, list[float]]:
    """Percent of steps (and replicas) whose interval holds the truth, for each estimate."""
    away = (values - true).abs() / errors
    return {z: (100 * (away < z).double().flatten(0, -2).mean(0)).tolist() for z in NOMINAL}


def show(what: str, held: dict[float, list[float]], values, errors, true) -> None:
    ratio = (errors.square().flatten(0, -2).mean(0) / (values - true).square().flatten(0, -2).mean(0)).sqrt()
    rates = {n: ", ".join(f"{p:.1f}%" for p in ps) for n, ps in zip((68, 95), held.values(), strict=True)}
    text = "; ".join(f"{n}: {rate}" for n, rate in rates.items())
    print(f"{what}: {text}; rms SE over deviation " + ", ".join(f"{x:.3f}" for x in ratio.tolist()))


def pair(name: str) -> tuple[Source, Source]:
    return tuple(family(name, NUMELS, ROW, seed=k).to(torch.float32) for k in (1, 2))


def expected(s: Source, n_s: int, r: Source, n_r: int) -> torch.Tensor:
    numbers = truth(s, n_s, r, n_r)
    return torch.tensor([numbers[name] for name in NAMES], dtype=torch.float64)


@pytest.mark.parametrize(("n_s", "n_r"), COUNTS)
@pytest.mark.parametrize("name", FAMILIES)
def test_coverage(name, n_s, n_r):
    """8 sequences of 2,000 steps after 100 of warm-up.

    Within 3 points of nominal, for 95% with every shape of the covariance. Where one direction carries half of the
    noise, estimates have few degrees of freedom (a chi-square of one lies within a deviation of its mean in 88%), and
    the inner interval holds the truth more often than it says.
    """
    s, r = pair(name)
    values = estimates(s, n_s, r, n_r, steps=WARM_UP + DRAWS, replicas=REPLICAS, seed=10 * n_s + n_r)
    errors, true = standard_errors(values)[WARM_UP:], expected(s, n_s, r, n_r)
    values = values[WARM_UP:]
    held = coverage(values, errors, true)
    show(f"{name} {n_s}+{n_r}", held, values, errors, true)
    assert all(abs(p - NOMINAL[1.96]) < 3 for p in held[1.96])
    if name == "direction":
        assert all(p > NOMINAL[1.0] - 3 for p in held[1.0])
    else:
        assert all(abs(p - NOMINAL[1.0]) < 3 for p in held[1.0])


@pytest.mark.parametrize("tails", [0.5, 1.0])
@pytest.mark.parametrize("n", [2, 8])
def test_heavy_tails(tails, n):
    """Micro-batches whose loudness varies: fourth moments 2.7 and 55 times a Gaussian's.

    Nothing nominal is promised here. Loud steps are rare: between them estimates scatter less than their deviation, so
    that intervals hold the truth too often, and averages of squares that miss the rare ones are too small.
    """
    s, r = pair("rows")
    values = estimates(s, n, r, n, steps=WARM_UP + DRAWS, replicas=REPLICAS, seed=n, tails=tails)
    errors, true = standard_errors(values)[WARM_UP:], expected(s, n, r, n)
    held = coverage(values[WARM_UP:], errors, true)
    show(f"tails {tails}, {n}+{n}", held, values[WARM_UP:], errors, true)
    for z, points in ((1.0, 6), (1.96, 9)):
        assert all(p > NOMINAL[z] - points for p in held[z])


@pytest.mark.parametrize("rate", [-0.05, -0.01, 0.01])
def test_trends(rate):
    """Squared gradients that shrink or grow by a constant share of themselves in each step.

    The estimate's level moves with them. A step's own change adds ``rate^2 / 2`` to the square of a relative error, and
    the level lags by some steps: at 5% a step and relative errors of 11% (the noises, here), SE is 10% too large.
    """
    s, r = pair("isotropic")
    steps = 500
    grow = torch.exp(0.5 * rate * torch.arange(steps, dtype=torch.float64))
    values = estimates(s, 3, r, 3, steps=steps, replicas=80, seed=1, grow=grow.float())
    true = grow.square()[:, None, None] * expected(s, 3, r, 3)
    errors = standard_errors(values)
    values, errors, true = values[WARM_UP:], errors[WARM_UP:], true[WARM_UP:]
    held = coverage(values, errors, true)
    scale = true[..., 2:3]
    show(f"trend {rate:+}", held, values / scale, errors / scale, true / scale)
    assert all(abs(p - NOMINAL[z]) < (3 if abs(rate) < 0.02 else 9) for z in NOMINAL for p in held[z])


def test_absolute_differences_would_lag():
    """What relative ones are for: squared gradients that fall by 1% a step, errors averaged as they were."""
    s, r = pair("isotropic")
    steps = 500
    grow = torch.exp(-0.005 * torch.arange(steps, dtype=torch.float64))
    values = estimates(s, 3, r, 3, steps=steps, replicas=20, seed=1, grow=grow.float())
    true = grow.square()[:, None, None] * expected(s, 3, r, 3)
    keep, average = 0.5 ** (1 / HALF_LIFE), torch.zeros_like(values[0])
    errors = [torch.full_like(average, math.nan)]
    for k in range(1, steps):
        average = keep * average + (1 - keep) * (values[k] - values[k - 1]).square() / 2
        errors.append((average / (1 - keep**k)).sqrt())
    held = coverage(values[WARM_UP:], torch.stack(errors)[WARM_UP:], true[WARM_UP:])
    print(held)
    assert all(p > 90 for p in held[1.0])


def test_branches_that_drift_apart():
    """The noise stands still while delta_g2 grows to 16 times in 600 steps, by 1.3% to 0.3% of itself in a step.

    Its error grows less than its level does, so that errors of earlier steps, taken relative to their level, are too
    large for this one: the intervals of delta_g2 hold the truth more often than they say, by up to 7 points.
    """
    s, r = pair("isotropic")
    steps, replicas, n = 600, 40, 4
    away = torch.linspace(1.0, 4.0, steps, dtype=torch.float64)
    apart = s.mean - r.mean
    noises = estimates(s, n, s, n, steps=steps, replicas=replicas, seed=3)[..., :2]
    generator = torch.Generator().manual_seed(4)
    drawn = math.sqrt(2 / n) * torch.randn(steps, replicas, sum(NUMELS), generator=generator)
    distance2 = (drawn + away.float()[:, None, None] * apart).square().sum(-1, keepdim=True).double()
    values = torch.cat([noises, distance2, distance2 - noises.sum(-1, keepdim=True)], -1)
    delta = away.square() * float(apart.square().sum())
    sigma = torch.full_like(delta, s.trace / n)
    true = torch.stack([sigma, sigma, delta + 2 * sigma, delta], -1)[:, None]
    errors = standard_errors(values)
    values, errors, true = values[WARM_UP:], errors[WARM_UP:], true[WARM_UP:]
    held = coverage(values, errors, true)
    show("branches drift apart", held, values / true, errors / true, true / true)
    for z in NOMINAL:
        assert all(abs(p - NOMINAL[z]) < 3 for p in held[z][:3])
        assert -3 < held[z][3] - NOMINAL[z] < 8


def test_early_steps():
    """Coverage from the second step on, 2,000 sequences.

    At the second step there is one difference, which the estimate itself is part of. For Gaussian values around a
    level that stands still, with ``X`` the estimate's error and ``Y`` the difference over sqrt(2), their correlation is
    1/sqrt(2), so that ``X/Y`` is ``(1 + C)/sqrt(2)`` with a Cauchy variable C.
    """
    generator = torch.Generator().manual_seed(0)
    values = 100 + torch.randn(10, DRAWS, 1, generator=generator, dtype=torch.float64)
    errors = standard_errors(values)
    assert errors[0].isnan().all()
    held = [coverage(values[t : t + 1], errors[t : t + 1], torch.tensor([100.0])) for t in range(10)]
    for step in range(1, 10):
        inner, outer = (held[step][z][0] for z in NOMINAL)
        print(f"step {step + 1}: {inner:.1f}% and {outer:.1f}%")
        assert 66 < inner < 78, step
        assert outer > (85 if step < 3 else 89), step
    for z in NOMINAL:
        c = 1.8125 * z * math.sqrt(2)
        theory = (math.atan(c - 1) + math.atan(c + 1)) / math.pi
        assert abs(held[1][z][0] / 100 - theory) < 4 * math.sqrt(theory * (1 - theory) / DRAWS)


def test_degrees_of_freedom():
    """The spread of averaged squared differences, over 4,000 sequences, is that of so many degrees of freedom."""
    generator = torch.Generator().manual_seed(1)
    values = 1000 + torch.randn(300, 4000, generator=generator, dtype=torch.float64)
    errors = standard_errors(values)
    for n in (1, 2, 5, 20, 299):
        squares = errors[n].square()
        ratio = float(2 * squares.mean() ** 2 / squares.var())
        theory = float(degrees_of_freedom(torch.tensor(float(n), dtype=torch.float64)))
        print(f"{n} differences: {ratio:.2f} degrees of freedom, theory {theory:.2f}")
        assert ratio == pytest.approx(theory, rel=0.15)  # of 4,000 chi-squares of one: 7% by their eighth moment


def test_through_the_ledger():
    """2,000 steps of 3 and 2 contributions through ledger, kernels and formulas, as the mixer drives them."""
    numels, n_s, n_r = (96, 40, 8), 2, 3
    s, r = (family("isotropic", numels, 8, seed=k).to(torch.float32) for k in (1, 2))
    ledger = Ledger(numels, CPU, **KINDS["exact"])
    generator = torch.Generator().manual_seed(5)
    rows = []
    for _ in range(DRAWS + WARM_UP):
        x_s, x_r = (source.draw(n, generator=generator) / n for source, n in ((s, n_s), (r, n_r)))
        found = feed(ledger, x_s, x_r, weights=(0.3, 0.7))
        rows.append(torch.stack([getattr(found, name) for name in NAMES]))
    values = torch.stack(rows)
    errors = standard_errors(values)
    numbers = truth(s, n_s, r, n_r)
    true = torch.tensor([numbers[name] for name in NAMES], dtype=torch.float64)
    held = coverage(values[WARM_UP:], errors[WARM_UP:], true)
    show("through the ledger", held, values[WARM_UP:], errors[WARM_UP:], true)
    assert all(abs(p - NOMINAL[z]) < 3 for z in NOMINAL for p in held[z])


def test_lone_contributions():
    """The temporal estimator: neighbours share their mean, which correlates them by 0.3%: too little to matter.

    ``G_t - M_t`` and its successor have the covariance ``(rho v - (1-rho)) C = -0.053 C`` where each has ``1.053 C``.
    """
    source = family("isotropic", NUMELS, ROW, seed=1).to(torch.float32)
    means = MovingMeans(CPU)
    values = []
    for gradient in source.draw(DRAWS + WARM_UP, generator=torch.Generator().manual_seed(2)):
        values.append(means.noise(Branch.RL, gradient))
        means.update(Branch.RL, gradient, YES)
    values = torch.stack(values[1:])[:, None]
    errors, true = standard_errors(values)[WARM_UP:], torch.tensor([source.trace])
    values = values[WARM_UP:]
    held = coverage(values, errors, true)
    show("lone contributions", held, values, errors, true)
    assert all(abs(p[0] - NOMINAL[z]) < 3 for z, p in held.items())

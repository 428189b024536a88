"""Law ``gac`` and the optimizer's momentum: what an average of gradients leaves of the noise."""

from __future__ import annotations

import gc
import math

import pytest
import torch
from torch.optim.optimizer import _global_optimizer_post_hooks

import gac
from tests.gac.laws.draws import Truth, estimates

S = gac.Statistics
FREE = {"cap": 1.0, "mu_min": 0.0, "mu_max": 1.0}
NOISE = 1 / 19  # what Adam's beta1 of .9 leaves: (1 - .9) / (1 + .9)


def test_noise_counts_by_what_the_average_leaves_of_it():
    s, r, d, alpha = 2.0, 3.0, 0.5, 0.3
    mu = float(gac.Controller("gac", alpha=alpha, momentum=0.9, **FREE).update(S(s, r, d)))
    assert mu == pytest.approx((alpha * d + NOISE * r) / (d + NOISE * (s + r)), rel=1e-12)


def test_without_disagreement_momentum_changes_nothing():
    """Both branches' noise shrinks alike."""
    for d in (0.0, -1.0):
        mus = [float(gac.Controller("gac", momentum=m, **FREE).update(S(2.0, 6.0, d))) for m in (0.0, 0.9)]
        assert mus == pytest.approx([0.75, 0.75])


@pytest.mark.parametrize("momentum", [0.0, 0.9, 0.95])
def test_what_adam_moves_by_has_least_error_there(momentum):
    """Noisy gradients of fixed means go through Adam itself; the error of its average is measured for three mu.

    2,000 runs in 64 dimensions, of 200 steps, after which the start has no weight. The error is a parabola in mu, so
    that three points give its bottom, here with a standard error below .003.
    """
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    runs, size, alpha, s, r, d = 2000, 64, 0.5, 1.0, 6.0, 0.4
    g_s, apart = draw(size), draw(size)
    g_r = g_s + apart / apart.norm() * math.sqrt(d)
    wanted = alpha * g_s + (1 - alpha) * g_r
    averages = [torch.zeros(runs, size, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    optimizer = torch.optim.Adam(averages, betas=(momentum, 0.999))
    for _ in range(200):
        noisy_s, noisy_r = (g + draw(runs, size) * math.sqrt(x / size) for g, x in ((g_s, s), (g_r, r)))
        for mu, parameter in zip((0.0, 0.5, 1.0), averages, strict=True):
            parameter.grad = mu * noisy_s + (1 - mu) * noisy_r
        optimizer.step()
    kept = [optimizer.state[parameter]["exp_avg"] for parameter in averages]
    low, middle, high = (float((average - wanted).square().sum(1).mean()) for average in kept)
    best = 0.5 - 0.25 * (high - low) / (high - 2 * middle + low)
    controller = gac.Controller("gac", **FREE)
    controller.law.follow(optimizer)
    assert best == pytest.approx(float(controller.update(S(s, r, d))), abs=0.015)
    without = (alpha * d + r) / (d + s + r)
    assert momentum == 0.0 or abs(best - without) > 0.1, "else nothing was shown"


def test_standard_error_is_the_propagated_one():
    """Against finite differences of the closed form in sigma_s2, sigma_r2 and distance2."""
    s, r, d, errors = 2.0, 3.0, 0.5, (0.3, 0.2, 0.4)

    def mu(s: float, r: float, total: float) -> float:
        delta = total - s - r
        return (0.3 * delta + NOISE * r) / (delta + NOISE * (s + r))

    at, h = (s, r, s + r + d), 1e-6
    beside = lambda i, step: mu(*(x + step * (i == k) for k, x in enumerate(at)))
    slopes = [(beside(i, h) - beside(i, -h)) / (2 * h) for i in range(3)]
    controller = gac.Controller("gac", alpha=0.3, momentum=0.9)
    controller.update(S(s, r, d, sigma_s2_se=errors[0], sigma_r2_se=errors[1], distance2_se=errors[2]))
    expected = math.hypot(*(slope * error for slope, error in zip(slopes, errors, strict=True)))
    assert float(controller.law.state["mu_se"]) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("deviations", [10.0, 5.0])
def test_the_truth_lies_within_its_interval(deviations):
    """95% intervals cover the best mu in at least 92% of 400 runs (standard error 1.1 points) of settled averages."""
    share = math.tanh(math.log(2) / 60)  # (1-keep)/(1+keep) at half-life 30
    q = 5.0 / 100
    deviation = math.sqrt(share * (2 * q**2 * 100 + 2 * (1.0 + 16.0) / 300))
    truth = Truth(1.0, 4.0, deviations * deviation, directions=100)
    raw, error = estimates(truth, runs=400, steps=120, half_life=30.0, momentum=0.9)
    best = (0.5 * truth.delta_g2 + NOISE * 4.0) / (truth.delta_g2 + NOISE * 5.0)
    covered = ((raw[:, -1] - best).abs() <= 1.96 * error[:, -1]).double().mean()
    print(f"{deviations:g} deviations: covered {covered:.3f}")
    assert covered >= 0.92


def test_momentum_of_optimizers():
    parameter = torch.nn.Parameter(torch.zeros(2))
    law = lambda optimizer, **options: _told(gac.Controller("gac", **options).law, optimizer).momentum
    assert law(torch.optim.AdamW([parameter], betas=(0.8, 0.99))) == 0.8
    assert law(torch.optim.SGD([parameter], lr=0.1)) == 0.0
    assert law(torch.optim.SGD([parameter], lr=0.1, momentum=0.95)) == 0.95
    assert law(torch.optim.RMSprop([parameter], lr=0.1)) == 0.0
    assert law(torch.optim.Adagrad([parameter], lr=0.1)) == 0.0, "it has no such group entry"
    other = torch.nn.Parameter(torch.zeros(2))
    groups = [{"params": [parameter], "betas": (0.9, 0.99)}, {"params": [other], "betas": (0.5, 0.99)}]
    assert law(torch.optim.Adam(groups)) == 0.5, "the least: noise is rather counted too much"
    assert law(torch.optim.Adam([parameter]), momentum=0.0) == 0.0, "what the user set stays"


def test_other_laws_do_not_mind():
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.zeros(2))])
    for name in ("paper", "fixed", "chord-mu", "kl-ctrl"):
        law = gac.Controller(name).law
        before = dict(vars(law))
        assert vars(_told(law, optimizer)) == before


def test_patch_tells_the_law():
    model = torch.nn.Linear(3, 2)
    adam, sgd = torch.optim.Adam(model.parameters()), torch.optim.SGD(model.parameters(), lr=0.1)
    for options, expected in (
        ({}, 0.0),
        ({"optimizer": adam}, 0.9),
        ({"optimizer": sgd}, 0.0),
        ({"optimizer": adam, "momentum": 0.5}, 0.5),
        ({"momentum": 0.5}, 0.5),
    ):
        with gac.patch(model, **options) as mixer:
            assert mixer.controller.law.momentum == expected, options
    with gac.patch(model, metric="optimizer") as mixer:
        mixer.follow(adam)
        assert mixer.controller.law.momentum == 0.9, "followed, without ending the mixer's steps"


def test_an_optimizer_that_nobody_named_is_found_at_its_first_step():
    model, other = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    ones = lambda m: [setattr(p, "grad", torch.ones_like(p)) for p in m.parameters()]
    ones(model), ones(other)
    stranger = torch.optim.Adam(other.parameters(), betas=(0.5, 0.9))
    adam = torch.optim.Adam(model.parameters(), betas=(0.8, 0.9))
    late = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.3)
    with gac.patch(model) as mixer, gac.patch(other, momentum=0.1) as told:
        law = mixer.controller.law
        stranger.step()
        assert law.momentum == 0.0, "it steps another model"
        adam.step()
        assert law.momentum == 0.8
        late.step()
        assert law.momentum == 0.8, "the first one counts"
        assert told.controller.law.momentum == 0.1
    before = len(_global_optimizer_post_hooks)
    gac.patch(model).unpatch()
    assert len(_global_optimizer_post_hooks) == before, "nothing is left behind"
    mixer = gac.patch(model)
    mixer.unpatch()
    adam.step()
    assert mixer.controller.law.momentum == 0.0
    dropped = gac.patch(torch.nn.Linear(2, 2))
    assert len(_global_optimizer_post_hooks) == before + 1
    del dropped
    gc.collect()
    assert len(_global_optimizer_post_hooks) == before


def test_a_step_before_the_measurement_decides_what_the_first_mu_is():
    """In a plain loop the optimizer steps before the mixer does, so that no update goes by without its momentum."""
    torch.manual_seed(0)
    model = torch.nn.Linear(5, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.0)
    with gac.patch(model, estimator="exact", **FREE) as mixer:
        for branch, sign in ((mixer.sft, 1.0), (mixer.rl, -1.0)):
            for _ in range(3):
                with branch():
                    mixer.backward(sign * model(torch.randn(4, 5)).mean())
        optimizer.step()
        mixer.step()
        found = mixer.statistics
        expected = gac.Controller("gac", momentum=0.9, **FREE).update(found)
        assert float(mixer.mu) == pytest.approx(float(expected), rel=1e-6)
        plain = gac.Controller("gac", **FREE).update(found)
        assert abs(float(plain) - float(expected)) > 1e-3, "else nothing was shown"


def _told(law, optimizer):
    law.follow(optimizer)
    return law

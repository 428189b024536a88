"""Statistics from hooks equal those computed in float64 from separate torch.autograd.grad calls."""

from __future__ import annotations

import math

import pytest
import torch

import gac
from tests.gac.models import ARCHITECTURES, float64_gradient, rl_loss, sft_loss, tiny_model, tokens
from tests.gac.truth import statistics

COUNTS = [(1, 1), (2, 2), (8, 8), (2, 5), (8, 1)]
CASES = [("qwen2", True, *counts) for counts in COUNTS] + [(*a, 2, 3) for a in ARCHITECTURES if a != ("qwen2", True)]


def hybrid_step(mixer, model, batches_s, batches_r):
    with mixer.sft():
        for batch in batches_s:
            mixer.backward(sft_loss(model, batch) / len(batches_s))
    with mixer.rl():
        for batch in batches_r:
            mixer.backward(rl_loss(model, batch) / len(batches_r))
    mixer.step()


def contributions(model, loss, batches):
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [float64_gradient(loss(model, b) / len(batches), parameters) for b in batches]


@pytest.mark.parametrize(("family", "tied", "n_s", "n_r"), CASES)
def test_exact(family, tied, n_s, n_r):
    model = tiny_model(family, tied=tied)
    sft, rl = tokens(n_s, 1), tokens(n_r, 2)
    truth = statistics(contributions(model, sft_loss, sft), contributions(model, rl_loss, rl))
    with gac.patch(model, estimator="exact") as mixer:
        hybrid_step(mixer, model, sft, rl)
        found = mixer.statistics
    scale = truth["norm_s2"] + truth["norm_r2"]  # what differences of norms are exact relative to
    for name, value in truth.items():
        if math.isnan(value):
            assert math.isnan(float(getattr(found, name))), name
        else:
            assert float(getattr(found, name)) == pytest.approx(value, rel=1e-5, abs=1e-6 * scale), name
    for name in ("sigma_s2", "sigma_r2", "distance2", "norm_s2", "norm_r2"):
        if not math.isnan(truth[name]):
            assert float(getattr(found, name)) == pytest.approx(truth[name], rel=1e-5), name


class SmallSketch:
    """Forces collisions: a model of this size would otherwise have a bucket for every element."""

    buckets = 4096


@pytest.mark.parametrize(("family", "tied", "n_s", "n_r"), CASES)
def test_sketch(family, tied, n_s, n_r, monkeypatch):
    """|<Sa,Sb> - <a,b>| has variance (|a|^2|b|^2 + <a,b>^2 - 2 sum a_i^2 b_i^2) summed within buckets.

    For a slab of r rows the exact variance of |Sa|^2 is 2 * sum over buckets of ((sum_i a_i^2)^2 - sum_i a_i^4), which
    the test computes from the true vectors; it allows 5 standard deviations.
    """
    monkeypatch.setattr("gac.observe.ledger.SMALLEST_SKETCH", SmallSketch.buckets)
    model = tiny_model(family, tied=tied)
    sft, rl = tokens(n_s, 1), tokens(n_r, 2)
    x_s, x_r = contributions(model, sft_loss, sft), contributions(model, rl_loss, rl)
    truth = statistics(x_s, x_r)
    with gac.patch(model, estimator="sketch") as mixer:
        layout = mixer._observer.ledgers[0].layout
        assert not layout.lossless
        hybrid_step(mixer, model, sft, rl)
        found = mixer.statistics
    bucket = bucket_of_each_element(layout)

    def norm_error(x):
        squares = torch.zeros(layout.size, dtype=torch.float64).index_add_(0, bucket, x.square())
        fourth = torch.zeros(layout.size, dtype=torch.float64).index_add_(0, bucket, x.square().square())
        return math.sqrt(max(2 * float((squares.square() - fourth).sum()), 0.0))

    g_s, g_r = sum(x_s), sum(x_r)
    centred = {"sigma_s2": x_s, "sigma_r2": x_r}
    bounds = {
        "norm_s2": norm_error(g_s),
        "norm_r2": norm_error(g_r),
        "distance2": norm_error(g_s - g_r),
    }
    for name, xs in centred.items():
        if len(xs) > 1:
            mean = sum(xs) / len(xs)
            # errors of the terms add at most linearly
            bounds[name] = len(xs) / (len(xs) - 1) * sum(norm_error(x - mean) for x in xs)
    for name, bound in bounds.items():
        assert abs(float(getattr(found, name)) - truth[name]) <= 5 * bound + 1e-5 * abs(truth[name]), name
        assert bound < 0.5 * truth[name], "the bound must mean something"


def bucket_of_each_element(layout) -> torch.Tensor:
    parts = []
    for numel, offset in zip(layout.numels, layout.bucket_offsets, strict=True):
        j = torch.arange(numel)
        parts.append(offset + j // (layout.lanes * layout.rows_per_slab) * layout.lanes + j % layout.lanes)
    return torch.cat(parts)


def test_large_sketch_keeps_small_models_whole():
    model = tiny_model()
    with gac.patch(model, estimator="sketch") as mixer:
        assert mixer._observer.ledgers[0].layout.lossless
        sft, rl = tokens(3, 1), tokens(2, 2)
        truth = statistics(contributions(model, sft_loss, sft), contributions(model, rl_loss, rl))
        hybrid_step(mixer, model, sft, rl)
        for name in ("sigma_s2", "sigma_r2", "distance2", "norm_s2", "norm_r2"):
            assert float(getattr(mixer.statistics, name)) == pytest.approx(truth[name], rel=1e-4), name


@pytest.mark.parametrize("estimator", ["exact", "sketch"])
def test_passes_that_reach_different_parameters(estimator):
    """As experts do: a pass may start at the same parameter as the last one and go on to others."""
    generator = torch.Generator().manual_seed(5)
    model = torch.nn.ParameterDict({name: torch.zeros(40) for name in ("left", "right", "shared")})
    drawn = {(branch, k): torch.randn(2, 40, generator=generator) for branch in "sr" for k in range(4)}

    def loss(branch, k):  # the first gradient of every pass is that of "shared"
        private, common = drawn[branch, k]
        return (model["left" if k % 2 else "right"] * private).sum() + (model["shared"] * common).sum()

    def vector(branch, k):
        (private, common), nothing = drawn[branch, k].double(), torch.zeros(40, dtype=torch.float64)
        return torch.cat([private, nothing, common] if k % 2 else [nothing, private, common])

    truth = statistics(*([vector(branch, k) for k in range(4)] for branch in "sr"))
    with gac.patch(model, estimator=estimator) as mixer:
        for _ in range(2):  # the second step finds what the first one has looked up
            for branch, enter in (("s", mixer.sft), ("r", mixer.rl)):
                with enter():
                    for k in range(4):
                        mixer.backward(loss(branch, k))
            mixer.step()
            found = mixer.statistics
            for parameter in model.values():
                parameter.grad = None
            for name in ("sigma_s2", "sigma_r2", "distance2", "norm_s2", "norm_r2"):
                assert float(getattr(found, name)) == pytest.approx(truth[name], rel=1e-5), name


@pytest.mark.parametrize("estimator", ["exact", "sketch"])
def test_the_users_scaling_of_the_loss_does_not_change_mu(estimator):
    """Statistics follow the gradient that was accumulated, whatever the loss was divided by."""
    model = tiny_model()
    sft, rl = tokens(4, 1), tokens(4, 2)
    found = []
    for factor in (1.0, 0.25):
        model.zero_grad()
        with gac.patch(model, estimator=estimator) as mixer:
            with mixer.sft():
                for b in sft:
                    mixer.backward(factor * sft_loss(model, b))
            with mixer.rl():
                for b in rl:
                    mixer.backward(factor * rl_loss(model, b))
            mixer.step()
            found.append((float(mixer.statistics.sigma_s2), mixer.metrics()["mu_raw"]))
    assert found[1][0] == pytest.approx(found[0][0] / 16, rel=1e-5)
    assert found[1][1] == pytest.approx(found[0][1], rel=1e-4)


def test_exact_in_bf16_follows_the_gradients_autograd_made():
    model = tiny_model(dtype=torch.bfloat16)
    sft, rl = tokens(3, 1), tokens(3, 2)
    # under weight 1 the incoming gradients are those of the plain loss
    x_s = contributions(model, sft_loss, sft)
    with gac.patch(model, estimator="exact", law="fixed", mu=1.0) as mixer:
        with mixer.sft():
            for b in sft:
                mixer.backward(sft_loss(model, b) / 3)
        with mixer.rl():
            for b in rl:
                mixer.backward(rl_loss(model, b) / 3)
        mixer.step()
        found = mixer.statistics
    truth = statistics(x_s, x_s)
    assert float(found.sigma_s2) == pytest.approx(truth["sigma_s2"], rel=1e-5)
    assert float(found.norm_s2) == pytest.approx(truth["norm_s2"], rel=1e-5)
    assert float(found.n_r) == 0, "a branch of weight 0 leaves nothing to measure"
    assert math.isnan(float(found.delta_g2))


def test_running_sums_in_bf16_stay_close():
    """64 micro-batches accumulated in bf16: differences of running sums give the noise to 2%."""
    model = tiny_model(dtype=torch.bfloat16)
    sft = tokens(64, 1)
    x_s = contributions(model, sft_loss, sft)
    with gac.patch(model, estimator="sketch", law="fixed", mu=1.0) as mixer:
        with mixer.sft():
            for b in sft:
                mixer.backward(sft_loss(model, b) / 64)
        mixer.step()
        assert float(mixer.statistics.sigma_s2) == pytest.approx(statistics(x_s, x_s)["sigma_s2"], rel=0.02)


def test_lone_contributions_are_compared_with_earlier_steps():
    """N = 1: on gradients with a fixed mean the estimate's average is the noise (2,000 draws, 4 standard errors)."""
    torch.manual_seed(0)
    model = torch.nn.Linear(64, 1, bias=False)
    sigma2, mean = 64.0, 3.0
    estimates = []
    with gac.patch(model, estimator="sketch") as mixer:
        for step in range(2000):
            model.zero_grad()
            for branch in (mixer.sft, mixer.rl):
                with branch():
                    mixer.backward((model.weight * (torch.randn(1, 64) + mean)).sum())
            mixer.step()
            if step >= 50:
                estimates.append(float(mixer.statistics.sigma_s2))
        assert mixer.metrics()["estimator"] == "sketch+time"
    values = torch.tensor(estimates)
    # neighbours share the mean they are compared with: take every 10th for the standard error
    error = float(values.std() / math.sqrt(len(values) / 2))
    assert abs(float(values.mean()) - sigma2) < 4 * error

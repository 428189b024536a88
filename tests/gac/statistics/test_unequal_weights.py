"""Contributions of unequal size: what the formula without weights costs, and when nothing; the weighted form."""

from __future__ import annotations

import math

import pytest
import torch

import gac
from gac.statistics import noise_from_weighted
from tests.gac.statistics.sources import DRAWS, assert_mean, error_of_variance, family, noise
from tests.gac.truth import noise_from_contributions

TOKENS = torch.tensor([100.0, 300.0, 50.0, 550.0], dtype=torch.float64)
N = len(TOKENS)


def source(numels: tuple[int, ...] = (256, 96, 32)):
    """One token's gradient: its noise is 100 times the mean's square, so micro-batches have both."""
    s = family("rows", numels, 16, seed=1)
    s.mean.mul_((s.trace / 100 / s.mean.square().sum()).sqrt())
    return s


def micro_batches(s, tokens: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """``[draws, n, P]``: means over ``tokens`` tokens, ``N(mean, C / tokens)``."""
    e = s.draw(DRAWS, tokens.shape[-1], generator=generator) - s.mean
    return s.mean + e / tokens.sqrt()[..., None]


def weighted_noise(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """``[draws]``: the package's estimate for contributions ``[draws, n, P]`` of weights ``[n]``; 0 adds nothing."""
    inverse = torch.where(w > 0, 1 / w, 0.0)
    power, norm2 = (x.square().sum(2) * inverse).sum(1), x.sum(1).square().sum(1)
    return noise_from_weighted(power, norm2, torch.full_like(power, int((w > 0).sum())))


def test_one_mean_over_the_tokens_of_a_step():
    """``x_k = w_k y_k`` with ``w_k = T_k / sum T``: too high by ``|g|^2 cv^2 / (N-1)``, cv of the token counts.

    Contributions then have the means ``w_k g`` and the covariances ``w_k C / sum T``. From ``E sum |x_k|^2 =
    sum tr C_k + sum |m_k|^2`` and ``E|G|^2 = sum tr C_k + |sum m_k|^2`` the estimate averages to ``sum tr C_k`` (the
    noise: unequal covariances do no harm) plus ``N/(N-1) * sum |m_k - mean m|^2 = |g|^2 (N sum w_k^2 - 1)/(N-1)``.
    """
    s = source()
    w = TOKENS / TOKENS.sum()
    x = w[:, None] * micro_batches(s, TOKENS, torch.Generator().manual_seed(1))
    true, g2 = s.trace / float(TOKENS.sum()), float(s.mean.square().sum())
    cv2 = float(TOKENS.var(unbiased=False) / TOKENS.mean() ** 2)
    assert_mean((x.sum(1) - s.mean).square().sum(1), true, what="noise")
    away = assert_mean(noise(x), true + g2 * cv2 / (N - 1), what=f"estimate, cv^2 = {cv2:.3f}")
    assert abs(away) < 4 < g2 * cv2 / (N - 1) / (float(noise(x).std()) / DRAWS**0.5), "the bias shows"
    assert_mean(weighted_noise(x, w), true, what="weighted form")


def test_a_mean_over_each_micro_batch():
    """``x_k = y_k / N``: equal means and unequal covariances are no bias."""
    s = source()
    x = micro_batches(s, TOKENS, torch.Generator().manual_seed(2)) / N
    assert_mean(noise(x), s.trace * float((1 / TOKENS).sum()) / N**2, what="estimate")


def test_a_constant_divisor():
    """``x_k = T_k y_k / c``, lengths drawn anew each step: equally distributed, so unbiased; lengths count as noise.

    ``tr Var(x) = (E T * tr C + Var T * |g|^2) / c^2``.
    """
    s, c = source(), 1000.0
    generator = torch.Generator().manual_seed(3)
    lengths = torch.tensor([50.0, 150.0, 400.0], dtype=torch.float64)
    tokens = lengths[torch.randint(0, 3, (DRAWS, N), generator=generator)]
    x = tokens[..., None] * micro_batches(s, tokens, generator) / c
    spread = float(lengths.mean()) * s.trace + float(lengths.var(unbiased=False) * s.mean.square().sum())
    assert_mean(noise(x), N * spread / c**2, what="estimate")


WEIGHTED = {
    "2": [900.0, 100.0],
    "3": [500.0, 10.0, 120.0],
    "8": [100.0, 300.0, 50.0, 550.0, 1.0, 220.0, 220.0, 800.0],
    "3 and an empty one": [500.0, 0.0, 120.0, 80.0],
}


@pytest.mark.parametrize("counts", WEIGHTED)
@pytest.mark.parametrize("signal", [0.0, 10.0])
def test_weighted_form(counts, signal):
    """Unbiased, with the variance ``2 tr(C^2)/(n-1)`` of equal weights, whatever the weights and the signal.

    ``y_k = x_k / sqrt(w_k)`` are Gaussian with one covariance C (of the sum) and the means ``sqrt(w_k) g``. The
    estimate is what of ``sum |y_k|^2`` is left without the part along the unit vector ``sqrt(w)``, in which the whole
    mean lies: n - 1 independent draws of ``N(0, C)``. The form without weights is ``n/(n-1) |(1 - J/n) x|^2``, of
    variance ``2 tr(C^2) (n/(n-1))^2 |(1 - J/n) diag(w) (1 - J/n)|^2`` even where no signal biases it.
    """
    s = source((96, 48, 16))
    s.mean.mul_(math.sqrt(signal * 100 / float(sum(WEIGHTED[counts]))))  # |g|^2 is so many times the noise
    tokens = torch.tensor(WEIGHTED[counts], dtype=torch.float64)
    w, n = tokens / tokens.sum(), int((tokens > 0).sum())
    x = w[:, None] * torch.nan_to_num(micro_batches(s, tokens.clamp(min=1.0), torch.Generator().manual_seed(4)))
    true, trace2 = s.trace / float(tokens.sum()), s.product_trace(s) / float(tokens.sum()) ** 2
    found, spread = weighted_noise(x, w), 2 * trace2 / (n - 1)
    assert_mean(found, true, error=math.sqrt(spread / DRAWS), what=f"{counts} contributions, signal {signal}")
    assert abs(float(found.var()) - spread) < 4 * error_of_variance(found)

    some = w > 0
    plain = noise(x[:, some])
    centre = torch.eye(n, dtype=torch.float64) - 1 / n
    factor = (n - 1) * (n / (n - 1)) ** 2 * float((centre @ torch.diag(w[some]) @ centre).square().sum())
    bias = float(s.mean.square().sum()) * (n * float(w.square().sum()) - 1) / (n - 1)
    assert_mean(plain, true + bias, what="without weights")
    if signal == 0:
        assert abs(float(plain.var()) - factor * spread) < 4 * error_of_variance(plain)
    error = math.sqrt(float((plain - true).square().mean() / (found - true).square().mean()))
    print(f"variance without weights: {factor:.2f} times; root mean square error {error:.2f} times")
    assert factor > 1 - 1e-9  # of two contributions only the difference is left, whatever the weights


@pytest.mark.parametrize("n", [2, 3, 8])
def test_equal_weights_are_no_weights(n):
    x = source().draw(50, n, generator=torch.Generator().manual_seed(5)) / n
    assert torch.allclose(weighted_noise(x, torch.full((n,), 1 / n, dtype=torch.float64)), noise(x), rtol=1e-12)
    power, norm2 = torch.tensor(5.0), torch.tensor(2.0)
    assert noise_from_contributions(power, norm2, torch.tensor(1.0)).isnan()
    assert noise_from_weighted(power, norm2, torch.tensor(1.0)).isnan()


@pytest.mark.parametrize("told", ["numbers", "tensors", "with the branch"])
@pytest.mark.parametrize("estimator", ["exact", "sketch"])
def test_tokens_of_the_mixer(estimator, told):
    """``tokens=`` gives the weighted form of the gradients that autograd makes; RL, without tokens, the other."""
    torch.manual_seed(0)
    model = torch.nn.Linear(12, 3)
    counts, total = [700, 0, 40, 260], 1000
    inputs = [torch.randn(max(c, 1), 12) * (c > 0) for c in counts]
    sums = [lambda x=x, c=c: (model(x).square().sum() * (c > 0)) / total for x, c in zip(inputs, counts, strict=True)]
    others = [lambda x=x: model(x).sum() for x in torch.randn(3, 5, 12)]
    flat = lambda loss: torch.cat([g.double().flatten() for g in torch.autograd.grad(loss(), list(model.parameters()))])
    x_s, x_r = torch.stack([flat(f) for f in sums]), torch.stack([flat(f) for f in others])
    w = torch.tensor(counts, dtype=torch.float64) / total
    with gac.patch(model, estimator=estimator) as mixer:
        if told == "with the branch":
            for loss, count in zip(sums, counts, strict=True):
                with mixer.sft(tokens=count):
                    (mixer.weight * loss()).backward()
        else:
            with mixer.sft():
                for loss, count in zip(sums, counts, strict=True):
                    mixer.backward(loss(), tokens=torch.tensor(count) if told == "tensors" else count)
        with mixer.rl():
            for loss in others:
                mixer.backward(loss())
        mixer.step()
        found = mixer.statistics
    assert (float(found.n_s), float(found.n_r)) == (3, 3)
    assert float(found.sigma_s2) == pytest.approx(float(weighted_noise(x_s[None], w)), rel=1e-4)
    assert float(found.sigma_r2) == pytest.approx(float(noise(x_r[None])), rel=1e-4)
    distance2 = float((x_s.sum(0) - x_r.sum(0)).square().sum())
    assert float(found.distance2) == pytest.approx(distance2, rel=1e-4)
    assert float(found.delta_g2) == pytest.approx(
        distance2 - float(found.sigma_s2) - float(found.sigma_r2), abs=1e-6 * distance2
    )


def test_one_contribution_with_tokens_measures_no_noise_within_the_step():
    """Beside an empty contribution a lone one has no replicate; time must not be asked either: it was not alone."""
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 1)
    with gac.patch(model, estimator="exact") as mixer:
        for _ in range(3):
            with mixer.sft():
                mixer.backward(model(torch.randn(5, 4)).sum() / 5, tokens=5)
                mixer.backward(model(torch.zeros(1, 4)).sum() * 0, tokens=0)
            mixer.step()
            model.zero_grad()
        assert float(mixer.statistics.n_s) == 1
        assert math.isnan(float(mixer.statistics.sigma_s2))

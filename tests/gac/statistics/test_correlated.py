"""What the estimators do where contributions are not independent: the bias is the one that theory predicts."""

from __future__ import annotations

import math

import pytest
import torch

from tests.gac.statistics.sources import DRAWS, assert_mean, family, noise

NUMELS = (256, 96, 32)


def correlated(source, n: int, rho: float, generator: torch.Generator) -> torch.Tensor:
    """``[draws, n, P]`` contributions ``y_k / n``; any two micro-batches have correlation ``rho >= -1/(n-1)``.

    With independent ``e_k`` of covariance C and mean ``ebar``, ``a*(e_k - ebar) + b*ebar`` has variance
    ``a^2 (1-1/n) + b^2/n`` and covariance ``(b^2 - a^2)/n``: these are C and rho*C for ``a^2 = 1 - rho`` and
    ``b^2 = 1 + (n-1)*rho``.
    """
    e = source.draw(DRAWS, n, generator=generator) - source.mean
    mean = e.mean(1, keepdim=True)
    y = math.sqrt(1 - rho) * (e - mean) + math.sqrt(1 + (n - 1) * rho) * mean
    return (y + source.mean) / n


@pytest.mark.parametrize("rho", [-0.1, 0.1, 0.5])
@pytest.mark.parametrize("n", [2, 3, 8])
def test_micro_batches_with_a_common_part(n, rho):
    """The estimate averages to ``N*(1-rho)*tr C_x``; the noise is ``N*(1+(N-1)*rho)*tr C_x``.

    For ``E sum |x_k|^2 = N (tr C_x + |m|^2)`` and ``E |G|^2 = N^2 |m|^2 + N (1+(N-1)*rho) tr C_x`` give
    ``N/(N-1) * (E sum |x_k|^2 - E|G|^2/N) = N (1-rho) tr C_x``: too low by ``N^2 * rho * tr C_x``, by which
    ``delta_g2`` is too high. Here ``C_x = C/N^2``. The estimate is that of independent contributions with covariance
    ``(1-rho)*C``, which gives its standard error.
    """
    source, other = family("rows", NUMELS, 16, seed=1), family("rows", NUMELS, 16, seed=2)
    generator = torch.Generator().manual_seed(n)
    x = correlated(source, n, rho, generator)
    estimate = noise(x)
    variance = 2 * (1 - rho) ** 2 * source.product_trace(source) / (n**2 * (n - 1))
    predicted = (1 - rho) * source.trace / n
    assert_mean(estimate, predicted, error=math.sqrt(variance / DRAWS), what=f"N={n} rho={rho}: estimate")
    noise_of_sum = (x.sum(1) - source.mean).square().sum(1)
    true = (1 + (n - 1) * rho) * source.trace / n
    assert_mean(noise_of_sum, true, what=f"N={n} rho={rho}: noise")

    independent = other.draw(DRAWS, 3, generator=generator) / 3
    delta_g2 = (x.sum(1) - independent.sum(1)).square().sum(1) - estimate - noise(independent)
    disagreement = float((source.mean - other.mean).square().sum())
    assert_mean(delta_g2, disagreement + rho * source.trace, what=f"N={n} rho={rho}: delta_g2")


def test_branches_with_a_common_part():
    """The same prompts in both branches: ``distance2`` and ``delta_g2`` lose ``2 tr Cov(G_s, G_r)``."""
    n, shared = 4, 0.3
    s, r = family("isotropic", NUMELS, 16, seed=1), family("isotropic", NUMELS, 16, seed=2)
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(DRAWS, n, s.mean.numel(), generator=generator, dtype=torch.float64)
    x_s, x_r = (
        (source.mean + math.sqrt(1 - shared) * (source.draw(DRAWS, n, generator=generator) - source.mean)
         + math.sqrt(shared) * common) / n
        for source in (s, r)
    )  # fmt: skip
    delta_g2 = (x_s.sum(1) - x_r.sum(1)).square().sum(1) - noise(x_s) - noise(x_r)
    assert_mean(noise(x_s), s.trace / n, what="sigma_s2 is not touched")
    expected = float((s.mean - r.mean).square().sum()) - 2 * shared * s.trace / n
    assert_mean(delta_g2, expected, what="delta_g2")


GROUPS, GENERATIONS, MICRO_BATCHES = 8, 8, 4


@pytest.mark.parametrize("within", [0.05, 0.3])
def test_grpo_groups_split_over_micro_batches(within):
    """Rollouts of a prompt resemble each other; shuffled over micro-batches they make these resemble each other.

    With K rollouts a prompt, M in all, correlation ``within`` between rollouts of a prompt and covariance C of one
    rollout's gradient, the mean gradient has the noise ``(1 + (K-1)*within) * tr C / M``. Two rollouts drawn at random
    share their prompt with probability ``p = (K-1)/(M-1)``, so contributions of B = M/N rollouts have the covariance
    ``(B + B(B-1)*p*within) * C/M^2`` and, two of them, the cross-covariance ``B^2*p*within * C/M^2``. The estimate
    averages to N times the difference of the traces, ``(1 - p*within) * tr C / M``. Whole groups have no such bias.
    """
    size, rollouts = 64, GROUPS * GENERATIONS
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    prompt = math.sqrt(within) * normal(DRAWS, GROUPS, 1, size)
    own = math.sqrt(1 - within) * normal(DRAWS, GROUPS, GENERATIONS, size)
    grouped = (prompt + own).flatten(1, 2) / rollouts
    order = torch.rand(DRAWS, rollouts, generator=generator).argsort(1)
    shuffled = grouped.gather(1, order[:, :, None].expand_as(grouped))
    whole, split = (x.unflatten(1, (MICRO_BATCHES, -1)).sum(2) for x in (grouped, shuffled))

    true = (1 + (GENERATIONS - 1) * within) * size / rollouts
    assert_mean(grouped.sum(1).square().sum(1), true, what=f"within={within}: noise")
    assert_mean(noise(whole), true, what=f"within={within}: estimate, whole groups")
    p = (GENERATIONS - 1) / (rollouts - 1)
    low = (1 - p * within) * size / rollouts
    away = assert_mean(noise(split), low, what=f"within={within}: estimate, split groups")
    print(f"within={within}: the estimate is {low / true:.2f} of the noise ({away:+.1f} standard errors from theory)")


def test_a_baseline_shared_by_micro_batches():
    """One group of K rollouts, one in each micro-batch, advantage ``r - mean(r)``: the estimate lacks ``|a|^2``.

    With scores ``s ~ N(0, 1)`` and rewards ``r = <a, s> + e``, a contribution ``(r_k - rbar) s_k`` has the mean
    ``(1-1/K) a``. Of ``E (r_i - rbar)(r_j - rbar) s_i s_j^T`` the terms ``r_i r_j``, ``-r_i rbar``, ``-r_j rbar`` and
    ``rbar^2`` leave ``(1 - 1/K - 1/K + 2/K^2) a a^T`` (odd moments vanish), so any two contributions have the
    covariance ``a a^T / K^2``, and the estimate misses ``K^2`` times its trace. 100 times the usual draws, since that
    is little beside the noise.
    """
    k, size = 4, 4
    generator = torch.Generator().manual_seed(5)
    a = torch.ones(size, dtype=torch.float64)
    s = torch.randn(100 * DRAWS, k, size, generator=generator, dtype=torch.float64)
    reward = s @ a + torch.randn(100 * DRAWS, k, generator=generator, dtype=torch.float64)
    x = (reward - reward.mean(1, keepdim=True))[:, :, None] * s
    g = (k - 1) * a
    found = noise(x) - (x.sum(1) - g).square().sum(1)
    assert_mean(found, -float(a @ a), what=f"estimate - noise (of {float((x.sum(1) - g).square().sum(1).mean()):.1f})")

"""Contributions of unequal size. The formula knows no weights; this is what that costs, and when it costs nothing."""

from __future__ import annotations

import torch

from tests.gac.statistics.sources import DRAWS, assert_mean, family, noise

TOKENS = torch.tensor([100.0, 300.0, 50.0, 550.0], dtype=torch.float64)
N = len(TOKENS)


def source():
    """One token's gradient: its noise is 100 times the mean's square, so micro-batches have both."""
    s = family("rows", (256, 96, 32), 16, seed=1)
    s.mean.mul_((s.trace / 100 / s.mean.square().sum()).sqrt())
    return s


def micro_batches(s, tokens: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """``[draws, n, P]``: means over ``tokens`` tokens, ``N(mean, C / tokens)``."""
    e = s.draw(DRAWS, tokens.shape[-1], generator=generator) - s.mean
    return s.mean + e / tokens.sqrt()[..., None]


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
    # The remedy that docs/statistics.md gives for known weights
    weighted = ((x.square().sum(2) / w).sum(1) - x.sum(1).square().sum(1)) / (N - 1)
    assert_mean(weighted, true, what="weighted form")


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

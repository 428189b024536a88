"""Statistics straight from the definitions, in float64, from lists of contributions."""

from __future__ import annotations

import torch
from torch import Tensor

from gac.statistics import Statistics, noise_from_weighted, pair_statistics


def noise(contributions: list[torch.Tensor]) -> float:
    """Sample covariance trace of the contributions, times their number: the unbiased noise of their sum."""
    n = len(contributions)
    if n < 2:
        return float("nan")
    x = torch.stack(contributions)
    return n * float((x - x.mean(0)).square().sum()) / (n - 1)


def statistics(sft: list[torch.Tensor], rl: list[torch.Tensor]) -> dict[str, float]:
    """The fields of gac.Statistics."""
    g_s, g_r = torch.stack(sft).sum(0), torch.stack(rl).sum(0)
    distance2 = float((g_s - g_r).square().sum())
    sigma_s2, sigma_r2 = noise(sft), noise(rl)
    return {
        "sigma_s2": sigma_s2,
        "sigma_r2": sigma_r2,
        "delta_g2": distance2 - sigma_s2 - sigma_r2,
        "distance2": distance2,
        "norm_s2": float(g_s @ g_s),
        "norm_r2": float(g_r @ g_r),
        "dot": float(g_s @ g_r),
        "n_s": float(len(sft)),
        "n_r": float(len(rl)),
        "nonfinite": 0.0,
    }


def noise_from_contributions(power: Tensor, norm2: Tensor, n: Tensor) -> Tensor:
    """Noise of a sum of ``n`` equal contributions: ``n/(n-1) * (sum_k |x_k|^2 - |G|^2 / n)``; the package's formula."""
    return noise_from_weighted(power * n, norm2, n)


def contribution_statistics(
    *,
    sigma_s2: Tensor,
    sigma_r2: Tensor,
    norm_s2: Tensor,
    norm_r2: Tensor,
    dot: Tensor,
    n_s: Tensor,
    n_r: Tensor,
    nonfinite: Tensor,
) -> Statistics:
    """:func:`pair_statistics` from separate 0-dim numbers."""
    norms = torch.stack([norm_s2, norm_r2, dot])
    noise, n = torch.stack([sigma_s2, sigma_r2]), torch.stack([n_s, n_r])
    return pair_statistics(noise=noise, norms=norms, n=n, nonfinite=nonfinite)

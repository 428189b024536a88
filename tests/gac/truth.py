"""Statistics straight from the definitions, in float64, from lists of contributions."""

from __future__ import annotations

import torch


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

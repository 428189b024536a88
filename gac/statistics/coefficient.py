"""The paper's proxies: statistics from token coefficients, for trainers that run one backward over a mixed batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gac.statistics.step import NAN, Statistics
from gac_kernels import token_moments

VARIANCE_FLOOR = 1e-8
"""The authors' floor of a population variance."""


def coefficient_statistics(
    logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    is_expert: Tensor,
    *,
    z_normalize: bool = True,
    phi: bool = True,
    trim: float = 0.1,
) -> Statistics:
    """The paper's proxies, from token coefficients of one batch (GAC, arXiv 2605.26184).

    ``sigma_r2`` is the variance over rollouts of the masked mean advantage, ``sigma_s2`` that of the mean NLL of
    demonstrations after trimming ``int(n * trim)`` of them at either tail (from 4 on), and ``delta_g2`` the mean over
    sequences of the masked mean of ``(c_s - c_r)^2`` with ``c_s = -phi(p)``, ``c_r = -A`` and ``c_r = 0`` on
    demonstrations. Variances are population variances, at least 1e-8. They live in coefficient space: only their
    ratios mean something.

    Args:
        logprobs: ``[B, T]`` log-probabilities of the taken tokens under the policy.
        advantages: ``[B, T]`` or ``[B]``; rows of demonstrations are ignored.
        mask: ``[B, T]``, non-zero where a token counts.
        is_expert: ``[B]``, True for demonstrations.
        z_normalize: z-normalise both coefficients over the tokens of the batch's rollouts before comparing them, and
            compare on rollouts alone, as the paper's text says. False: as the authors' code does.
        phi: weight ``phi(p) = p(1-p)``; False: ``c_s = -1``.
        trim: share of demonstrations cut at either tail.

    Returns:
        Statistics with ``sigma_s2``, ``sigma_r2``, ``delta_g2``, ``n_s`` and ``n_r``; NaN for a branch that the batch
        lacks (``delta_g2`` needs at least one sequence to compare).

    Raises:
        TypeError, ValueError: wrong shapes or dtypes; ``trim`` outside [0, 0.5).
    """
    options = CoefficientOptions(z_normalize, phi, trim)
    return statistics_from_rows(sequence_rows(logprobs, advantages, mask, is_expert), options)


@dataclass(frozen=True)
class CoefficientOptions:
    """Which form of the proxies; see :func:`coefficient_statistics`. Raises ValueError where ``trim`` is wrong."""

    z_normalize: bool = True
    phi: bool = True
    trim: float = 0.1

    def __post_init__(self) -> None:
        if not 0.0 <= self.trim < 0.5:
            raise ValueError(f"trim must be in [0, 0.5), got {self.trim}")


def sequence_rows(logprobs: Tensor, advantages: Tensor, mask: Tensor, is_expert: Tensor) -> Tensor:
    """``[B, 8]``: what the proxies need of each sequence, 1 in the last column for demonstrations.

    Rows of several micro-batches and ranks may be put together in any order.
    """
    sums = token_moments(logprobs, advantages, mask, is_expert)
    return torch.cat([sums, is_expert[:, None].to(sums.dtype)], dim=1)


def statistics_from_rows(rows: Tensor, options: CoefficientOptions) -> Statistics:
    """The proxies from the rows of :func:`sequence_rows`."""
    sums, is_expert = rows[:, :-1], rows[:, -1] > 0
    count, logp, a, aa, f, ff, fa = sums.unbind(1)
    if not options.phi:
        f, ff, fa = count, count, a
    expert = is_expert & (count > 0)
    rollout = ~is_expert & (count > 0)
    safe = count.clamp(min=1.0)
    n_s, n_r = expert.sum().to(sums.dtype), rollout.sum().to(sums.dtype)
    compared = expert | rollout
    if options.z_normalize:
        compared = rollout
        total = torch.where(rollout, count, 0.0).sum()
        mean_f, scale_f = _mean_and_scale(f, ff, rollout, total)
        mean_a, scale_a = _mean_and_scale(a, aa, rollout, total)
        # sum over a row of ((f - mean_f)/scale_f - (a - mean_a)/scale_a)^2, expanded
        zz_f = (ff - 2 * mean_f * f + count * mean_f**2) / scale_f**2
        zz_a = (aa - 2 * mean_a * a + count * mean_a**2) / scale_a**2
        z_fa = (fa - mean_f * a - mean_a * f + count * mean_f * mean_a) / (scale_f * scale_a)
        difference = zz_f - 2 * z_fa + zz_a
    else:
        difference = ff - 2 * fa + aa
    n_compared = compared.sum().to(sums.dtype)
    delta = torch.where(compared, difference.clamp(min=0.0) / safe, 0.0).sum() / n_compared
    return Statistics(
        sigma_s2=_trimmed_variance(-logp / safe, expert, options.trim),
        sigma_r2=_trimmed_variance(a / safe, rollout, 0.0),
        delta_g2=delta,
        n_s=n_s,
        n_r=n_r,
        nonfinite=(~torch.isfinite(torch.where(count > 0, logp + aa, 0.0))).sum(),
    )


def _mean_and_scale(total: Tensor, squares: Tensor, rows: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and population standard deviation over all tokens of the chosen rows; a constant has scale 1."""
    mean = torch.where(rows, total, 0.0).sum() / count
    variance = torch.where(rows, squares, 0.0).sum() / count - mean**2
    return mean, torch.where(variance > VARIANCE_FLOOR, variance.clamp(min=VARIANCE_FLOOR).sqrt(), 1.0)


def _trimmed_variance(values: Tensor, rows: Tensor, trim: float) -> Tensor:
    """Population variance of ``values[rows]`` without the tails, floored; without reading ``rows`` on the host."""
    n = rows.sum()
    cut = torch.where(n >= 4, (n.to(values.dtype) * trim).floor().to(n.dtype), 0)
    ordered = torch.where(rows, values, float("inf")).sort().values  # the chosen rows first, ascending
    rank = torch.arange(values.numel(), device=values.device)
    kept = (rank >= cut) & (rank < n - cut)
    size = (n - 2 * cut).to(values.dtype)
    kept_values = torch.where(kept, ordered, 0.0)
    mean = kept_values.sum() / size
    variance = torch.where(kept, (ordered - mean) ** 2, 0.0).sum() / size
    return torch.where(n >= 1, variance.clamp(min=VARIANCE_FLOOR), NAN)

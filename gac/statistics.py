"""What is measured in a step, and the formulas that turn sums into estimates.

Everything is a 0-dim tensor and stays on its device. NaN means "not measured in this step" (a branch without
contributions, say); laws keep what they knew of such a number.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from gac_kernels import token_moments
from gac_kernels.arguments import accumulator_dtype

NAN = float("nan")


@dataclass
class Statistics:
    """Gradient statistics of one optimizer step, each a 0-dim tensor (numbers are converted to float64).

    Squared quantities are in units of the squared gradient norm. Read a value on the host only outside the training
    path: ``float(statistics.mu)`` waits for the device.

    Attributes:
        sigma_s2, sigma_r2: noise ``E|G_b - g_b|^2`` of the SFT and RL gradients of the step, unbiased.
        delta_g2: squared disagreement ``|g_s - g_r|^2`` of the true gradients, unbiased: may be negative.
        distance2: ``|G_s - G_r|^2`` as observed; its mean is ``delta_g2 + sigma_s2 + sigma_r2``.
        norm_s2, norm_r2, dot: ``|G_s|^2``, ``|G_r|^2``, ``<G_s, G_r>`` as observed.
        n_s, n_r: contributions (or sequences, for the coefficient estimator) of each branch.
        nonfinite: NaN and infinite gradient elements; above 0 no law uses the step.
    """

    sigma_s2: Tensor | float = NAN
    sigma_r2: Tensor | float = NAN
    delta_g2: Tensor | float = NAN
    distance2: Tensor | float = NAN
    norm_s2: Tensor | float = NAN
    norm_r2: Tensor | float = NAN
    dot: Tensor | float = NAN
    n_s: Tensor | float = 0.0
    n_r: Tensor | float = 0.0
    nonfinite: Tensor | float = 0.0

    def __post_init__(self) -> None:
        device = next((v.device for v in vars(self).values() if isinstance(v, Tensor)), torch.device("cpu"))
        dtype = accumulator_dtype(device)
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                if value.numel() != 1:
                    raise ValueError(f"{field.name} must hold one number, got shape {tuple(value.shape)}")
                value = value.detach().reshape(()).to(dtype)
            else:
                value = torch.full((), float(value), dtype=dtype, device=device)  # no copy from the host
            setattr(self, field.name, value)

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """The fields, in the order of :meth:`stacked`."""
        return tuple(f.name for f in fields(cls))

    @property
    def device(self) -> torch.device:
        return self.sigma_s2.device

    @property
    def cosine(self) -> Tensor:
        """``<G_s, G_r> / (|G_s| |G_r|)`` as observed; NaN without both branches."""
        return self.dot / (self.norm_s2.sqrt() * self.norm_r2.sqrt())

    def stacked(self) -> Tensor:
        """All fields as one vector, for a single copy to the host."""
        return torch.stack([getattr(self, name) for name in self.names()])


def noise_from_contributions(power: Tensor, norm2: Tensor, n: Tensor) -> Tensor:
    """Noise of a sum of ``n`` independent contributions: ``n/(n-1) * (sum_k |x_k|^2 - |G|^2 / n)``.

    Unbiased for ``E|G - E G|^2`` when the contributions are independent and equally distributed (equal weights:
    every micro-batch counts alike, whatever constant the user divided the loss by).

    Args:
        power: ``sum_k |x_k|^2``. norm2: ``|sum_k x_k|^2``. n: number of contributions; below 2 the result is NaN.
    """
    spread = (power - norm2 / n).clamp(min=0.0)  # Cauchy-Schwarz: negative only by rounding
    return torch.where(n >= 2, spread * n / (n - 1), NAN)


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
    """Completes the observed numbers: ``distance2``, and ``delta_g2 = distance2 - sigma_s2 - sigma_r2`` (unbiased)."""
    has_s, has_r = n_s >= 1, n_r >= 1
    distance2 = torch.where(has_s & has_r, (norm_s2 + norm_r2 - 2 * dot).clamp(min=0.0), NAN)
    return Statistics(
        sigma_s2=sigma_s2,
        sigma_r2=sigma_r2,
        delta_g2=distance2 - sigma_s2 - sigma_r2,
        distance2=distance2,
        norm_s2=torch.where(has_s, norm_s2, NAN),
        norm_r2=torch.where(has_r, norm_r2, NAN),
        dot=torch.where(has_s & has_r, dot, NAN),
        n_s=n_s,
        n_r=n_r,
        nonfinite=nonfinite,
    )


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
    if not 0.0 <= trim < 0.5:
        raise ValueError(f"trim must be in [0, 0.5), got {trim}")
    sums = token_moments(logprobs, advantages, mask, is_expert)
    count, logp, a, aa, f, ff, fa = sums.unbind(1)
    if not phi:
        f, ff, fa = count, count, a
    expert = is_expert.bool() & (count > 0)
    rollout = ~is_expert.bool() & (count > 0)
    safe = count.clamp(min=1.0)
    n_s, n_r = expert.sum().to(sums.dtype), rollout.sum().to(sums.dtype)
    compared = expert | rollout
    if z_normalize:
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
        sigma_s2=_trimmed_variance(-logp / safe, expert, trim),
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
    cut = torch.where(n >= 4, (n * trim).floor().to(n.dtype), 0)
    ordered = torch.where(rows, values, float("inf")).sort().values  # the chosen rows first, ascending
    rank = torch.arange(values.numel(), device=values.device)
    kept = (rank >= cut) & (rank < n - cut)
    size = (n - 2 * cut).to(values.dtype)
    kept_values = torch.where(kept, ordered, 0.0)
    mean = kept_values.sum() / size
    variance = torch.where(kept, (ordered - mean) ** 2, 0.0).sum() / size
    return torch.where(n >= 1, variance.clamp(min=VARIANCE_FLOOR), NAN)

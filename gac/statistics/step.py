"""What is measured in a step, and the formulas that turn sums into estimates.

Everything is a 0-dim tensor and stays on its device. NaN means "not measured in this step" (a branch without
contributions, say); laws keep what they knew of such a number.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from gac.statistics.sums import StepSums
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
        sigma_s2_se, sigma_r2_se, distance2_se, delta_g2_se: standard errors of the estimates of the same name, in the
            same units; NaN where unknown (:mod:`gac.statistics.uncertainty`).
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
    sigma_s2_se: Tensor | float = NAN
    sigma_r2_se: Tensor | float = NAN
    distance2_se: Tensor | float = NAN
    delta_g2_se: Tensor | float = NAN

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
    def of(cls, numbers: Mapping[str, float]) -> Statistics:
        """From all fields as numbers by name; 0-dim float64 tensors on the CPU."""
        found = object.__new__(cls)
        names = cls.names()
        vector = torch.tensor([numbers[name] for name in names], dtype=torch.float64)
        vars(found).update(zip(names, vector.unbind(), strict=True))
        return found

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


def noise_from_weighted(weighted_power: Tensor, norm2: Tensor, n: Tensor) -> Tensor:
    """Noise of a sum of ``n`` independent contributions of known weights: ``(sum_k |x_k|^2/w_k - |G|^2) / (n-1)``.

    Contribution ``k`` has the mean ``w_k g`` and the covariance ``w_k Sigma``, ``sum w_k = 1``: what a loss gives that
    is summed over a micro-batch's ``t_k`` tokens and divided by all tokens of the step, ``w_k = t_k / sum t``. Then
    ``E sum |x_k|^2/w_k = |g|^2 + n tr Sigma`` and ``E|G|^2 = |g|^2 + tr Sigma``, so the estimate of ``tr Sigma`` has
    no bias. With equal weights ``1/n`` it is ``n/(n-1) * (sum_k |x_k|^2 - |G|^2 / n)``, whatever constant the user
    divided the loss by.

    Args:
        weighted_power: ``sum_k |x_k|^2 / w_k``. norm2: ``|G|^2``. n: contributions of positive weight; below 2 the
            result is NaN.
    """
    spread = (weighted_power - norm2).clamp(min=0.0)  # Cauchy-Schwarz: negative only by rounding
    return torch.where(n >= 2, spread / (n - 1), NAN)


def pair_statistics(*, noise: Tensor, norms: Tensor, n: Tensor, nonfinite: Tensor) -> Statistics:
    """Completes the observed numbers: ``distance2``, and ``delta_g2 = distance2 - sigma_s2 - sigma_r2`` (unbiased).

    Args:
        noise: ``[2]``, ``sigma_s2`` and ``sigma_r2``. norms: ``[3]``, ``|G_s|^2``, ``|G_r|^2``, ``<G_s, G_r>``.
        n: ``[2]``, contributions of each branch. nonfinite: 0-dim.
    """
    has = n >= 1
    norms = torch.where(torch.cat([has, has.all()[None]]), norms, NAN)
    norm_s2, norm_r2, dot = norms.unbind()
    distance2 = (norm_s2 + norm_r2 - 2 * dot).clamp(min=0.0)
    sigma_s2, sigma_r2 = noise.unbind()
    n_s, n_r = n.unbind()
    return Statistics(
        sigma_s2=sigma_s2,
        sigma_r2=sigma_r2,
        delta_g2=distance2 - noise.sum(),
        distance2=distance2,
        norm_s2=norm_s2,
        norm_r2=norm_r2,
        dot=dot,
        n_s=n_s,
        n_r=n_r,
        nonfinite=nonfinite,
    )


def noise_from_sums(sums: StepSums, n: Tensor) -> Tensor:
    """``[2]``: ``sigma_s2`` and ``sigma_r2`` from the spread of contributions, ``n`` (``[2]``) of which count."""
    return noise_from_weighted(sums.power * sums.tokens, sums.norms[:2], n)


def statistics_from_sums(sums: StepSums) -> Statistics:
    """Statistics of a step all of whose contributions had a weight above 0."""
    return pair_statistics(noise=noise_from_sums(sums, sums.n), norms=sums.norms, n=sums.n, nonfinite=sums.nonfinite)

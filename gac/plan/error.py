"""How sure mu will be, by the delta method; docs/scaling.md derives it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from gac.laws.base import noise_left
from gac.laws.gac import LONG


@dataclass(frozen=True)
class Noise:
    """What is assumed of the gradients; docs/scaling.md has the measurements behind the defaults.

    Attributes:
        rank: directions that carry a contribution's noise, ``(tr C)^2 / tr(C^2)``.
        excess: variance of a contribution's squared noise, relative, beyond the Gaussian ``2/rank``: heavy tails.
        disagreement: ``delta_g2 / (sigma_s2 + sigma_r2)`` for one micro-batch of one rank in each branch.
        ratio: ``sigma_s2 / sigma_r2``.
    """

    rank: float = 30.0
    excess: float = 1.0
    disagreement: float = 0.2
    ratio: float = 1.0

    def __post_init__(self) -> None:
        for name, least in (("rank", 1.0), ("excess", 0.0), ("disagreement", 0.0)):
            if not getattr(self, name) >= least:
                raise ValueError(f"{name} must be at least {least:g}, got {getattr(self, name)}")
        if not 0 < self.ratio < math.inf:
            raise ValueError(f"ratio must be positive, got {self.ratio}")


@dataclass(frozen=True)
class MuError:
    """mu, and the parts of its standard error.

    Attributes:
        mu: the best mu for the assumed gradients.
        one_step: standard error of the closed form of a single measured step.
        smoothed: what is left of it after the law's averaging.
        sketch: the sketch's own error, which averaging does not touch.
    """

    mu: float
    one_step: float
    smoothed: float
    sketch: float

    @property
    def total(self) -> float:
        """Standard error of the law's estimate."""
        return math.hypot(self.smoothed, self.sketch)


def mu_error(
    noise: Noise,
    n: int,
    *,
    averaged: float = 1,
    size: float | None,
    alpha: float = 0.5,
    half_life: float | None = None,
    interval: int = 1,
    momentum: float = 0.0,
) -> MuError:
    """Standard error of mu from ``n`` contributions of each branch, by the delta method.

    ``mu = (alpha delta_g2 + k sigma_r2) / (delta_g2 + k (sigma_s2 + sigma_r2))`` with ``k = (1-momentum)/(1+momentum)``
    and ``delta_g2 = distance2 - sigma_s2 - sigma_r2``. Gaussian noise of rank ``r`` gives
    ``Var sigma2 = 2 sigma2^2 / ((n-1) r)`` and ``Var distance2 = 2 Q (Q + 2 delta_g2) / r`` with
    ``Q = sigma_s2 + sigma_r2`` (both branches' noise and their disagreement in the same directions, the worst case);
    heavy tails move ``sigma2`` and ``distance2`` together, with the variance ``excess / n`` of ``sigma2^2``.

    Args:
        n: contributions of a branch and step; 1 stands for the comparison with earlier steps, counted as two.
        averaged: micro-batches that each of them is the mean of (FSDP: the ranks; a sequence: its share of one).
        size: buckets of the sketch over all ranks; None: exact.
        half_life: of the law's average, in steps; default: the long one's, which is in charge while statistics stand.
        interval: steps between measurements.
        momentum: of the optimizer, as the law counts it.
    """
    half_life = LONG if half_life is None else half_life
    sigma_s, sigma_r = (x / (1 + noise.ratio) / (n * averaged) for x in (noise.ratio, 1.0))
    both, delta = sigma_s + sigma_r, noise.disagreement
    left = noise_left(momentum)
    divisor = delta + left * both
    mu = (alpha * delta + left * sigma_r) / divisor
    freedom = max(n - 1, 1) * noise.rank
    sigmas = ((left - alpha + (1 - left) * mu) * sigma_r) ** 2 + ((alpha - (1 - left) * mu) * sigma_s) ** 2
    gaussian = sigmas * 2 / freedom + (mu - alpha) ** 2 * 2 * both * (both + 2 * delta) / noise.rank
    tails = noise.excess / (n * averaged) * left**2 * (((1 - mu) * sigma_r) ** 2 + (mu * sigma_s) ** 2)
    one_step = math.sqrt(gaussian + tails) / divisor
    keep = 2.0 ** (-interval / half_life)
    sketch = 0.0
    if size is not None:
        sketch = math.sqrt(2 / size * (sigmas + ((mu - alpha) * (delta + both)) ** 2)) / divisor
    return MuError(mu, one_step, one_step * math.sqrt((1 - keep) / (1 + keep)), sketch)

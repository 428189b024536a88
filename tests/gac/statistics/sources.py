"""Synthetic gradients with known mean and covariance, and what theory says of the estimators on them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gac.observe.ledger import Ledger
from gac.statistics import Branch, Statistics
from tests.gac.truth import contribution_statistics, noise_from_contributions

DRAWS = 2000
ESTIMATES = ("sigma_s2", "sigma_r2", "delta_g2", "distance2")
FAMILIES = ("isotropic", "rows", "layer", "direction")


@dataclass(frozen=True)
class Source:
    """A micro-batch's gradient ``y ~ N(mean, diag(scale^2) + direction direction^T)``, each ``[P]``.

    A step of ``n`` micro-batches has the contributions ``y_k / n``, so that the branch's gradient has the expectation
    ``mean`` and the noise ``trace / n``.
    """

    mean: Tensor
    scale: Tensor
    direction: Tensor

    def draw(self, *shape: int, generator: torch.Generator) -> Tensor:
        """``[*shape, P]`` independent micro-batch gradients, in the dtype of ``mean``."""
        options = {"generator": generator, "dtype": self.mean.dtype}
        y = torch.randn(*shape, self.mean.numel(), **options).mul_(self.scale).add_(self.mean)
        if self.direction.any():
            y.addcmul_(torch.randn(*shape, 1, **options), self.direction)
        return y

    def to(self, dtype: torch.dtype) -> Source:
        return Source(self.mean.to(dtype), self.scale.to(dtype), self.direction.to(dtype))

    @property
    def trace(self) -> float:
        """Trace of the covariance C."""
        return float(self.scale.square().sum() + self.direction.square().sum())

    def product_trace(self, other: Source) -> float:
        """Trace of ``C C'``."""
        return float(
            (self.scale * other.scale).square().sum()
            + (self.scale * other.direction).square().sum()
            + (other.scale * self.direction).square().sum()
            + (self.direction @ other.direction) ** 2
        )

    def variance_along(self, v: Tensor) -> float:
        """``v^T C v``."""
        return float((self.scale * v).square().sum() + (self.direction @ v) ** 2)


def family(name: str, numels: Sequence[int], row: int, seed: int) -> Source:
    """A source over tensors of the given sizes, in float64.

    ``isotropic``: every element alike. ``rows``: rows of ``row`` elements with log-normal scales exp(2z). ``layer``:
    the second tensor is 30 times as loud as the others. ``direction``: a random direction common to all elements
    carries half of the noise. Means follow the scales and are about as large as the noise of four micro-batches.
    """
    generator = torch.Generator().manual_seed(seed)
    size = sum(numels)

    def normal(n: int) -> Tensor:
        return torch.randn(n, generator=generator, dtype=torch.float64)

    scale = torch.ones(size, dtype=torch.float64)
    direction = torch.zeros(size, dtype=torch.float64)
    if name == "rows":
        scale = torch.cat([torch.exp(2 * normal(-(-n // row))).repeat_interleave(row)[:n] for n in numels])
    elif name == "layer":
        scale[numels[0] : numels[0] + numels[1]] = 30.0
    elif name == "direction":
        direction = normal(size)
    elif name != "isotropic":
        raise ValueError(f"unknown family {name!r}")
    # the first half of the mean is the same for every seed: branches agree in part
    shared = torch.randn(size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mean = 0.5 * scale * torch.where(torch.arange(size) < size // 2, shared, normal(size))
    return Source(mean, scale, direction)


def truth(s: Source, n_s: int, r: Source, n_r: int) -> dict[str, float]:
    """What the unbiased estimators must average to, for ``n_s`` and ``n_r`` micro-batches."""
    sigma_s2, sigma_r2 = s.trace / n_s, r.trace / n_r
    delta_g2 = float((s.mean - r.mean).square().sum())
    return {
        "sigma_s2": sigma_s2,
        "sigma_r2": sigma_r2,
        "delta_g2": delta_g2,
        "distance2": delta_g2 + sigma_s2 + sigma_r2,
    }


def variance(s: Source, n_s: int, r: Source, n_r: int) -> dict[str, float]:
    """Variances of the estimators on Gaussian contributions.

    ``sigma2`` is a sample variance: ``2 tr(C^2) / (n^2 (n-1))`` with C the covariance of a micro-batch. ``distance2``
    is the square of a Gaussian vector of mean ``d`` and covariance ``Q = C_s/n_s + C_r/n_r``: its variance is
    ``2 tr(Q^2) + 4 d^T Q d``. Sample variances are independent of sample means, so the variance of ``delta_g2`` is the
    sum of the three.
    """
    sigma_s2 = 2 * s.product_trace(s) / (n_s**2 * (n_s - 1))
    sigma_r2 = 2 * r.product_trace(r) / (n_r**2 * (n_r - 1))
    q2 = s.product_trace(s) / n_s**2 + r.product_trace(r) / n_r**2 + 2 * s.product_trace(r) / (n_s * n_r)
    d = s.mean - r.mean
    distance2 = 2 * q2 + 4 * (s.variance_along(d) / n_s + r.variance_along(d) / n_r)
    return {
        "sigma_s2": sigma_s2,
        "sigma_r2": sigma_r2,
        "delta_g2": distance2 + sigma_s2 + sigma_r2,
        "distance2": distance2,
    }


def noise(x: Tensor) -> Tensor:
    """``[...]``: the package's estimate for contributions ``[..., n, P]``."""
    power, norm2 = x.square().sum((-1, -2)), x.sum(-2).square().sum(-1)
    return noise_from_contributions(power, norm2, torch.full_like(power, x.shape[-2]))


def error_of_mean(values: Tensor) -> float:
    """Standard error of the mean of independent draws."""
    return float(values.std()) / math.sqrt(values.numel())


def error_of_variance(values: Tensor) -> float:
    """Standard error of the sample variance of ``n`` independent draws: ``sqrt((m4 - var^2) / n)``."""
    centred = (values - values.mean()).square()
    return math.sqrt(float((centred.square().mean() - centred.mean() ** 2).clamp(min=0.0)) / values.numel())


def assert_mean(values: Tensor, expected: float, *, error: float | None = None, what: str = "") -> float:
    """The mean is within 4 standard errors (theory's, where ``error`` is given); prints and returns the distance."""
    error = error_of_mean(values) if error is None else error
    away = (float(values.mean()) - expected) / error
    print(f"{what}: mean {float(values.mean()):.6g}, truth {expected:.6g}, {away:+.2f} standard errors")
    assert abs(away) < 4, what
    return away


def feed(ledger: Ledger, x_s: Tensor, x_r: Tensor, *, weights: tuple[float, float] = (0.5, 0.5)) -> Statistics:
    """One optimizer step through the ledger, as the observer and the mixer drive it, from contributions ``[n, P]``.

    What reaches the ledger is the weighted gradient (or the running sum of all of them), branch after branch, the
    tensors last to first in two buckets.
    """
    numels = ledger.layout.numels
    running = [torch.zeros(n) for n in numels]
    order = list(range(len(numels)))[::-1]
    buckets = [order[:1], order[1:]] if len(order) > 1 else [order]
    counts = {}
    for branch, contributions, weight in zip(Branch, (x_s, x_r), weights, strict=True):
        scale = torch.tensor(1.0 / weight)
        for x in contributions.float():
            parts = [weight * part for part in x.split(numels)]
            ledger.begin()
            for bucket in buckets:
                if ledger.running:
                    for k in bucket:
                        running[k] += parts[k]
                tensors = [(running if ledger.running else parts)[k] for k in bucket]
                ledger.read(branch, bucket, tensors, scale)
            ledger.end(branch, scale)
        counts[branch] = torch.tensor(float(len(contributions)), dtype=torch.float64)
    powers, nonfinite = ledger.powers(), ledger.nonfinite()
    power_s, power_r = powers[: len(x_s)].sum(), powers[len(x_s) :].sum()
    norm_s2, norm_r2, dot = ledger.inner(ledger.both_totals).unbind()
    n_s, n_r = counts[Branch.SFT], counts[Branch.RL]
    ledger.clear()
    return contribution_statistics(
        sigma_s2=noise_from_contributions(power_s, norm_s2, n_s),
        sigma_r2=noise_from_contributions(power_r, norm_r2, n_r),
        norm_s2=norm_s2,
        norm_r2=norm_r2,
        dot=dot,
        n_s=n_s,
        n_r=n_r,
        nonfinite=nonfinite,
    )


KINDS = {
    "exact": {"lossless": True, "running": False},
    "sketch, every element its own bucket": {"lossless": True, "running": True},
    "sketch, running sums": {"lossless": False, "running": True},
    "sketch, incoming gradients": {"lossless": False, "running": False},
}
"""The ledger's ways, as options of :class:`gac.observe.ledger.Ledger`."""

"""The true noise and disagreement of a step's gradients, from independent steps drawn at the same parameters.

With the gradients ``G_1 .. G_J`` of ``J`` independent steps of one branch,

    sigma2   = sum_j |G_j - mean G|^2 / (J - 1)              unbiased for E|G - g|^2
    delta_g2 = sum_{i != j} <d_i, d_j> / (J (J - 1))         unbiased for |g_s - g_r|^2,  d_j = G_s,j - G_r,j

whatever happens inside a step: unequal or dependent contributions, sampling without replacement, any normalisation of
the loss. The estimators under audit assume independent contributions; nothing of that is assumed here. Both are
functions of the inner products alone, so that leaving a step out costs nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

COLUMNS = ("sigma_s2", "sigma_r2", "delta_g2")
"""The order of the three numbers wherever they stand in one tensor."""

FEWEST = 3
"""Steps that a truth needs: leaving one out must leave two."""

_CHUNK = 2**20


@dataclass(frozen=True)
class Truth:
    """The three numbers at some parameters.

    Attributes:
        values: ``[3]`` float64, in the order of `COLUMNS`; ``delta_g2`` may come out negative.
        deleted: ``[J, 3]`` float64, the same without step j: what a jackknife needs.
    """

    values: Tensor
    deleted: Tensor

    @property
    def covariance(self) -> Tensor:
        """``[3, 3]``: jackknife estimate of the covariance of `values`."""
        j = len(self.deleted)
        centred = self.deleted - self.deleted.mean(0)
        return (j - 1) / j * centred.T @ centred


def gram(vectors: Sequence[Tensor]) -> Tensor:
    """``[n, n]`` float64: inner products of ``n`` vectors ``[P]``, summed in float64."""
    result = torch.zeros(len(vectors), len(vectors), dtype=torch.float64)
    size = vectors[0].numel()
    for begin in range(0, size, _CHUNK):
        part = torch.stack([vector[begin : begin + _CHUNK].to(torch.float64) for vector in vectors])
        result += (part @ part.T).cpu()
    return result


def truth(sft: Sequence[Tensor], rl: Sequence[Tensor]) -> Truth:
    """The three numbers from each step's gradients.

    Args:
        sft, rl: the gradients of both branches, ``[P]`` for each of at least 3 steps, without the branches' weights.

    Raises:
        ValueError: too few steps, or not as many of one branch as of the other.
    """
    steps = len(sft)
    if steps != len(rl):
        raise ValueError(f"truth: {steps} SFT gradients but {len(rl)} RL gradients; each step gives one of both")
    if steps < FEWEST:
        raise ValueError(f"truth: {steps} steps are too few, a spread and its error need at least {FEWEST}")
    products = gram([*sft, *rl])
    ss, rr, sr = products[:steps, :steps], products[steps:, steps:], products[:steps, steps:]
    dd = ss + rr - sr - sr.T
    columns = [_noise(ss), _noise(rr), _squared_mean(dd)]
    return Truth(torch.stack([whole for whole, _ in columns]), torch.stack([rest for _, rest in columns], 1))


def _noise(products: Tensor) -> tuple[Tensor, Tensor]:
    n, trace, total, traces, totals = _sums(products)
    return (trace - total / n) / (n - 1), (traces - totals / (n - 1)) / (n - 2)


def _squared_mean(products: Tensor) -> tuple[Tensor, Tensor]:
    n, trace, total, traces, totals = _sums(products)
    return (total - trace) / (n * (n - 1)), (totals - traces) / ((n - 1) * (n - 2))


def _sums(products: Tensor) -> tuple[int, Tensor, Tensor, Tensor, Tensor]:
    """``n``, trace and sum of ``[n, n]``, and both without each row and its column, ``[n]``."""
    diagonal, rows = products.diagonal(), products.sum(1)
    trace, total = diagonal.sum(), rows.sum()
    return len(products), trace, total, trace - diagonal, total - 2 * rows + diagonal


def mean_squared_error(mu: Tensor | float, values: Tensor, alpha: float) -> Tensor:
    """``(mu-alpha)^2*delta_g2 + mu^2*sigma_s2 + (1-mu)^2*sigma_r2``: of the mixed gradient about its target.

    ``E|mu G_s + (1-mu) G_r - (alpha g_s + (1-alpha) g_r)|^2`` for branches drawn independently. Linear in ``values``,
    hence unbiased where these are and ``mu`` does not depend on them.

    Args:
        mu: broadcasts against the leading dimensions of ``values``.
        values: ``[..., 3]``, in the order of `COLUMNS`.
        alpha: weight of the SFT gradient in the target.
    """
    sigma_s2, sigma_r2, delta_g2 = values.unbind(-1)
    return (mu - alpha) ** 2 * delta_g2 + mu**2 * sigma_s2 + (1 - mu) ** 2 * sigma_r2


def oracle(values: Tensor, alpha: float) -> Tensor:
    """The mu of least mean squared error, ``[...]``: closed form of ``values`` with ``delta_g2`` clamped at 0."""
    sigma_s2, sigma_r2, delta_g2 = values.clamp(min=0.0).unbind(-1)
    return (alpha * delta_g2 + sigma_r2) / (delta_g2 + sigma_s2 + sigma_r2)

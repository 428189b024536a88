"""The true noise and disagreement of a step's gradients, from independent steps drawn at the same parameters.

What a law mixes are the gradients of the steps that training takes, and what they are meant to follow is the gradient
of the objective: of all demonstrations, and of the policy's expected reward. The two differ in more than noise where
demonstrations are seen again and again: those that the next step brings were not seen for longest, have a larger loss
than the rest, and are no sample of the whole. So three kinds of gradients are drawn, ``J`` of each: ``S_j`` and ``R_j``
of steps as training takes them, and ``F_j`` of demonstrations in a fresh order, with the objective's mean ``g_s``.

    sigma_s2 = mean |S|^2 - 2 <mean S, mean F> + |g_s|^2      E|S - g_s|^2
    sigma_r2 = sum_j |R_j - mean R|^2 / (J - 1)               E|R - g_r|^2
    delta_g2 = |g_s|^2 - 2 <mean F, mean R> + |g_r|^2         |g_s - g_r|^2
    cross    = <mean S - g_s, g_s - g_r>                      of the step's own expectation; 0 for fresh demonstrations

with the unbiased ``|g|^2 = sum_{i != j} <x_i, x_j> / (J (J - 1))``. All four are unbiased whatever happens inside a
step: unequal or dependent contributions, sampling without replacement, any normalisation of the loss. The estimators
under audit assume independent contributions; nothing of that is assumed here. All are functions of the inner products
alone, so that leaving a step out costs nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

COLUMNS = ("sigma_s2", "sigma_r2", "delta_g2")
"""What estimators estimate; the order of the three numbers wherever they stand in one tensor."""

TRUE_COLUMNS = (*COLUMNS, "cross")
"""What the truth knows."""

FEWEST = 3
"""Steps that a truth needs: leaving one out must leave two."""

_CHUNK = 2**20


@dataclass(frozen=True)
class Truth:
    """The four numbers at some parameters.

    Attributes:
        values: ``[4]`` float64, in the order of `TRUE_COLUMNS`; ``delta_g2`` may come out negative.
        deleted: ``[J, 4]`` float64, the same without step j: what a jackknife needs.
    """

    values: Tensor
    deleted: Tensor

    @property
    def covariance(self) -> Tensor:
        """``[4, 4]``: jackknife estimate of the covariance of `values`."""
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


def truth(sft: Sequence[Tensor], rl: Sequence[Tensor], fresh: Sequence[Tensor]) -> Truth:
    """The four numbers from gradients ``[P]`` without the branches' weights, at least 3 of each kind.

    Args:
        sft, rl: of both branches, from steps as training takes them.
        fresh: of the supervised branch, from demonstrations in a fresh order.

    Raises:
        ValueError: too few, or not as many of one kind as of another.
    """
    n = len(sft)
    if not n == len(rl) == len(fresh):
        raise ValueError(
            f"truth: {n} SFT, {len(rl)} RL and {len(fresh)} fresh SFT gradients; each step gives one of all"
        )
    if n < FEWEST:
        raise ValueError(f"truth: {n} steps are too few, a spread and its error need at least {FEWEST}")
    products = gram([*sft, *rl, *fresh])
    block = lambda i, k: products[i * n : (i + 1) * n, k * n : (k + 1) * n]
    ss, rr, ff = (block(i, i) for i in range(3))
    sr, sf, rf = block(0, 1), block(0, 2), block(1, 2)
    norm_s2, norm_r2 = _squared_mean(ff), _squared_mean(rr)
    between_sf, between_sr, between_rf = (_mean(x) for x in (sf, sr, rf))
    columns = [
        _mean_diagonal(ss) - 2 * between_sf + norm_s2,
        _mean_diagonal(rr) - norm_r2,
        norm_s2 - 2 * between_rf + norm_r2,
        between_sf - between_sr - norm_s2 + between_rf,
    ]
    table = torch.stack(columns, 1)
    return Truth(table[0], table[1:])


# Each of these is a vector [1 + n]: of all replicates, then without each of them.


def _mean_diagonal(products: Tensor) -> Tensor:
    n, diagonal = len(products), products.diagonal()
    total = diagonal.sum()
    return torch.cat([total[None] / n, (total - diagonal) / (n - 1)])


def _mean(products: Tensor) -> Tensor:
    """Of the products of two independent kinds."""
    n, total = len(products), products.sum()
    without = total - products.sum(0) - products.sum(1) + products.diagonal()
    return torch.cat([total[None] / n**2, without / (n - 1) ** 2])


def _squared_mean(products: Tensor) -> Tensor:
    """Unbiased: no gradient meets itself."""
    n, diagonal = len(products), products.diagonal()
    total = products.sum() - diagonal.sum()
    without = total - 2 * (products.sum(1) - diagonal)
    return torch.cat([total[None] / (n * (n - 1)), without / ((n - 1) * (n - 2))])


def mean_squared_error(mu: Tensor | float, values: Tensor, alpha: float) -> Tensor:
    """Of the mixed gradient of a step of training about its target, ``alpha*g_s + (1-alpha)*g_r``:

        (mu-alpha)^2*delta_g2 + mu^2*sigma_s2 + (1-mu)^2*sigma_r2 + 2*mu*(mu-alpha)*cross

    Linear in ``values``, hence unbiased where these are and ``mu`` does not depend on them.

    Args:
        mu: broadcasts against the leading dimensions of ``values``.
        values: ``[..., 4]``, in the order of `TRUE_COLUMNS`.
        alpha: weight of the SFT gradient in the target.
    """
    sigma_s2, sigma_r2, delta_g2, cross = values.unbind(-1)
    return (mu - alpha) ** 2 * delta_g2 + mu**2 * sigma_s2 + (1 - mu) ** 2 * sigma_r2 + 2 * mu * (mu - alpha) * cross


def oracle(values: Tensor, alpha: float) -> Tensor:
    """The mu in [0, 1] of least :func:`mean_squared_error`, ``[...]``; without ``cross`` the laws' closed form."""
    sigma_s2, sigma_r2, delta_g2, cross = values.unbind(-1)
    least = (alpha * (delta_g2 + cross) + sigma_r2) / (delta_g2 + sigma_s2 + sigma_r2 + 2 * cross)
    return least.clamp(0.0, 1.0)

"""Standard errors of anything that is computed from truths at several points of a training run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Jackknifed:
    """A figure, its standard error, and the figure less its bias of order 1/J; each ``[...]`` float64."""

    value: Tensor
    se: Tensor
    corrected: Tensor


def jackknife(function: Callable[[Tensor], Tensor], values: Tensor, deleted: Tensor) -> Jackknifed:
    """Delete-one jackknife over independent replicates at independent points (Quenouille 1956, Tukey 1958).

    Each point's replicates are left out one at a time, the other points staying whole; variances and biases of the
    points add up:

        se^2 = sum_t (J-1)/J sum_j (f_tj - mean_j f_tj)^2,    bias = sum_t (J-1) (mean_j f_tj - f)

    The error is that of the truths at these points of this run: not of the choice of the points, nor of another run.

    Args:
        function: of ``[..., T, Q]``, giving ``[...]``; leading dimensions are separate evaluations.
        values: ``[T, Q]`` float64, what was found at the points from all replicates.
        deleted: ``[T, J, Q]``, without replicate j.
    """
    points, replicates, _ = deleted.shape
    value = function(values)
    terms = []
    for point in range(points):
        changed = values.expand(replicates, *values.shape).clone()
        changed[:, point] = deleted[point]
        terms.append(function(changed))
    found = torch.stack(terms)  # [T, J]
    means = found.mean(1, keepdim=True)
    se = ((replicates - 1) / replicates * (found - means).square().sum((0, 1))).sqrt()
    bias = (replicates - 1) * (means.squeeze(1) - value).sum(0)
    return Jackknifed(value, se, value - bias)

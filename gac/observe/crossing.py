"""Products of a step's gradients with the averages of earlier ones: what those steps were worth."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gac.observe.temporal import MovingMeans
from gac.statistics.branch import Branch
from gac_kernels import pair_moments
from gac_kernels.arguments import accumulator_dtype


class Crossing:
    """Moving means of both branches' gradients on the devices of this rank, and what gradients to come make with them.

    A gradient of a later step is independent of the means, given the parameters: ``<G_b, M_b'>`` is unbiased for
    ``<g_b, M_b'>``. A step without a measurement leaves a mean as it is; its decay goes by steps
    (:class:`gac.observe.temporal.MovingMeans`). With replicas means are of gradients that all ranks have added up, and
    every rank has the same; with shards each rank has those of its pieces.

    Args:
        devices: of the ledgers, in their order.
    """

    def __init__(self, devices: Sequence[torch.device]) -> None:
        self.means = [MovingMeans(device) for device in devices]

    def products(self, totals: Sequence[Tensor], device: torch.device, copies: Sequence[int] | None = None) -> Tensor:
        """``[4]`` on ``device``: :data:`gac.statistics.worth.WORTH`; NaN where a branch has no mean yet.

        Args:
            totals: ``[2m]`` for each ledger, both branches' gradients of the step.
            device: where the numbers go.
            copies: ranks that hold the same pieces, for each ledger; None: one.
        """
        parts = [_products(mean, both) for mean, both in zip(self.means, totals, strict=True)]
        if copies is not None:
            parts = [part / n for part, n in zip(parts, copies, strict=True)]
        return torch.stack([part.to(device, non_blocking=True) for part in parts]).sum(0)

    def take_in(self, totals: Sequence[Tensor], there: Tensor, step: int) -> None:
        """Makes the gradients of ``step`` part of the means; ``there``: ``[2]`` bool, of which branches."""
        for mean, both in zip(self.means, totals, strict=True):
            present = there.to(mean.device, non_blocking=True).unbind()
            for branch, gradient, known in zip(Branch, both.view(2, -1).unbind(), present, strict=True):
                mean.update(branch, gradient, known, step)


def _products(means: MovingMeans, both: Tensor) -> Tensor:
    """The four products on one device, in one read of each pair."""
    state = means.state
    dtype = accumulator_dtype(means.device)
    if not state:  # both branches are taken in together
        return torch.full((4,), float("nan"), dtype=dtype, device=means.device)
    earlier = [state[f"{branch.value}.mean"] for branch in Branch]
    weights = torch.stack([state[f"{branch.value}.weight"] for branch in Branch])
    now = both.view(2, -1).unbind()
    left, right = [x for x in now for _ in earlier], [m for _ in now for m in earlier]
    return (pair_moments(left, right, per_tensor=True)[:, 2].view(2, 2) / weights).view(4).to(dtype)

"""One set of statistics for all ranks that train replicas of a model."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from gac.ledger import Branch
from gac.observer import Observer
from gac_kernels.arguments import accumulator_dtype


def all_reduce(observer: Observer, group: dist.ProcessGroup | None) -> dict[Branch, Tensor]:
    """Sums every rank's sketches and sums of squares; every rank must call it in the same step.

    Data parallelism averages gradients over the ``W`` ranks, so a local contribution counts as ``x / W``: afterwards
    the ledgers hold the contributions of all ranks to the averaged gradient.

    Returns:
        Contributions of each branch over all ranks, 0-dim.
    """
    world = dist.get_world_size(group)
    first = observer.ledgers[0]
    dtype = accumulator_dtype(first.device)
    counts = torch.stack([torch.full((), observer.counts[b], dtype=dtype, device=first.device) for b in Branch])
    dist.all_reduce(counts, group=group)
    for ledger in observer.ledgers:
        ledger.all_reduce(world, group)
    return dict(zip(Branch, counts.unbind(), strict=True))

"""Rows of token coefficients, from every rank to every rank."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def gather_rows(rows: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """``[sum of B, C]`` from every rank's ``[B, C]``, in the order of ranks; ``B`` may differ and be 0.

    The host waits for the largest ``B``: a collective needs it as a number.
    """
    world = dist.get_world_size(group)
    counts = torch.zeros(world, dtype=torch.int64, device=rows.device)
    counts[dist.get_rank(group)] = len(rows)
    dist.all_reduce(counts, group=group)
    sizes = counts.tolist()
    padded = rows.new_zeros(max(sizes), rows.shape[1])
    padded[: len(rows)] = rows
    gathered = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(gathered, padded, group=group)
    return torch.cat([part[:size] for part, size in zip(gathered, sizes, strict=True)])

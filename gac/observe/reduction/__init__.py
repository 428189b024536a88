"""The sums of one optimizer step, over contributions, devices and ranks; one collective on its way at most.

Three cases (:class:`gac.observe.topology.Topology`), a class each behind the interface of :class:`Reduction`. In none
does the message grow with the number of ranks.
"""

from __future__ import annotations

from typing import Any

import torch

from gac.observe.observer import Observer
from gac.observe.reduction.base import Reduction
from gac.observe.reduction.local import LocalReduction
from gac.observe.reduction.replica import ReplicaReduction
from gac.observe.reduction.rows import gather_rows
from gac.observe.reduction.shard import ShardReduction
from gac.observe.topology import Topology

__all__ = ["LocalReduction", "Reduction", "ReplicaReduction", "ShardReduction", "gather_rows", "reduce_step"]


def reduce_step(observer: Observer, device: torch.device, topology: Topology, **more: Any) -> Reduction:
    """Posts the sums of a step that has ended; arguments and all else are those of :class:`Reduction`."""
    kind: type[Reduction] = ShardReduction if topology.sharded else ReplicaReduction
    if topology.ranks == 1 and not topology.sharded and device.type in ("cpu", "cuda"):
        kind = LocalReduction
    return kind(observer, device, topology, **more)

"""What ``estimator="sequence"`` does not go with."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from gac.observe.topology import Topology, fsdp2_modules, is_dtensor


def check_supported(model: nn.Module, parameters: Sequence[tuple[str, nn.Parameter]], topology: Topology) -> None:
    """Raises ValueError where layers do not see whole sequences, or gradients are taken over by an engine."""
    if topology.managed:
        raise ValueError(
            'estimator="sequence" under DeepSpeed has not been tested: use estimator="sketch", or DDP or FSDP2'
        )
    split = [name for name, p in parameters if is_dtensor(p) and _shards(p) > 1]
    sharded = [name for name, p in parameters if is_dtensor(p)]
    if split or (sharded and not fsdp2_modules(model)):
        raise ValueError(
            f'estimator="sequence": parameter {(split or sharded)[0]!r} is split by tensor parallelism, whose layers '
            'see parts of their inputs and outputs. Use estimator="sketch", or FSDP2 or DDP alone'
        )


def _shards(parameter: nn.Parameter) -> int:
    """Dimensions of the mesh over which a parameter is cut."""
    return sum(not placement.is_replicate() for placement in parameter.placements)  # type: ignore[attr-defined]

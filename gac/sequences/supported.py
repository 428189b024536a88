"""What ``estimator="sequence"`` does not go with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from gac.observe.topology import fsdp1_modules, fsdp2_modules, is_dtensor

WRAPPER = "_fsdp_wrapped_module."
"""What FSDP1 puts into names."""


def check_supported(model: nn.Module, parameters: Sequence[tuple[str, nn.Parameter]]) -> None:
    """Raises ValueError where layers do not see whole sequences, or have no parameters of their own."""
    if any(not wrapped._use_orig_params for wrapped in fsdp1_modules(model)):  # type: ignore[operator]
        raise ValueError(
            'estimator="sequence" under FSDP1 needs FullyShardedDataParallel(use_orig_params=True) '
            "(accelerate's fsdp_use_orig_params): otherwise layers have no parameters of their own"
        )
    split = [name for name, p in parameters if is_dtensor(p) and _shards(p) > 1]
    sharded = [name for name, p in parameters if is_dtensor(p)]
    if split or (sharded and not fsdp2_modules(model)):
        raise ValueError(
            f'estimator="sequence": parameter {(split or sharded)[0]!r} is split by tensor parallelism, whose layers '
            'see parts of their inputs and outputs. Use estimator="sketch", or FSDP2 or DDP alone'
        )


def whole_shapes(model: nn.Module, parameters: Sequence[tuple[str, nn.Parameter]]) -> Mapping[int, torch.Size]:
    """Shapes of parameters by their ``id``, whatever is left of them on this rank."""
    found = {id(p): getattr(p, "ds_shape", p.shape) for _, p in parameters}
    for wrapped in fsdp1_modules(model):
        flat: Any = getattr(wrapped, "_flat_param", None)
        if flat is not None:
            found |= {id(p): shape for p, shape in zip(flat._params, flat._shapes, strict=True)}
    return found


def _shards(parameter: nn.Parameter) -> int:
    """Dimensions of the mesh over which a parameter is cut."""
    return sum(not placement.is_replicate() for placement in parameter.placements)  # type: ignore[attr-defined]

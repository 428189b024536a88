"""Which parameters of a model are watched, and by whom."""

from __future__ import annotations

import weakref
from collections.abc import Iterable

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

_owners: WeakIdKeyDictionary = WeakIdKeyDictionary()  # parameter -> weak reference to its owner


READABLE = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""The dtypes whose gradients kernels read."""


def trainable(model: nn.Module, *, owner: object = None) -> list[tuple[str, nn.Parameter]]:
    """Named parameters that require gradients, tied ones once. Those of ``owner`` may be watched again.

    Raises:
        ValueError: there are none, or one is on the meta device. TypeError: one is complex, quantised, of integers or
        of 8 bits. RuntimeError: somebody watches one already.
    """
    parameters = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not parameters:
        raise ValueError(
            "model has no trainable parameters: every requires_grad is False. Unfreeze some, or add adapters, first"
        )
    for name, parameter in parameters:
        if parameter.device.type == "meta":
            raise ValueError(f"parameter {name!r} is on the meta device: load or materialise the model first")
        _require_readable(name, parameter)
        other = _owners.get(parameter)
        if other is not None and other() not in (None, owner):
            raise RuntimeError(f"parameter {name!r} is patched already: call unpatch() on the earlier mixer first")
    return parameters


def _require_readable(name: str, parameter: nn.Parameter) -> None:
    """Raises TypeError for a parameter whose gradient would be no real floating-point tensor that kernels read."""
    dtype = parameter.dtype
    if dtype in READABLE:
        return
    if dtype.is_complex:
        kind, instead = "complex", "keep its real and imaginary part as two real parameters (torch.view_as_real)"
    elif parameter.is_quantized or not dtype.is_floating_point:
        kind, instead = "of integers or quantised", "train adapters beside it, or convert it (dequantize)"
    else:
        kind, instead = f"of {8 * dtype.itemsize} bits", "convert it to torch.bfloat16"
    raise TypeError(
        f"parameter {name!r} is trainable and {kind} ({dtype}); gradients are measured in float32, bfloat16, float16 "
        f"and float64. Freeze it (requires_grad_(False)), or {instead}, before gac.patch"
    )


def claim(parameters: Iterable[nn.Parameter], owner: object) -> None:
    """Writes down that ``owner``, as long as it lives, watches these."""
    reference = weakref.ref(owner)
    for parameter in parameters:
        _owners[parameter] = reference


def release(parameters: Iterable[nn.Parameter]) -> None:
    """Nobody watches these any more."""
    for parameter in parameters:
        _owners.pop(parameter, None)

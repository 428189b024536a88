"""Which parameters of a model are watched, and by whom."""

from __future__ import annotations

import weakref
from collections.abc import Iterable

from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

_owners: WeakIdKeyDictionary = WeakIdKeyDictionary()  # parameter -> weak reference to its owner


def trainable(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Named parameters that require gradients, tied ones once.

    Raises:
        ValueError: there are none, or one is on the meta device. RuntimeError: somebody watches one already.
    """
    parameters = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not parameters:
        raise ValueError(
            "model has no trainable parameters: every requires_grad is False. Unfreeze some, or add adapters, first"
        )
    for name, parameter in parameters:
        if parameter.device.type == "meta":
            raise ValueError(f"parameter {name!r} is on the meta device: load or materialise the model first")
        other = _owners.get(parameter)
        if other is not None and other() is not None:
            raise RuntimeError(f"parameter {name!r} is patched already: call unpatch() on the earlier mixer first")
    return parameters


def claim(parameters: Iterable[nn.Parameter], owner: object) -> None:
    """Writes down that ``owner``, as long as it lives, watches these."""
    reference = weakref.ref(owner)
    for parameter in parameters:
        _owners[parameter] = reference


def release(parameters: Iterable[nn.Parameter]) -> None:
    """Nobody watches these any more."""
    for parameter in parameters:
        _owners.pop(parameter, None)

"""What an optimizer's average of gradients keeps from step to step, read off the optimizers that people bring."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch

_WITHOUT = (
    torch.optim.Adafactor,
    torch.optim.Adagrad,
    torch.optim.Adadelta,
    torch.optim.ASGD,
    torch.optim.Rprop,
)
"""They step by the gradient itself, and their groups have no entry that could say so."""

_named: set[str] = set()  # kinds of optimizers that a warning has named


def momentum_of(optimizer: torch.optim.Optimizer) -> float:
    """The share that an optimizer's average of gradients keeps of itself in a step: ``betas[0]`` of Adam, for one.

    Read from ``param_groups``, of the optimizer inside where ``optimizer`` wraps one (accelerate, DeepSpeed):

    - ``betas[0]``: Adam and its relatives, of torch, bitsandbytes (8 bits, paged) and torchao alike; Adan, CAME, Lamb.
      AdEMAMix has a slower average beside it, and the least of several counts.
    - ``betas[1]``: Lion (Chen et al. 2023, algorithm 2). It steps by the sign of ``b1*m + (1-b1)*g`` and then keeps
      ``m = b2*m + (1-b2)*g``: ``b2`` is what the average keeps, ``b1`` only how much of the average a step takes.
    - ``momentum``: SGD, RMSprop, Muon. With Nesterov's form the newest gradient weighs more, as it does in Lion.
    - ``beta1``: Adafactor of transformers; None stands for none.
    - 0: schedule-free optimizers (Defazio et al. 2024). Their ``momentum`` or ``betas[0]`` sets where between two
      iterates the gradient is taken; the gradients themselves are added up without an average. bitsandbytes' RMSprop,
      whose ``betas[0]`` belongs to the squares. Plain SGD, Adagrad, Adadelta, Rprop, ASGD and torch's Adafactor.

    Returns:
        A number in [0, 1): the least where groups differ (Muon with an AdamW inside, say), so that noise is rather
        counted too much. 0 for an optimizer that has none of these entries, which a warning names, once for each kind.
    """
    inner = _unwrapped(optimizer)
    groups = list(getattr(inner, "param_groups", ()))
    found = [_of_group(inner, group) for group in groups]
    if not groups or None in found:
        _warn(type(inner).__name__)
    return min((0.0 if share is None else share for share in found), default=0.0)


def noise_left(momentum: float) -> float:
    """Share of a gradient's noise that is left in an average which keeps ``momentum`` of itself: ``(1-m)/(1+m)``.

    That of independent noise of equal size, in the average of as many steps as have weight.
    """
    return (1 - momentum) / (1 + momentum)


def _unwrapped(optimizer: Any) -> Any:
    """The optimizer that takes the steps: engines call the one they wrap ``optimizer``."""
    met = [optimizer]
    while hasattr(getattr(met[-1], "optimizer", None), "param_groups"):
        inner = met[-1].optimizer
        if any(inner is one for one in met):
            break
        met.append(inner)
    return met[-1]


def _of_group(optimizer: Any, group: Mapping[str, Any]) -> float | None:
    """What a group's average keeps; None where nothing in the group tells."""
    kinds = [kind.__name__.lower() for kind in type(optimizer).__mro__]
    named = lambda word: any(word in kind for kind in kinds)
    if named("schedulefree") and not hasattr(optimizer, "base"):  # its wrapper shows the groups of the one inside
        return 0.0
    if isinstance(optimizer, _WITHOUT):
        return 0.0
    if "betas" in group:
        if named("rmsprop"):
            return 0.0
        return _share(group["betas"][1 if named("lion") else 0])
    if "momentum" in group:  # a Muon may keep the betas of the AdamW inside in the same group
        return min(_share(group["momentum"]), _share(group.get("adamw_betas", (1.0,))[0]))
    if "beta1" in group:
        return _share(group["beta1"])
    return None


def _share(value: Any) -> float:
    return 0.0 if value is None else float(value)


def _warn(kind: str) -> None:
    if kind in _named:
        return
    _named.add(kind)
    warnings.warn(
        f"gac cannot tell the momentum of {kind}: its param_groups have neither betas nor momentum nor beta1. It is "
        "taken for 0, as of plain SGD, which counts all of the gradients' noise; if it averages gradients, say by how "
        "much: gac.patch(model, momentum=0.9)",
        stacklevel=2,
    )

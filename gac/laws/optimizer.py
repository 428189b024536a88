"""Finding the optimizer that steps a model nobody named one for."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle


class FirstStep:
    """Calls ``told(optimizer)`` once: with the first optimizer of this process that steps one of some parameters.

    It sees every ``torch.optim.Optimizer``; optimizers that keep copies of the parameters (DeepSpeed, Megatron) are
    never recognised. ``done`` tells that it was found; :meth:`remove` then takes the hook off. It holds neither
    parameters nor ``told``'s owner: pass a function that holds a weak reference.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], told: Callable[[torch.optim.Optimizer], None]) -> None:
        self._own = {id(p) for p in parameters}
        self._told = told
        self._others: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
        self.done = False
        self._hook: RemovableHandle | None = register_optimizer_step_post_hook(self._stepped)

    def _stepped(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        if self.done or optimizer in self._others:
            return
        if any(id(p) in self._own for group in optimizer.param_groups for p in group["params"]):
            self.done = True  # torch iterates over the hooks: this one is taken off later
            self._told(optimizer)
        else:
            self._others.add(optimizer)

    def remove(self) -> None:
        """Stops looking; not while an optimizer steps."""
        self.done = True
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

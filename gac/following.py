"""The optimizer that a mixer goes by: named, found at its first step, or followed again by what is watched next."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from gac.laws.optimizer import FirstStep


class Following:
    """Holds neither the mixer nor the optimizer.

    Args:
        measure_by: a method of the mixer, called with the optimizer whose momentum and second moments count.
    """

    def __init__(self, measure_by: Callable[[torch.optim.Optimizer], None]) -> None:
        self._measure_by = weakref.WeakMethod(measure_by)
        self._optimizer: Callable[[], torch.optim.Optimizer | None] = lambda: None
        self._first: FirstStep | None = None
        self._end: Any = None

    def take(self, optimizer: torch.optim.Optimizer) -> None:
        """Goes by this optimizer from now on."""
        self.stop_looking()
        self._found(optimizer)

    def look_out(self, parameters: Iterable[nn.Parameter], *, named: torch.optim.Optimizer | None) -> None:
        """Goes by the optimizer that was named or followed before, or else by the first that steps one of these."""
        self.stop_looking()
        optimizer = named or self._optimizer()
        if optimizer is not None:
            self._found(optimizer)
        else:
            self._first = FirstStep(parameters, self._found)

    def end_with(self, optimizer: torch.optim.Optimizer, step: Callable[[], Any]) -> None:
        """Calls ``step`` after each step of the optimizer."""
        self._end = optimizer.register_step_post_hook(lambda *_: step())

    def settle(self) -> None:
        """Takes the hook off that has found its optimizer; not while an optimizer steps."""
        if self._first is not None and self._first.done:
            self.stop_looking()

    def stop_looking(self) -> None:
        """Waits for no optimizer any more."""
        if self._first is not None:
            self._first.remove()
            self._first = None

    def remove(self) -> None:
        """Takes every hook off."""
        self.stop_looking()
        if self._end is not None:
            self._end.remove()
            self._end = None

    def _found(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = weakref.ref(optimizer)
        measure_by = self._measure_by()
        if measure_by is not None:
            measure_by(optimizer)

"""Incoming gradients of passes whose begin and end are told, kept without a line of Python per parameter."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn


class Arriving:
    """Each parameter has a list, and its hook is that list's ``append``; another list has those that accumulated.

    Such hooks do not ask whose pass it is. What a pass left is taken when it ends. Gradients that came and were not
    accumulated are those of ``torch.autograd.grad``, and of no account.

    Args:
        parameters: of the model.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self._came: list[list[Tensor]] = [[] for _ in parameters]
        self._accumulated: list[nn.Parameter] = []
        self._index = {id(parameter): index for index, parameter in enumerate(parameters)}

    def on_gradient(self, index: int) -> Callable[[Tensor], None]:
        """What is told the incoming gradient of a parameter."""
        return self._came[index].append

    @property
    def on_accumulated(self) -> Callable[[nn.Parameter], None]:
        """What is told that a parameter's gradient was accumulated."""
        return self._accumulated.append

    def waiting(self) -> bool:
        """Whether anything was accumulated that nobody has taken."""
        return bool(self._accumulated)

    def take(self) -> dict[int, Tensor] | None:
        """What was accumulated, by parameter, in the order in which it came; None where that cannot be told.

        A parameter that came twice (in re-entrant checkpoints that share it) has the sum.
        """
        found: dict[int, Tensor] = {}
        for parameter in self._accumulated:
            index = self._index[id(parameter)]
            came = self._came[index]
            if not came:
                return None
            gradient, earlier = came.pop(0), found.pop(index, None)
            found[index] = gradient if earlier is None else earlier.detach() + gradient.detach()
        if any(self._came[index] for index in found):  # which of them?
            return None
        self.clear()
        return found

    def take_one(self, index: int) -> Tensor | None:
        """The gradient of one parameter, which came last and is being accumulated; None where it did not come."""
        came = self._came[index]
        return came.pop() if came else None

    def clear(self) -> None:
        """Lets go of everything."""
        self._accumulated.clear()
        if any(self._came):
            for came in self._came:
                came.clear()

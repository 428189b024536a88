"""Incoming gradients of passes whose begin and end are told, kept without a line of Python per parameter."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from gac.statistics.branch import Branch


class Arriving:
    """Each parameter has a list, and its hook is that list's ``append``.

    Such a hook asks nothing: neither whose pass it is nor whether anything is accumulated. What a pass left is taken
    when it ends, one gradient of each parameter; what is there at another time, or left over, came from somebody else.

    Args:
        count: of parameters.
    """

    def __init__(self, count: int) -> None:
        self._came: list[list[Tensor]] = [[] for _ in range(count)]
        self._orders: dict[Branch, Sequence[int]] = {}

    def hook(self, index: int) -> Callable[[Tensor], None]:
        """What is told the incoming gradient of a parameter."""
        return self._came[index].append

    def learn(self, branch: Branch, order: Sequence[int]) -> None:
        """A branch's passes reach parameters in this order; sums that add up in another differ in their last bits."""
        self._orders[branch] = order

    def take(self, branch: Branch) -> dict[int, Tensor]:
        """What a pass has left, by parameter, in the branch's order."""
        found = {}
        for index in self._orders.get(branch, ()):
            if came := self._came[index]:
                found[index] = came.pop(0)
        if self.waiting():
            for index, came in enumerate(self._came):
                if came and index not in found:
                    found[index] = came.pop(0)
        return found

    def take_one(self, index: int) -> Tensor | None:
        """The newest gradient of one parameter."""
        came = self._came[index]
        return came.pop() if came else None

    def waiting(self) -> bool:
        """Whether anything is there."""
        return any(self._came)

    def clear(self) -> None:
        """Lets go of everything."""
        if self.waiting():
            for came in self._came:
                came.clear()

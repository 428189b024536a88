"""Incoming gradients of passes whose begin and end are told: added as they come, or kept without a line of Python."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn

from gac.statistics.branch import Branch

if TYPE_CHECKING:
    from gac.observe.ledger import Ledger


class Arriving:
    """Each parameter has a list, and its hook is that list's ``append``; another list has those that accumulated.

    Such hooks do not ask whose pass it is. What a pass left is taken when it ends. Gradients that came and were not
    accumulated are those of ``torch.autograd.grad``, and of no account. On a CPU the hooks are the C++ library's:
    between :meth:`begin` and :meth:`take` they add what comes to the branch's total while it is in the cache, and the
    lists have what they did not take.

    Args:
        parameters: of the model.
        ledgers: of the model, and places: ledger and region of each parameter.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        ledgers: Sequence[Ledger] = (),
        places: Sequence[tuple[int, int]] = (),
    ) -> None:
        self._came: list[list[Tensor]] = [[] for _ in parameters]
        self._accumulated: list[nn.Parameter] = []
        self._index = {id(parameter): index for index, parameter in enumerate(parameters)}
        self._regions = [region for _, region in places]
        self._ledger = ledgers[0] if len(ledgers) == 1 and parameters else None
        self._sums = None if self._ledger is None else self._ledger.sums_of_arriving(self._accumulated)
        self._hooks = [self._hooks_of(index) for index in range(len(parameters))]
        self._adds = False
        self._seconds = 0.0
        self.added = 0
        """Gradients that the last pass left in the total."""

    def _hooks_of(self, index: int) -> tuple[Callable[[Tensor], None], Callable[[nn.Parameter], None]]:
        if self._sums is None:
            return self._came[index].append, self._accumulated.append
        return self._sums.hooks(self._regions[index], self._came[index])

    def on_gradient(self, index: int) -> Callable[[Tensor], None]:
        """What is told the incoming gradient of a parameter."""
        return self._hooks[index][0]

    def on_accumulated(self, index: int) -> Callable[[nn.Parameter], None]:
        """What is told that a parameter's gradient was accumulated."""
        return self._hooks[index][1]

    def begin(self, branch: Branch | None, scales: Sequence[Tensor]) -> None:
        """A pass begins: what comes may be added to the branch's total.

        Args:
            scales: of the ledgers, that undo the weight of the branch.
        """
        self.added = 0
        if self._sums is not None and branch is not None and self._ledger is not None:
            self._adds = self._ledger.begin_arriving(self._sums, branch, scales[0])

    def waiting(self) -> bool:
        """Whether anything was accumulated that nobody has taken."""
        return bool(self._accumulated)

    def take(self) -> dict[int, Tensor] | None:
        """What was accumulated and not added, by parameter, in the order in which it came.

        None where that cannot be told, or where one came again that was added: only the square of the sum would count.
        A parameter that came twice (in re-entrant checkpoints that share it) has the sum.
        """
        if self._adds and not self._end():
            return None
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
        self._clear()
        return found

    def _end(self) -> bool:
        """Adds no more; whether all that came was told apart."""
        assert self._sums is not None
        self._adds = False
        self.added, self._seconds = self._sums.end()
        return self.added >= 0

    def settle(self) -> float:
        """Has the open contribution take the moments of what was added; seconds that adding took."""
        if self.added > 0 and self._sums is not None and self._ledger is not None:
            self._ledger.end_arriving(self._sums, self.added)
        seconds, self.added, self._seconds = self._seconds, 0, 0.0
        return seconds

    def take_one(self, index: int) -> Tensor | None:
        """The gradient of one parameter, which came last and is being accumulated; None where it did not come."""
        came = self._came[index]
        return came.pop() if came else None

    def clear(self) -> None:
        """Lets go of everything."""
        if self._adds:
            self._end()
        self.added = 0
        self._clear()

    def _clear(self) -> None:
        self._accumulated.clear()
        if any(self._came):
            for came in self._came:
                came.clear()

"""Steps that measure nothing: the shortest way through them."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter
from typing import TYPE_CHECKING, Any

from torch import Tensor

from gac.fused import law as fused_law
from gac.fused.state import HostState
from gac.modes import Lasting
from gac.weights import HostWeights, Weights

if TYPE_CHECKING:
    from gac.laws.controller import Controller
    from gac.observe.observer import Observer
    from gac.spending import StepClock
    from gac.statistics.branch import Branch


class Quiet:
    """A run of steps that measure nothing and whose law only goes on towards its estimate, in numbers of the host.

    Between large matrix products no cache holds anything of GAC any more. What such a step costs is then the number of
    objects and functions that it touches, so it touches this one, and what it writes is here or is made up for by
    whoever ends the run.

    Args:
        controller: of the law.
        weights: of the first step.

    Attributes:
        begins: called in the first step of a run.
        weights: of the step under way, quiet or not.
        left: steps that may still pass by; 0: the step under way has to be ended.
        enters: whether branches, too, need nothing beyond their weight.
        entered: whether one was entered in this step.
        weight: of the branch under way, where that was entered quietly; else None.
        passed: steps of this run.
    """

    __slots__ = (
        "_clock", "_controller", "_inside", "_mu", "_observer", "_state", "_target", "_told_by", "begins", "entered",
        "enters", "left", "passed", "weight", "weights",
    )  # fmt: skip

    def __init__(self, controller: Controller, weights: Weights) -> None:
        self._controller, self.weights = controller, weights
        self._state: HostState | None = None  # the law's, where it can pass steps by itself ...
        self._mu = self._target = 0.5  # ... and the numbers that it moves between
        self._told_by: tuple[Any, Any] = (0.0, 0.0)  # momentum and alpha at the last estimate
        self.begins: Callable[[], None] = lambda: None
        self.entered = self.enters = False
        self.left = self.passed = 0
        self.weight: Tensor | None = None

    def keep(self, state: HostState | None, mu: float = 0.5, target: float = 0.5) -> None:
        """The law's state after a step that was ended, its ``mu`` and what that goes towards.

        ``state`` None: it cannot pass steps by itself.
        """
        self._state = state
        if state is not None:
            law: Any = self._controller.law
            self._mu, self._target = mu, target
            self._told_by = law.momentum, law.alpha

    def plan(self, left: int, observer: Observer, clock: StepClock) -> None:
        """Prepares for the steps to come, of which ``left`` may pass by."""
        self._observer, self._clock, self._inside = observer, clock, observer.now
        self.left = 0 if self._state is None else left
        self.entered, self.weight = False, None

    def enter(self, branch: Branch) -> bool:
        """A branch begins; False: it must be entered as in any step."""
        start = perf_counter()
        observer = self._observer
        if observer.branch is not None:
            return False
        observer.branch = branch
        self.entered = True
        self.weight = self.weights.of[branch]
        self._inside.seconds += perf_counter() - start
        return True

    def leave(self) -> None:
        """The branch that was entered ends."""
        start = perf_counter()
        self.weight = self._observer.branch = None
        self._inside.seconds += perf_counter() - start

    def pass_by(self) -> Weights | None:
        """Ends the step; its successor's weights, or None where it has to be ended as others are."""
        start = perf_counter()
        observer, controller, state = self._observer, self._controller, self._state
        law: Any = controller.law
        seen = observer.seen
        if self.entered:
            self.entered = False
            seen.fired = True
        if observer.branch is not None or not seen.fired or state is None:
            return None
        if law.state is not state or state.was_read or self._told_by != (law.momentum, law.alpha):
            return None
        if self.passed == 0:
            self.begins()
        self.left -= 1
        self.passed += 1
        controller.steps += 1
        state.passed += 1
        seen.fired = False
        if seen.entered or seen.weighted or seen.outside or seen.broken:
            seen.begin_again()
        if self._mu != self._target:
            moved = fused_law.towards(law, self._mu, self._target)
            if moved != self._mu:
                with Lasting():  # backward passes to come save them
                    self._mu, self.weights = moved, HostWeights(moved)
        inside, now = self._inside, perf_counter()
        inside.seconds += now - start
        self._clock.tick(now, inside.seconds)
        return self.weights

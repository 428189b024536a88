"""Which backward pass a hook runs in."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from torch import Tensor
from torch.autograd import graph

AT_ONCE = (
    "two backward passes of a branch at once, in two threads: use mixer.backward(loss), which takes turns, or run them "
    "one after the other"
)

_ENGINE_CALL = graph._engine_run_backward.__code__


def outermost_call(thread: int | None = None) -> FrameType | None:
    """The frame of the outermost call of the autograd engine in a thread (default: this one); None outside of any.

    A pass that a re-entrant checkpoint starts has a graph task of its own, and the frame of the pass around it. A GPU's
    hooks run in a thread of the engine: the frames of the thread that waits for it tell.
    """
    mine = thread is None or thread == threading.get_ident()
    frame = sys._getframe() if mine else sys._current_frames().get(thread)  # type: ignore[arg-type]
    found = None
    while frame is not None:
        if frame.f_code is _ENGINE_CALL:
            found = frame
        frame = frame.f_back
    return found


class Passes:
    """The backward passes inside a branch: where one ends and the next begins, and whether the last one ended at all.

    Args:
        parameters: whose hooks tell of passes. broken: called before passes of two threads at once are refused.

    Attributes:
        lock: of a contribution whose begin and end the caller tells.
        guided: whether a pass runs whose begin and end the caller tells (:meth:`gac.Mixer.backward`).
    """

    def __init__(self, parameters: Sequence[Tensor], broken: Callable[[], None]) -> None:
        self.lock = threading.RLock()
        self.guided = False
        self._on_host = all(p.device.type == "cpu" for p in parameters)  # whose hooks run in the thread that called
        self._broken = broken
        self._caller: int | None = None  # the thread that entered the branch
        self._call: FrameType | None = None  # of the pass that opened the contribution
        self._thread: int | None = None  # whose hook opened it
        self._awaited: set[int] = set()  # graph tasks whose end has not come

    def entered(self) -> None:
        """A branch begins in this thread."""
        self._caller = threading.get_ident()

    def present(self, *, on_host: bool | None = None) -> FrameType | None:
        """The call that the hook under way belongs to.

        Args:
            on_host: whether the hook is of a parameter on the CPU, whose hooks run in the thread that called; None:
                where all parameters are.
        """
        return outermost_call(None if (self._on_host if on_host is None else on_host) else self._caller)

    def goes_on(self, call: FrameType | None) -> bool:
        """Whether this is the pass that opened the contribution."""
        return call is not None and call is self._call

    def opened(self, call: FrameType | None) -> None:
        """This pass opens a contribution. Its frame is kept until the contribution is over."""
        self._call = call

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Around the first hook of a pass and its end: another thread's pass must not begin or end meanwhile.

        It refuses, and does not wait: a hook holds its parameter, which the other pass may be waiting for. Hooks of a
        GPU run in threads of the engine, which tell nothing.
        """
        if not self._on_host:
            yield
            return
        if not self.lock.acquire(blocking=False):
            self.refuse()
        try:
            yield
        finally:
            self.lock.release()

    def check_alone(self, *, plain: bool = False) -> None:
        """Refuses a pass while a plain one of another thread is under way; ``plain``: this one has a gradient already.

        On a GPU only plain ones are known, and one whose error was caught is taken for one that goes on.
        """
        if self._thread in (None, threading.get_ident()):
            return
        if self._on_host:  # else its thread has ended, or does something else: an error in it was caught
            under_way = self._call is not None and outermost_call(self._thread) is self._call
        else:
            under_way = plain and bool(self._awaited)
        if under_way:
            self.refuse(plain=plain)

    def refuse(self, *, plain: bool = True) -> NoReturn:
        """Raises RuntimeError for passes of two threads at once; ``plain``: there is a gradient of this one already."""
        if plain:
            self._broken()
        raise RuntimeError(AT_ONCE)

    def began(self, task: int) -> None:
        """Hooks of a graph task run, whose end will be told."""
        if not self._awaited:
            self._thread = threading.get_ident()
        self._awaited.add(task)

    def ended(self, task: int) -> None:
        """The graph task is done."""
        self._awaited.discard(task)

    @property
    def died(self) -> bool:
        """Whether a pass began and did not end: an error in it was caught."""
        return bool(self._awaited)

    def close(self) -> None:
        """The contribution is over."""
        self._call = self._thread = None
        self._awaited.clear()

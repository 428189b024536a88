"""Which backward pass a hook runs in."""

from __future__ import annotations

import sys
import threading
from types import FrameType

from torch.autograd import graph

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

    Attributes:
        guided: whether a pass runs whose begin and end the caller tells (:meth:`gac.Mixer.backward`).
    """

    def __init__(self) -> None:
        self.guided = False
        self._caller: int | None = None  # the thread that entered the branch
        self._call: FrameType | None = None  # of the pass that opened the contribution
        self._thread: int | None = None  # whose hook opened it
        self._awaited: set[int] = set()  # graph tasks whose end has not come

    def entered(self) -> None:
        """A branch begins in this thread."""
        self._caller = threading.get_ident()

    def present(self, *, on_host: bool) -> FrameType | None:
        """The call that the hook under way belongs to.

        Args:
            on_host: whether the hook is of a parameter on the CPU, whose hooks run in the thread that called.
        """
        return outermost_call(None if on_host else self._caller)

    def goes_on(self, call: FrameType | None) -> bool:
        """Whether this is the pass that opened the contribution."""
        return call is not None and call is self._call

    def opened(self, call: FrameType | None) -> None:
        """This pass opens a contribution. Its frame is kept until the contribution is over."""
        self._call = call

    def concurrent(self) -> bool:
        """Whether a pass of another thread is under way."""
        return bool(self._awaited) and self._thread not in (None, threading.get_ident())

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

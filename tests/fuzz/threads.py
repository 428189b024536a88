"""The threads that passes of a step run in."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress


class Threads:
    """Runs passes where a step wants them.

    Args:
        kind: None: in this thread. ``turns``: each in a thread of its own, one after another. ``together``: all that
            are given before :meth:`join`, each in a thread of its own, at the same time.
    """

    def __init__(self, kind: str | None) -> None:
        self._kind = kind
        self._meeting = threading.Barrier(1)
        self._waiting: list[tuple[Callable[[], None], int]] = []

    def run(self, call: Callable[[], None], number: int) -> None:
        """Runs a call, or has it wait for the others; its thread has the number as its name. Raises what it raises."""
        if self._kind is None:
            call()
            return
        self._waiting.append((call, number))
        if self._kind == "turns":
            self.join()

    def meet(self) -> None:
        """Where the calls wait for one another."""
        with suppress(threading.BrokenBarrierError):
            self._meeting.wait()

    def join(self) -> None:
        """Runs the calls that wait, to their end. Raises what the first of them raised, foreign errors before gac's."""
        calls, self._waiting = self._waiting, []
        errors: list[Exception] = []
        self._meeting = threading.Barrier(max(1, len(calls)))

        def run(call: Callable[[], None]) -> None:
            try:
                call()
            except Exception as error:
                errors.append(error)
            finally:
                self._meeting.abort()  # nobody waits for one that has ended

        threads = [threading.Thread(target=run, args=(call,), name=str(number)) for call, number in calls]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise min(errors, key=lambda error: isinstance(error, (RuntimeError, ValueError, TypeError)))

"""The threads that passes of a step run in."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Threads:
    """Runs passes where a step wants them.

    Args:
        kind: None: in this thread. ``turns``: each in a thread of its own, one after another. ``together``: all that
            are given before :meth:`join`, each in a thread of its own, at the same time.
    """

    def __init__(self, kind: str | None) -> None:
        self._kind = kind
        self._waiting: list[Callable[[], None]] = []

    def run(self, call: Callable[[], None]) -> None:
        """Runs a call, or has it wait for the others. Raises what it raises."""
        if self._kind is None:
            call()
            return
        self._waiting.append(call)
        if self._kind == "turns":
            self.join()

    def join(self) -> None:
        """Runs the calls that wait, to their end. Raises what the first of them raised, foreign errors before gac's."""
        calls, self._waiting = self._waiting, []
        errors: list[Exception] = []
        start = threading.Barrier(max(1, len(calls)))

        def run(call: Callable[[], None]) -> None:
            start.wait()
            try:
                call()
            except Exception as error:
                errors.append(error)

        threads = [threading.Thread(target=run, args=(call,)) for call in calls]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise min(errors, key=lambda error: isinstance(error, (RuntimeError, ValueError, TypeError)))

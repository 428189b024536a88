"""The target ``mixer``: draws of models, schedules and options, in one process."""

from __future__ import annotations

from collections.abc import Iterable
from time import monotonic

from tests.fuzz.drawing import drawn
from tests.fuzz.judge import judge, known_as, shrunk
from tests.fuzz.report import Tally, reproduction

SHOWN = 5
"""Failures of a kind that are shrunk and shown; the rest are counted."""


def fuzz(seed: int, numbers: Iterable[int], *, until: float = float("inf")) -> Tally:
    """Judges the draws of ``numbers``, at least one, until ``monotonic()`` says ``until``."""
    tally, start = Tally("mixer"), monotonic()
    for number in numbers:
        failure = judge(drawn(seed, number))
        tally.draws += 1
        if failure is not None:
            names = [known.name for known in known_as(failure)]
            tally.known.update(names)
            if not names and len(tally.failures) < SHOWN:
                least = shrunk(failure)
                tally.failures.append(reproduction(seed, number, least.kind, least.what, least.draw))
            elif not names:
                tally.failures.append(f"{failure.kind}, draw {number} of seed {seed}: {failure.what}")
        if monotonic() >= until:
            break
    tally.seconds = monotonic() - start
    return tally

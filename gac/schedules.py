"""Schedules for mu: plain functions of the optimizer step, computed on the host."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from numbers import Real

Schedule = Callable[[int], float]


def warmup_cosine(step: int, warmup: int, decay: int, peak: float, valley: float) -> float:
    """Linear from 0 to ``peak`` over ``warmup`` steps, then half a cosine down to ``valley`` over ``decay`` steps.

    The mu schedule of CHORD (arXiv 2508.11408), which GAC (arXiv 2605.26184) uses as its prior.

    Raises ValueError when ``warmup`` or ``decay`` is negative.
    """
    if not (warmup >= 0 and decay >= 0):
        raise ValueError(f"warmup and decay must not be negative, got {warmup} and {decay}")
    if step < warmup:
        return peak * step / warmup
    if step >= warmup + decay:
        return valley
    return valley + (peak - valley) * 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / decay))


def as_schedule(prior: Schedule | Mapping | float | None) -> Schedule | None:
    """A function of the step from what users write: a number, the arguments of :func:`warmup_cosine`, or a function.

    Raises TypeError for anything else and for missing or unknown arguments, ValueError for a number outside [0, 1]; a
    function is checked when it is called. It may return a 0-dim tensor, which is not read.
    """
    if prior is None:
        return None
    if callable(prior):
        return _checked(prior)
    if isinstance(prior, Real) and not isinstance(prior, bool):
        if not 0.0 <= prior <= 1.0:
            raise ValueError(f"prior must be in [0, 1], got {prior}")
        return lambda step: float(prior)
    if isinstance(prior, Mapping):
        wanted = {"warmup", "decay", "peak", "valley"}
        if set(prior) != wanted:
            raise TypeError(f"prior must have the keys {sorted(wanted)}, got {sorted(prior)}")
        for name in ("peak", "valley"):
            if not 0.0 <= prior[name] <= 1.0:
                raise ValueError(f"{name} of the prior must be in [0, 1], got {prior[name]}")
        warmup_cosine(0, **prior)
        return lambda step: warmup_cosine(step, **prior)
    raise TypeError(
        f"prior must be a number, a function of the step or a dict(warmup, decay, peak, valley), got {prior!r}"
    )


def _checked(schedule: Schedule) -> Schedule:
    """``schedule`` with an error where it returns a number outside [0, 1]."""

    def checked(step: int) -> float:
        value = schedule(step)
        if isinstance(value, Real) and not 0.0 <= value <= 1.0:
            raise ValueError(f"the prior must be in [0, 1], but its function returned {value} at step {step}")
        return value

    return checked

"""Arithmetic on Python floats as torch does it: dividing by 0 or leaving a function's domain is no error."""

from __future__ import annotations

import math
from collections.abc import Iterable

NAN, INF = math.nan, math.inf


def divide(a: float, b: float) -> float:
    """``a / b``; by 0 an infinity, or NaN for 0 and NaN."""
    if b != 0.0:
        return a / b
    return NAN if a == 0.0 or a != a else math.copysign(INF, a) * math.copysign(1.0, b)


def root(x: float) -> float:
    """Square root; NaN below 0."""
    return math.sqrt(x) if x >= 0.0 else NAN


def lerp(a: float, b: float, weight: float) -> float:
    """``a + weight * (b - a)``, from whichever end is nearer, as :func:`torch.lerp` has it."""
    return a + weight * (b - a) if weight < 0.5 else b - (b - a) * (1.0 - weight)


def clamp(x: float, low: float, high: float = INF) -> float:
    """``x`` in ``[low, high]``; NaN stays NaN."""
    return low if x < low else high if x > high else x


def sigmoid(x: float) -> float:
    """``1 / (1 + exp(-x))``."""
    return 1.0 / (1.0 + math.exp(-x)) if x >= -700.0 else 0.0


def length(values: Iterable[float]) -> float:
    """Euclidean length."""
    return root(sum(x * x for x in values))

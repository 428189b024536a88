"""Averages over steps with standard errors, and how they are written."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

MEASURABLE = 2.0
"""A number that cannot be negative counts as measured from this many standard errors above zero on."""

FEWEST = 4
"""Values from which a spread, hence a standard error, is taken."""


@dataclass(frozen=True)
class Estimate:
    """A number with its standard error, NaN where unknown.

    ``bound`` is empty, or says that ``value`` is what the number lies below (``"<"``) or above (``">"``), with a
    confidence of two standard errors.
    """

    value: float = math.nan
    se: float = math.nan
    bound: str = ""

    @property
    def known(self) -> bool:
        return not math.isnan(self.value)

    @property
    def measurable(self) -> bool:
        """Above zero by :data:`MEASURABLE` standard errors; above zero where no error is known."""
        return self.value > (0.0 if math.isnan(self.se) else MEASURABLE * self.se)

    @property
    def upper(self) -> float:
        """What a number that cannot be negative hardly exceeds; NaN where no error is known."""
        return max(self.value, 0.0) + MEASURABLE * self.se

    def text(self, *, percent: bool = False) -> str:
        """``0.31±0.04`` with the digits that the error leaves meaning, ``>120`` for a bound, ``-`` where unknown."""
        if not self.known:
            return "-"
        factor, unit = (100.0, "%") if percent else (1.0, "")
        value, se = factor * self.value, factor * self.se
        if self.bound or not (0 < se < math.inf) or not math.isfinite(value):
            return f"{self.bound}{digits(value, 2 if self.bound else 3)}{unit}"
        power = _power(max(abs(value), se), 1)
        scaled = not -4 <= power < 7
        if scaled:
            value, se = value / 10.0**power, se / 10.0**power
        places = min(max(0, -_power(se, 1)), 9)
        text = f"{round(value, places) + 0.0:.{places}f}±{se:.{places}f}"  # + 0.0: never -0
        return (f"({text})e{power:+03d}" if scaled else text) + unit

    def as_json(self) -> dict[str, Any]:
        finite = lambda x: x if math.isfinite(x) else None
        return {"value": finite(self.value), "se": finite(self.se), **({"bound": self.bound} if self.bound else {})}


def digits(value: float, count: int) -> str:
    """``value`` to ``count`` significant digits, without an exponent where a reader needs none."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    power = _power(value, count)
    if -4 <= power < 7:
        return f"{value:.{max(0, count - 1 - power)}f}"
    return f"{value:.{count - 1}e}"


def _power(value: float, count: int) -> int:
    """The power of ten of the first of ``count`` digits, after rounding."""
    return int(f"{value:.{count - 1}e}".partition("e")[2])


def estimate(function: Callable[..., Tensor], columns: Sequence[Tensor], weights: Tensor) -> tuple[Tensor, Tensor]:
    """``function`` of weighted means, and its standard error by the delta method.

    With normalised weights ``w_t``, means ``m = sum_t w_t x_t`` and the linearised values
    ``z_t = grad f(m) . (x_t - m)``, whose covariances over steps the spread contains,

        se^2 = sum_t w_t^2 * sum_t w_t z_t^2 / (1 - sum_t w_t^2)

    which is the variance of the mean over its number of values where weights are equal.

    Args:
        function: of tensors ``[R]``, elementwise.
        columns: its arguments over time, each ``[T, R]`` in float64; a step with a NaN in any of them does not count.
        weights: ``[T]``, of steps.

    Returns:
        Value and standard error, each ``[R]``; NaN without values, and the error NaN with fewer than :data:`FEWEST`.
    """
    x = torch.stack(list(columns), -1)
    valid = x.isfinite().all(-1)
    w = weights[:, None] * valid
    w = w / w.sum(0)  # NaN where nothing is valid
    x = torch.where(valid[..., None], x, 0.0)
    with torch.inference_mode(False), torch.enable_grad():
        means = (w[..., None] * x).sum(0).detach().requires_grad_()
        value = function(*means.unbind(-1))
        (gradient,) = torch.autograd.grad(value.sum(), means)
    z = torch.where(valid, ((x - means.detach()) * gradient).sum(-1), 0.0)
    together = w.square().sum(0)
    se = (together * (w * z.square()).sum(0) / (1 - together)).sqrt()
    return value.detach(), torch.where(valid.sum(0) >= FEWEST, se, math.nan)

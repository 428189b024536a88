"""Standard errors of a step's estimates, from how they differ between successive steps."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import torch
from torch import Tensor

from gac.state import Numbers, Range, like
from gac.statistics.step import Statistics

HALF_LIFE = 30.0
"""Measured steps after which a squared difference counts half: 58 degrees of freedom for each standard error."""

LEVEL_HALF_LIFE = 7.0
"""Measured steps over which the level is averaged that differences are relative to; as the law's own average."""

STEADY = 1024
"""Measurements after which the weights change no more: 2^(-1024/30) is 5e-11."""


class SuccessiveDifferences:
    """Standard errors of several estimates, each measured anew in every step.

    Two successive steps draw their data independently, so half the expected squared difference of an estimate between
    them is its variance (von Neumann 1941). Differences are taken relative to the estimate's level, a moving average
    of ``|e|``, so that they can be compared while gradients shrink or grow:

        SE = level * sqrt(average of ((e_t - e_{t-1}) / level_t)^2 / 2) * t(dof)

    ``level`` and ``average`` are bias-corrected exponential averages. Few differences know the variance poorly, and
    ``t``, the quantile of Student's distribution in units of the normal one, widens the error for it: ``e +- SE`` holds
    the truth in 68% of the steps from early on. It is 1.81 after two measurements, 1.09 after ten and 1.01 in the end.

    Nothing is assumed about the distribution of gradients, and every source of error is in it: few contributions, the
    choice of prompts, correlation within a step. A trend adds only what changes within one step (``d`` a step: ``d^2 /
    2`` to the square). Estimates that share data between steps, as several optimizer steps on one batch of rollouts do,
    make it too small. The sketch's own error is nearly the same in successive steps and is not in it. What the
    intervals were measured to hold is in ``docs/statistics.md``.

    State: ``last`` (NaN before the first measurement), ``level``, ``average`` and ``count`` (of measurements), each
    ``[n]``.
    """

    def __init__(self, n: int, device: torch.device, dtype: torch.dtype) -> None:
        self._table = table_of_weights().to(device=device, dtype=dtype)
        zeros = torch.zeros(4, n, dtype=dtype, device=device)
        zeros[0] = float("nan")
        self.state: dict[str, Tensor] = dict(zip(("last", "level", "average", "count"), zeros.unbind(), strict=True))

    RANGES: ClassVar[dict[str, Range]] = {
        "last": Range(unknown=True),
        "level": Range(low=0.0),
        "average": Range(low=0.0, high=math.inf, unknown=True),  # relative to a level that may be 5e-324
        "count": Range(low=0.0, whole=True),
    }
    """Of a state that was saved."""

    def update(self, estimates: Tensor, healthy: Tensor) -> Tensor:
        """Takes in a step's estimates.

        Args:
            estimates: ``[n]``; NaN where one was not measured, which leaves its average alone. The next difference is
                then from the measurement before the gap.
            healthy: 0-dim bool; False leaves everything alone.

        Returns:
            ``[n]``: their standard errors; NaN before the second measurement.
        """
        last, level, average, count = (self.state[name] for name in ("last", "level", "average", "count"))
        estimates = estimates.to(last.dtype)
        use = torch.isfinite(estimates) & healthy
        count = count + use
        of_level, of_average, factor = self._table[count.long().clamp(max=STEADY)].unbind(-1)
        level = torch.where(use, torch.lerp(level, estimates.abs(), of_level), level)
        difference = torch.where(estimates == last, 0.0, (estimates - last) / level)  # 0 / 0 is no difference
        squared = torch.where(use & (count >= 2), difference.square() / 2, average)
        average = torch.lerp(average, squared, of_average)
        self.state = {
            "last": torch.where(use, estimates, last),
            "level": level,
            "average": average,
            "count": count,
        }
        return level * average.sqrt() * factor


def table_of_weights() -> Tensor:
    """``[STEADY + 1, 3]``, a row for each number of measurements.

    The weights of the newest value in the averages of levels and of differences, then Student's factor.
    """
    counts = torch.arange(STEADY + 1, dtype=torch.float64)
    of_level, of_average = _newest(LEVEL_HALF_LIFE, counts), _newest(HALF_LIFE, counts - 1)
    factor = torch.where(counts >= 2, _student(degrees_of_freedom(counts - 1)), float("nan"))
    return torch.stack([of_level, of_average, factor], dim=1)


def _newest(half_life: float, n: Tensor) -> Tensor:
    """Weight of the newest of ``n`` values in a bias-corrected exponential average."""
    keep = 0.5 ** (1 / half_life)
    return torch.where(n >= 1, (1 - keep) / (1 - keep**n), 0.0)


def degrees_of_freedom(n: Tensor) -> Tensor:
    """Of the average of ``n`` halved squared differences of Gaussian values with the variance ``V``.

    Each has the variance ``2 V^2`` and neighbours, which share a value, the covariance ``V^2 / 2``. With normalised
    weights ``w_k`` the average has the variance ``V^2 (2 sum w_k^2 + sum w_k w_{k+1})``, that of a sample variance with
    ``1 / (sum w_k^2 + sum w_k w_{k+1} / 2)`` degrees of freedom.
    """
    keep = 0.5 ** (1 / HALF_LIFE)
    share = (1 - keep) / (1 + keep) / (1 - keep**n).square()
    return 1 / (share * (1 - keep ** (2 * n)) + share * keep * (1 - keep ** (2 * n - 2)) / 2)


def _student(dof: Tensor) -> Tensor:
    """What ``P(|t| < .) = 0.683`` of Student's distribution is at, the normal one's 1 (Abramowitz & Stegun 26.7.5)."""
    x = 1 / dof
    return 1 + x / 2 + x**2 / 4 + x**3 / 16


WITH_ERRORS = ("sigma_s2", "sigma_r2", "distance2", "delta_g2")
"""The statistics that have a standard error."""


class StandardErrors:
    """Gives each step's statistics their standard errors, from how they change between successive steps.

    Attributes:
        state: what the next step needs.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._differences = SuccessiveDifferences(len(WITH_ERRORS), device, dtype)

    @property
    def state(self) -> dict[str, Tensor]:
        return self._differences.state

    @state.setter
    def state(self, state: dict[str, Tensor]) -> None:
        self._differences.state = state

    def entries(self) -> dict[str, Numbers]:
        """What a saved :attr:`state` may hold."""
        return like(self.state, self._differences.RANGES)

    def attach(self, statistics: Statistics) -> Statistics:
        """The statistics with ``*_se``; a step with non-finite elements teaches nothing."""
        estimates = torch.stack([getattr(statistics, name) for name in WITH_ERRORS])
        errors = self._differences.update(estimates, statistics.nonfinite == 0).unbind()
        return dataclasses.replace(
            statistics, **{f"{name}_se": error for name, error in zip(WITH_ERRORS, errors, strict=True)}
        )


SURPRISE = 3.0
"""Standard errors of a difference beyond which an estimate has moved."""


def has_moved(last: Tensor, statistics: Statistics) -> Tensor:
    """Whether an estimate differs from that of the measurement before by more than its standard error explains.

    Args:
        last: ``[4]``, those of the measurement before. statistics: with standard errors.

    Returns:
        0-dim bool; False where neither is known.
    """
    now = torch.stack([getattr(statistics, name) for name in WITH_ERRORS])
    errors = torch.stack([getattr(statistics, f"{name}_se") for name in WITH_ERRORS])
    return ((now - last).abs() > SURPRISE * math.sqrt(2) * errors).any()

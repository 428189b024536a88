"""Noticing a loss that is divided by the number of micro-batches once too often.

A contribution that is divided by the number ``n`` of its branch's contributions in a step (or by the step's tokens)
has a mean square in proportion to ``n**-2``; one that is not divided, to ``n**0``. Divided twice it is ``n**-4``: the
branch then weighs less the more it accumulates, which a step alone cannot tell and steps of different ``n`` can.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

FEWEST = 8
"""Steps of one ``n`` before their mean counts."""

STEEPEST = -3.0
"""Slope of the logarithm of the mean square over that of ``n``: half way between one division and two."""


@dataclass
class _Mean:
    """Of numbers that come one by one, with their spread (Welford 1962)."""

    count: int = 0
    mean: float = 0.0
    spread: float = 0.0

    def take(self, value: float) -> None:
        self.count += 1
        off = value - self.mean
        self.mean += off / self.count
        self.spread += off * (value - self.mean)

    @property
    def variance(self) -> float:
        """Of the mean."""
        return self.spread / (self.count - 1) / self.count


class Accumulation:
    """Compares a branch's steps of different ``n``, and warns once where their contributions shrink too fast.

    Args:
        branch: its name in the warning.
    """

    def __init__(self, branch: str) -> None:
        self._branch = branch
        self._means: dict[int, _Mean] = {}
        self._said = False

    def take(self, n: float, sigma2: float, norm2: float) -> None:
        """Takes a step in: its contributions, and ``sigma_b2`` and ``norm_b2`` of :class:`gac.Statistics`."""
        if self._said or n < 2:
            return
        square = (sigma2 * (n - 1) / n + norm2 / n) / n  # mean |x_k|^2
        if 0 < square < math.inf:
            self._means.setdefault(int(n), _Mean()).take(math.log(square))
            self._compare()

    def _compare(self) -> None:
        known = [n for n, mean in self._means.items() if mean.count >= FEWEST]
        if len(known) < 2:
            return
        few, many = min(known), max(known)
        a, b, width = self._means[few], self._means[many], math.log(many / few)
        slope, error = (b.mean - a.mean) / width, math.sqrt(a.variance + b.variance) / width
        if slope + 3 * error < STEEPEST:
            self._said = True
            warnings.warn(
                f"contributions of the {self._branch} branch shrink with the power {slope / 2:.1f} of their number in "
                f"a step ({few} and {many}), where a division by that number gives -1: the loss seems to be divided by "
                "the accumulation twice, so that the branch weighs less the more micro-batches a step has",
                stacklevel=2,
            )

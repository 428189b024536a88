"""A constant mu."""

from __future__ import annotations

from torch import Tensor

from gac.laws.base import Law, Step, register, unit_interval
from gac.statistics import Statistics


@register("fixed")
class FixedLaw(Law):
    """mu never moves. Statistics are still measured.

    Args:
        mu: weight of the SFT branch, in [0, 1]. A branch of weight 0 leaves no trace in the gradient, so its
            statistics are not measured.
    """

    def __init__(self, mu: float = 0.5) -> None:
        super().__init__(start=unit_interval("mu", mu))

    def update(self, statistics: Statistics | None, step: Step) -> Tensor:
        return self.mu

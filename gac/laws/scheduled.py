"""Laws that follow a schedule and look at no statistic."""

from __future__ import annotations

from torch import Tensor

from gac.laws.base import Law, Step, number, register, unit_interval, whole
from gac.schedules import warmup_cosine
from gac.statistics import Statistics


@register("chord-mu", "chord")
class ChordMuLaw(Law):
    """mu rises linearly to ``peak`` and falls along a cosine to ``valley`` (CHORD, arXiv 2508.11408).

    Args:
        warmup, decay: steps up and down; defaults of Trinity-RFT's mix_chord example.
        peak, valley: highest and final mu.
    """

    def __init__(self, warmup: int = 0, decay: int = 200, peak: float = 0.9, valley: float = 0.05) -> None:
        self.arguments = (
            number("warmup", warmup, 0, 1e9),
            number("decay", decay, 0, 1e9),
            unit_interval("peak", peak),
            unit_interval("valley", valley),
        )
        super().__init__(start=warmup_cosine(0, *self.arguments))

    def update(self, statistics: Statistics | None, step: Step) -> Tensor:
        self.record("mu", warmup_cosine(step.number + 1, *self.arguments))  # the mu of the step to come
        return self.mu


@register("sequential")
class SequentialLaw(Law):
    """Supervised steps alone, then reinforcement alone.

    Args:
        split: number of supervised steps before the switch.
    """

    def __init__(self, split: int = 100) -> None:
        self.split = whole("split", split, 0)
        super().__init__(start=1.0 if self.split > 0 else 0.0)

    def update(self, statistics: Statistics | None, step: Step) -> Tensor:
        self.record("mu", 1.0 if step.number + 1 < self.split else 0.0)
        return self.mu

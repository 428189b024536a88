"""What tuning chooses, from its records: learning rates, settings, and the learning rate of every arm."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.study.measures import late_accuracy
from benchmarks.study.methods import METHODS

LEARNING_RATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3)
"""From too small to too large: no method is best at the last, and few at the first."""
TUNING_SEEDS = (100,)


class Tuning:
    """The runs of tuning on `tasks`, ranked by mean late accuracy; a run that broke counts 0.

    Args:
        records: of any phases.
        tasks: that tuning runs on.
        size: of the models; those of the larger sizes are in phase "rates".
    """

    def __init__(self, records: Iterable[dict[str, Any]], tasks: Sequence[str], size: str = "small") -> None:
        phases = ("tuning", "regimes-tuning") if size == "small" else ("rates",)
        self.cells = [(task, seed) for seed in TUNING_SEEDS for task in tasks]
        self._late: dict[tuple[str, str, float], dict[tuple[str, int], float]] = {}
        for record in records:
            if record["phase"] in phases and record["size"] == size:
                trial = (record["method"], record["setting"], record["lr"])
                late = late_accuracy(record)
                self._late.setdefault(trial, {})[record["task"], record["seed"]] = late if math.isfinite(late) else 0.0

    def score(self, method: str, setting: str, lr: float) -> float | None:
        """Mean over data sets and seeds; None while one is missing."""
        found = self._late.get((method, setting, lr), {})
        if any(cell not in found for cell in self.cells):
            return None
        return sum(found[cell] for cell in self.cells) / len(self.cells)

    def lr(self, method: str) -> float | None:
        """The best learning rate at the method's default; None while runs are missing."""
        scores = {lr: self.score(method, "", lr) for lr in LEARNING_RATES}
        return None if None in scores.values() else max(LEARNING_RATES, key=lambda lr: scores[lr])

    def setting(self, method: str) -> str | None:
        """The best setting at the chosen learning rate; "" for the default, None while missing."""
        lr = self.lr(method)
        settings = ("", *METHODS[method].trials)
        scores = {setting: None if lr is None else self.score(method, setting, lr) for setting in settings}
        return None if None in scores.values() else max(settings, key=lambda setting: scores[setting])

    def arm_lr(self, method: str, setting: str) -> float | None:
        """The learning rate that an arm runs at: where :meth:`climb` ends."""
        return self.climb(method, setting)[0]

    def climb(self, method: str, setting: str) -> tuple[float | None, list[float]]:
        """From the method's learning rate until no neighbour is better: where it ends, and the rates that it asks for.

        A rate chosen at the default may be poor at another setting. At the default itself every rate has run.
        """
        at = self.lr(method)
        if at is None or setting in ("", METHODS[method].default):
            return at, []
        return self.climb_from(at, method, setting)

    def climb_from(self, at: float, method: str, setting: str) -> tuple[float | None, list[float]]:
        """:meth:`climb` from any rate, for methods whose default has not run at every rate."""
        asked: list[float] = []
        while True:
            here = LEARNING_RATES.index(at)
            near = [at, *LEARNING_RATES[max(here - 1, 0) : here], *LEARNING_RATES[here + 1 : here + 2]]
            asked += [lr for lr in near if lr not in asked]
            scores = {lr: self.score(method, setting, lr) for lr in near}
            if None in scores.values():
                return None, asked
            best = max(near, key=lambda lr: scores[lr])  # the first of equals: where it stands
            if best == at:
                return at, asked
            at = best

    def descend(self, method: str, setting: str, lr: float) -> tuple[float | None, list[float]]:
        """From a smaller model's learning rate until the next lower one is no better: where it ends, and what it asks.

        None where a run of it is missing. Larger models do not ask for higher rates.
        """
        at, asked = lr, [lr]
        for lower in reversed(LEARNING_RATES[: LEARNING_RATES.index(lr)]):
            asked.append(lower)
            scores = [self.score(method, setting, rate) for rate in (at, lower)]
            if None in scores:
                return None, asked
            if scores[1] <= scores[0]:
                break
            at = lower
        return at, asked if len(asked) > 1 else []

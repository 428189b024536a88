"""How late accuracy depends on the learning rate, from the runs of tuning at a method's default setting."""

import dataclasses
import math
from collections.abc import Iterable

from benchmarks.study.measures import Run


@dataclasses.dataclass(frozen=True)
class Sensitivity:
    """How late accuracy of a method depends on the learning rate, over the tasks of tuning.

    Attributes:
        off_by_one: mean loss against the task's best learning rate at the neighbours of it on the grid.
        spread: mean distance from the best to the worst learning rate.
        tasks: number of tasks.
        means: mean over tasks by learning rate, of those that ran on every task.
    """

    off_by_one: float
    spread: float
    tasks: int
    means: dict[float, float]

    @property
    def at_end(self) -> bool:
        """Whether the best learning rate is the lowest or the highest of the grid."""
        best = max(self.means, key=lambda lr: self.means[lr])
        return best in (min(self.means), max(self.means))

    @property
    def peak(self) -> float:
        """Where a parabola in ``log(lr)`` through the best rate and the two next to it has its top.

        At an end of the grid through the last three. NaN where these have no top or fewer than three rates ran.
        """
        rates = sorted(self.means)
        if len(rates) < 3:
            return math.nan
        best = max(range(len(rates)), key=lambda i: self.means[rates[i]])
        first = min(max(best - 1, 0), len(rates) - 3)
        three = rates[first : first + 3]
        (x0, y0), (x1, y1), (x2, y2) = ((math.log(lr), self.means[lr]) for lr in three)
        left, right = (y1 - y0) / (x1 - x0), (y2 - y1) / (x2 - x1)
        if right >= left:
            return math.nan
        # the slope falls linearly, from `left` in the middle of the first gap to `right` in the middle of the second
        middle = (x0 + x1) / 2
        return math.exp(middle + left / (left - right) * (x2 - x0) / 2)


def lr_sensitivity(runs: Iterable[Run]) -> dict[str, Sensitivity]:
    """For each method, from tuning runs at its default setting: the setting "" or else the one with most rates.

    A task counts where at least three learning rates ran. The best is chosen and judged on the same runs, which makes
    losses look larger, for every method alike.
    """
    scores: dict[str, dict[str, dict[str, dict[float, list[float]]]]] = {}
    for run in runs:
        rates = scores.setdefault(run.method, {}).setdefault(run.setting, {}).setdefault(run.task, {})
        rates.setdefault(run.lr, []).append(run.measures.late)
    found = {}
    for method, settings in sorted(scores.items()):
        tasks = max(settings.items(), key=lambda item: (max(len(r) for r in item[1].values()), item[0] == ""))[1]
        curves = [{lr: sum(v) / len(v) for lr, v in sorted(rates.items())} for rates in tasks.values()]
        curves = [curve for curve in curves if len(curve) >= 3]
        if curves:
            found[method] = _sensitivity(curves)
    return found


def _sensitivity(curves: list[dict[float, float]]) -> Sensitivity:
    losses, spreads = [], []
    for curve in curves:
        means = list(curve.values())
        best = means.index(max(means))
        near = [means[i] for i in (best - 1, best + 1) if 0 <= i < len(means)]
        losses.append(means[best] - sum(near) / len(near))
        spreads.append(max(means) - min(means))
    shared = sorted(set.intersection(*(set(curve) for curve in curves)))
    return Sensitivity(
        sum(losses) / len(losses),
        sum(spreads) / len(spreads),
        len(curves),
        {lr: sum(curve[lr] for curve in curves) / len(curves) for lr in shared},
    )

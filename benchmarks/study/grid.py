"""The runs of the study, phase by phase; what tuning chooses follows from its records."""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.study.measures import late_accuracy
from benchmarks.study.methods import METHODS, VARIANTS
from benchmarks.study.tasks import TASKS

PHASES = ("tuning", "comparison", "ablation", "size", "confirmation")
LEARNING_RATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3)
"""From too small to too large: no method is best at the last, and few at the first."""
TUNING_SEEDS = (100,)
SEEDS = (1, 2, 3, 4, 5)
FEWER_SEEDS = SEEDS[:3]
"""Of ablations and sizes, which are questions of a second order."""
CONSTANTS = ("mu=0.1", "mu=0.3", "mu=0.5", "mu=0.7", "mu=0.9")
SPLITS = ("split=0", "split=50", "split=100", "split=150", "split=200")


class NotReady(ValueError):
    """A phase needs the records of an earlier one."""

    def __init__(self, phase: str, missing: int) -> None:
        super().__init__(f"phase {phase!r} needs {missing} more runs of the tuning phase; run that first")


@dataclasses.dataclass(frozen=True)
class Row:
    """One run."""

    phase: str
    task: str
    size: str
    method: str
    setting: str
    lr: float
    seed: int

    @property
    def key(self) -> str:
        """Names the run; the same in every session."""
        arm = f"{self.method}:{self.setting}" if self.setting else self.method
        return f"{self.phase}/{self.task}/{self.size}/{arm}/lr{self.lr:g}/seed{self.seed}"

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> "Row":
        """The run that a record tells of."""
        return cls(**{field.name: record[field.name] for field in dataclasses.fields(cls)})


def rows(phase: str, records: Sequence[dict[str, Any]]) -> list[Row]:
    """The runs of a phase as far as they are known, whether done or not.

    Tuning grows as its learning rates are decided: ask again until no run is left.

    Raises:
        ValueError: unknown phase.
        NotReady: tuning is not complete.
    """
    if phase not in PHASES:
        raise ValueError(f"unknown phase {phase!r}; known: {', '.join(PHASES)}")
    return _PHASES[phase](records)


def tasks(role: str) -> list[str]:
    """Names of the development or of the confirmation tasks."""
    return [task.name for task in TASKS.values() if task.role == role]


def chosen_lr(method: str, records: Iterable[dict[str, Any]]) -> float | None:
    """The learning rate of best mean late accuracy at the default setting; None while runs are missing."""
    scores = {lr: _score(method, "", lr, records) for lr in LEARNING_RATES}
    return None if None in scores.values() else max(LEARNING_RATES, key=lambda lr: scores[lr])


def chosen_setting(method: str, records: Iterable[dict[str, Any]]) -> str | None:
    """The setting of best mean late accuracy at the chosen learning rate; "" for the default, None while missing."""
    lr = chosen_lr(method, records)
    settings = ("", *METHODS[method].trials)
    scores = {setting: None if lr is None else _score(method, setting, lr, records) for setting in settings}
    return None if None in scores.values() else max(settings, key=lambda setting: scores[setting])


def _score(method: str, setting: str, lr: float, records: Iterable[dict[str, Any]]) -> float | None:
    """Mean over development tasks and tuning seeds; a run that broke counts 0."""
    wanted = {Row("tuning", task, "small", method, setting, lr, seed).key for task, seed in _tuning_cells()}
    found = {record["key"]: late_accuracy(record) for record in records if record["key"] in wanted}
    if len(found) < len(wanted):
        return None
    return sum(score if math.isfinite(score) else 0.0 for score in found.values()) / len(wanted)


def _tuning_cells() -> list[tuple[str, int]]:
    return [(task, seed) for seed in TUNING_SEEDS for task in tasks("development")]


def _tuning(records: Sequence[dict[str, Any]]) -> list[Row]:
    found = []
    for task, seed in _tuning_cells():
        for lr in LEARNING_RATES:
            found += [Row("tuning", task, "small", method, "", lr, seed) for method in METHODS]
    for method, spec in METHODS.items():
        lr = chosen_lr(method, records)
        if lr is not None:
            found += [
                Row("tuning", task, "small", method, setting, lr, seed)
                for setting in spec.trials
                for task, seed in _tuning_cells()
            ]
    return found


def _tuned(phase: str, records: Sequence[dict[str, Any]]) -> dict[str, tuple[str, float]]:
    """Setting and learning rate of every method, once tuning is complete."""
    done = {record["key"] for record in records}
    missing = [row for row in _tuning(records) if row.key not in done]
    if missing:
        raise NotReady(phase, len(missing))
    return {method: (chosen_setting(method, records), chosen_lr(method, records)) for method in METHODS}


def _arms(tuned: dict[str, tuple[str, float]]) -> list[tuple[str, str, float]]:
    """The arms of the main comparison: ``gac`` as it comes, constants, splits, and every other method as tuned."""
    arms = [("gac", "", tuned["gac"][1])]
    arms += [("fixed", setting, tuned["fixed"][1]) for setting in CONSTANTS]
    arms += [("sequential", setting, tuned["sequential"][1]) for setting in SPLITS]
    arms += [(method, *tuned[method]) for method in METHODS if method not in ("gac", "fixed", "sequential")]
    arms += [(method, *tuned[method]) for method in ("gac", "sequential")]
    return list(dict.fromkeys(arms))


def _product(phase: str, role: str, size: str, arms: Iterable[tuple[str, str, float]], seeds=SEEDS) -> list[Row]:
    """Seeds outermost, so that an interrupted grid has whole pairs."""
    return [Row(phase, task, size, *arm, seed) for seed in seeds for task in tasks(role) for arm in arms]


def _comparison(records: Sequence[dict[str, Any]]) -> list[Row]:
    return _product("comparison", "development", "small", _arms(_tuned("comparison", records)))


def _ablation(records: Sequence[dict[str, Any]]) -> list[Row]:
    lr = _tuned("ablation", records)["gac"][1]
    arms = [("gac", variant, lr) for variant in VARIANTS]
    return _product("ablation", "development", "small", arms, FEWER_SEEDS)


def _size(records: Sequence[dict[str, Any]]) -> list[Row]:
    tuned = _tuned("size", records)
    arms = [("gac", "", tuned["gac"][1]), ("paper", *tuned["paper"]), ("sequential", *tuned["sequential"])]
    arms += [("fixed", setting, tuned["fixed"][1]) for setting in ("mu=0.1", "mu=0.5", "mu=0.9")]
    return [row for size in ("medium", "large") for row in _product("size", "development", size, arms, FEWER_SEEDS)]


def _confirmation(records: Sequence[dict[str, Any]]) -> list[Row]:
    tuned = _tuned("confirmation", records)
    arms = [*_arms(tuned), ("gac", "coefficient", tuned["gac"][1])]
    return _product("confirmation", "confirmation", "small", arms)


_PHASES = {
    "tuning": _tuning,
    "comparison": _comparison,
    "ablation": _ablation,
    "size": _size,
    "confirmation": _confirmation,
}

"""The runs of the study, phase by phase; what tuning chooses follows from its records."""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.study.measures import late_accuracy
from benchmarks.study.methods import METHODS, PER_PROMPT, VARIANTS, with_every_prompt
from benchmarks.study.tasks import TASKS

PHASES = ("tuning", "comparison", "ablation", "size", "exposure", "confirmation")
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


def arm_lr(method: str, setting: str, records: Iterable[dict[str, Any]]) -> float | None:
    """The learning rate that an arm runs at; None while runs are missing.

    The method's own where the arm is its default, of which every rate ran; else the end of the climb that starts there.
    """
    return _climb(method, setting, records)[0]


def _climb(method: str, setting: str, records: Iterable[dict[str, Any]]) -> tuple[float | None, list[float]]:
    """Up from the method's learning rate until no neighbour is better: where it ends, and the rates that it asks for.

    A rate of the method may be poor at another setting: it was chosen at the default.
    """
    at = chosen_lr(method, records)
    if at is None or setting in ("", METHODS[method].default):
        return at, []
    asked: list[float] = []
    while True:
        here = LEARNING_RATES.index(at)
        near = [at, *LEARNING_RATES[max(here - 1, 0) : here], *LEARNING_RATES[here + 1 : here + 2]]
        asked += [lr for lr in near if lr not in asked]
        scores = {lr: _score(method, setting, lr, records) for lr in near}
        if None in scores.values():
            return None, asked
        best = max(near, key=lambda lr: scores[lr])  # the first of equals: where it stands
        if best == at:
            return at, asked
        at = best


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
    for method, setting in _settings(records):
        found += [
            Row("tuning", task, "small", method, setting, lr, seed)
            for lr in _climb(method, setting, records)[1]
            for task, seed in _tuning_cells()
        ]
    return list(dict.fromkeys(found))


def _settings(records: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """Method and setting of every arm of the comparison, as far as tuning has chosen them.

    ``gac`` as it comes, constants, splits, and every other method as tuned; ``gac`` and two stages as tuned besides.
    """
    chosen = {method: chosen_setting(method, records) for method in METHODS}
    arms = [("gac", "")]
    arms += [("fixed", setting) for setting in CONSTANTS]
    arms += [("sequential", setting) for setting in SPLITS]
    arms += [(method, chosen[method]) for method in METHODS if method not in ("gac", "fixed", "sequential")]
    arms += [(method, chosen[method]) for method in ("gac", "sequential")]
    return list(dict.fromkeys((method, setting) for method, setting in arms if setting is not None))


def _arms(phase: str, records: Sequence[dict[str, Any]]) -> dict[tuple[str, str], float]:
    """Learning rates of the arms of the comparison by method and setting, once tuning is complete."""
    done = {record["key"] for record in records}
    missing = [row for row in _tuning(records) if row.key not in done]
    if missing:
        raise NotReady(phase, len(missing))
    return {(method, setting): arm_lr(method, setting, records) for method, setting in _settings(records)}


def _product(
    phase: str, role: str, size: str, arms: Mapping[tuple[str, str], float], seeds: Sequence[int] = SEEDS
) -> list[Row]:
    """Seeds outermost, so that an interrupted grid has whole pairs."""
    return [
        Row(phase, task, size, *arm, lr, seed) for seed in seeds for task in tasks(role) for arm, lr in arms.items()
    ]


def _comparison(records: Sequence[dict[str, Any]]) -> list[Row]:
    return _product("comparison", "development", "small", _arms("comparison", records))


def _ablation(records: Sequence[dict[str, Any]]) -> list[Row]:
    lr = _arms("ablation", records)["gac", ""]
    return _product("ablation", "development", "small", {("gac", variant): lr for variant in VARIANTS}, FEWER_SEEDS)


def _size(records: Sequence[dict[str, Any]]) -> list[Row]:
    known = _arms("size", records)
    chosen = [("gac", ""), *((method, chosen_setting(method, records)) for method in ("paper", "sequential"))]
    chosen += [("fixed", setting) for setting in ("mu=0.1", "mu=0.5", "mu=0.9")]
    arms = {arm: known[arm] for arm in chosen}
    return [row for size in ("medium", "large") for row in _product("size", "development", size, arms, FEWER_SEEDS)]


def _exposure(records: Sequence[dict[str, Any]]) -> list[Row]:
    known = _arms("exposure", records)
    chosen = [("gac", ""), ("fixed", "mu=0.5"), *(arm for arm in known if arm[0] in PER_PROMPT)]
    arms = {(method, with_every_prompt(setting)): known[method, setting] for method, setting in chosen}
    return _product("exposure", "development", "small", arms, FEWER_SEEDS)


def _confirmation(records: Sequence[dict[str, Any]]) -> list[Row]:
    known = _arms("confirmation", records)
    arms = known | {("gac", "coefficient"): known["gac", ""]}
    return _product("confirmation", "confirmation", "small", arms)


_PHASES = {
    "tuning": _tuning,
    "comparison": _comparison,
    "ablation": _ablation,
    "size": _size,
    "exposure": _exposure,
    "confirmation": _confirmation,
}

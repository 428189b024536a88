"""The runs of the study, phase by phase; what tuning chooses follows from its records."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.study.methods import CANDIDATES, METHODS, PER_PROMPT, VARIANTS, WITHOUT_MOMENTUM, with_every_prompt
from benchmarks.study.regimes import CLEAN, CONFIRMATION, REGIMES, regime_of
from benchmarks.study.rows import Row
from benchmarks.study.tasks import TASKS
from benchmarks.study.tuning import LEARNING_RATES, Tuning

PHASES = ("tuning", "comparison", "ablation", "exposure", "confirmation", "rates", "size")
ON_DEMAND = ("regimes-tuning", "regimes", "regimes-confirmation")
"""Phases that run where they are named; their chapter of the report is :mod:`benchmarks.study.robustness`."""
TRIED = ("gac-reward", "aim-reward")
"""Candidates with trials of learning rates of their own: those that go to the confirmation tasks."""
SEEDS = (1, 2, 3, 4, 5)
FEWER_SEEDS = SEEDS[:3]
"""Of ablations and sizes, which are questions of a second order."""
LARGER = ("medium", "large")
"""Sizes beside "small"."""
CONSTANTS = ("mu=0.1", "mu=0.3", "mu=0.5", "mu=0.7", "mu=0.9")
SPLITS = ("split=0", "split=50", "split=100", "split=150", "split=200")


class NotReady(ValueError):
    """A phase needs the records of an earlier one."""

    def __init__(self, phase: str, missing: int, needed: str = "tuning") -> None:
        super().__init__(f"phase {phase!r} needs {missing} more runs of the {needed} phase; run that first")


def rows(phase: str, records: Sequence[dict[str, Any]]) -> list[Row]:
    """The runs of a phase as far as they are known, whether done or not.

    Phases "tuning" and "rates" grow as learning rates are decided: ask again until no run is left.

    Raises:
        ValueError: unknown phase.
        NotReady: tuning is not complete.
    """
    if phase not in _PHASES:
        raise ValueError(f"unknown phase {phase!r}; known: {', '.join(_PHASES)}")
    return _PHASES[phase](records)


def tasks(role: str) -> list[str]:
    """Names of the development or of the confirmation tasks."""
    return [task.name for task in TASKS.values() if task.role == role]


def _tuning(records: Sequence[dict[str, Any]]) -> list[Row]:
    found, tuning = [], Tuning(records, tasks("development"))

    def add(method: str, setting: str, lr: float) -> None:
        found.extend(Row("tuning", task, "small", method, setting, lr, seed) for task, seed in tuning.cells)

    for lr in LEARNING_RATES:
        for method in METHODS:
            add(method, "", lr)
    for method, spec in METHODS.items():
        lr = tuning.lr(method)
        for setting in spec.trials if lr is not None else ():
            add(method, setting, lr)
    for method, setting in _settings(tuning):
        for lr in tuning.climb(method, setting)[1]:
            add(method, setting, lr)
    return list(dict.fromkeys(found))


def _settings(tuning: Tuning) -> list[tuple[str, str]]:
    """Method and setting of every arm of the comparison, as far as tuning has chosen them.

    ``gac`` as it comes, constants, splits, and every other method as tuned; ``gac`` and two stages as tuned besides.
    """
    chosen = {method: tuning.setting(method) for method in METHODS}
    arms = [("gac", ""), ("gac", WITHOUT_MOMENTUM)]
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
    tuning = Tuning(records, tasks("development"))
    return {arm: tuning.arm_lr(*arm) for arm in _settings(tuning)}


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


def _sized_arms(phase: str, records: Sequence[dict[str, Any]]) -> dict[tuple[str, str], float]:
    """The arms that run at every size, with their learning rates at the smallest."""
    known = _arms(phase, records)
    tuning = Tuning(records, tasks("development"))
    chosen = [("gac", ""), *((method, tuning.setting(method)) for method in ("paper", "sequential"))]
    chosen += [("fixed", setting) for setting in ("mu=0.1", "mu=0.5", "mu=0.9")]
    return {arm: known[arm] for arm in chosen}


def _rates(records: Sequence[dict[str, Any]]) -> list[Row]:
    found = []
    for size in LARGER:
        tuning = Tuning(records, tasks("development"), size)
        for arm, small in _sized_arms("rates", records).items():
            for lr in tuning.descend(*arm, small)[1]:
                found += [Row("rates", task, size, *arm, lr, seed) for task, seed in tuning.cells]
    return found


def _size(records: Sequence[dict[str, Any]]) -> list[Row]:
    done = {record["key"] for record in records}
    missing = [row for row in _rates(records) if row.key not in done]
    if missing:
        raise NotReady("size", len(missing), "rates")
    found = []
    for size in LARGER:
        tuning = Tuning(records, tasks("development"), size)
        arms = {arm: tuning.descend(*arm, small)[0] for arm, small in _sized_arms("size", records).items()}
        found += _product("size", "development", size, arms, FEWER_SEEDS)
    return found


def _exposure(records: Sequence[dict[str, Any]]) -> list[Row]:
    """Everything on development data; on confirmation data what the law was changed for."""
    known = _arms("exposure", records)
    changed = [("gac", ""), ("gac", WITHOUT_MOMENTUM), ("fixed", "mu=0.5")]
    chosen = [*changed, *(arm for arm in known if arm[0] in PER_PROMPT)]
    arms = lambda some: {(method, with_every_prompt(setting)): known[method, setting] for method, setting in some}
    return [
        *_product("exposure", "development", "small", arms(chosen), FEWER_SEEDS),
        *_product("exposure", "confirmation", "small", arms(changed)),
    ]


def _confirmation(records: Sequence[dict[str, Any]]) -> list[Row]:
    known = _arms("confirmation", records)
    arms = known | {("gac", "coefficient"): known["gac", ""]}
    return _product("confirmation", "confirmation", "small", arms)


def _candidates(records: Sequence[dict[str, Any]]) -> dict[str, tuple[float | None, list[float]]]:
    """Where the learning rate of each candidate climbs to from that of ``gac``, and the rates that it asks for."""
    start = _arms("regimes-tuning", records)["gac", ""]
    tuning = Tuning(records, tasks("development"))
    return {name: tuning.climb_from(start, name, "") for name in TRIED}


def _regimes_tuning(records: Sequence[dict[str, Any]]) -> list[Row]:
    cells = Tuning(records, tasks("development")).cells
    return [
        Row("regimes-tuning", task, "small", name, "", lr, seed)
        for name, (_, asked) in _candidates(records).items()
        for lr in asked
        for task, seed in cells
    ]


def _regimes(phase: str, role: str, records: Sequence[dict[str, Any]]) -> list[Row]:
    """Constants, RL and SFT alone, laws and rules that set mu, and candidates, in every regime.

    Candidates of :data:`TRIED` run at the rate that their trials found, the others at that of ``gac``.

    Rules that act per prompt are left out where demonstrations turn: theirs belong to prompts, and are not turned.
    """
    known = _arms(phase, records)
    left_out = {("gac", WITHOUT_MOMENTUM), *(("sequential", split) for split in SPLITS[1:-1])}
    chosen = {arm: lr for arm, lr in known.items() if arm not in left_out}
    own = {name: lr for name, (lr, _) in _candidates(records).items() if lr is not None}
    chosen |= {("gac", "alpha=0"): known["gac", ""]}
    chosen |= {(name, ""): own.get(name, known["gac", ""]) for name in CANDIDATES}
    names = REGIMES if role == "development" else (CLEAN, *CONFIRMATION)
    return [
        dataclasses.replace(row, regime=name)
        for name in names
        for row in _product(phase, role, "small", chosen, FEWER_SEEDS if role == "development" else SEEDS)
        if row.method not in PER_PROMPT or not regime_of(name).turns
    ]


_PHASES = {
    "tuning": _tuning,
    "comparison": _comparison,
    "ablation": _ablation,
    "exposure": _exposure,
    "confirmation": _confirmation,
    "rates": _rates,
    "size": _size,
    "regimes-tuning": _regimes_tuning,
    "regimes": functools.partial(_regimes, "regimes", "development"),
    "regimes-confirmation": functools.partial(_regimes, "regimes-confirmation", "confirmation"),
}

"""Which runs stand against which: names of arms, pairs over (task, seed), constants found by search."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from benchmarks.study.inference import Comparison, compare
from benchmarks.study.measures import Run
from benchmarks.study.methods import STEPS, WITHOUT_MOMENTUM, own_setting

REFERENCE = "gac"
BEFORE = f"gac:{WITHOUT_MOMENTUM}"
"""The default law as it was when the development runs judged it first."""
RL_ALONE, SFT_ALONE = "sequential:split=0", f"sequential:split={STEPS}"
SEARCHED = ("fixed", "sequential")
"""Methods whose constant is nothing but a knob: a user has to search for it."""

FOUND = (":search", ":carried", ":hindsight")
"""Ends of the names of arms that search makes of others."""

Pairs = dict[tuple[str, int], Run]

_ESTIMATORS = ("sketch", "temporal", "coefficient")
_ABLATIONS = {
    "no-average",
    "with-prior",
    "no-cap",
    "no-disagreement",
    "no-noise",
    "no-variance",
    "direction",
    "optimizer-metric",
    "half_life=7",
    "half_life=69",
    "alpha=kl",
    WITHOUT_MOMENTUM,
}
_LABELS = {
    "gac": "gac (default)",
    BEFORE: "gac without momentum",
    "gac-sketch": "gac sketch",
    "gac-temporal": "gac temporal",
    "gac-coefficient": "gac in coefficient space",
    "fixed:search": "constant by search",
    "fixed:carried": "constant from earlier runs",
    "fixed:hindsight": "constant in hindsight",
    "sequential:search": "SFT then RL by search",
    "sequential:carried": "SFT then RL from earlier runs",
    "sequential:hindsight": "SFT then RL in hindsight",
    RL_ALONE: "RL alone",
    SFT_ALONE: "SFT alone",
    "gac-reward": "gac, weights by reward",
    "aim-reward": "aim, weights by reward",
    "gac-source": "gac, weights by source",
    "paper": "paper's controller",
    "fixed": "constant",
    "sequential": "SFT then RL",
}


def arm(record: Mapping[str, Any] | Run) -> str:
    """Name of the arm of a record: ``gac``, ``fixed:mu=0.3``, ``gac-sketch``, ``hpt:gate=2``.

    The forms of ``gac`` are its estimators (``gac-...``) and its ablations (``gac:...``); the exact estimator is
    the default.
    """
    if isinstance(record, Run):
        record = record.record
    method, setting = _identity(record)
    if method in SEARCHED and not setting:  # a default has a name among the settings that are searched
        setting = str(record.get("law", "")).partition(":")[2]
    if method == REFERENCE and setting in ("", "exact"):
        return REFERENCE
    if method == REFERENCE and setting in _ESTIMATORS:
        return f"gac-{setting}"
    return f"{method}:{setting}" if setting else method


def label(name: str) -> str:
    """An arm's name as readers see it."""
    if name in _LABELS:
        return _LABELS[name]
    method, _, setting = name.partition(":")
    if method == "fixed" and setting.startswith("mu="):
        return f"constant {setting[3:]}"
    if method == "sequential" and setting.startswith("split="):
        return f"SFT {setting[6:]} then RL"
    if method == REFERENCE:
        return f"gac {setting}" if setting in _ABLATIONS else f"gac tuned: {setting}"
    return name.replace(":", " ")


def is_form_of_gac(name: str) -> bool:
    """Whether an arm is an estimator or an ablation of ``gac``, or ``gac`` itself."""
    return name.partition(":")[0].partition("-")[0] == REFERENCE


def value(name: str) -> float | None:
    """The number at the end of a searched arm's name: 0.3 of ``fixed:mu=0.3``."""
    head, _, number = name.partition("=")
    return float(number) if head in ("fixed:mu", "sequential:split") else None


def by_arm(runs: Iterable[Run]) -> dict[str, Pairs]:
    """Arms with their runs by (task, seed), ``gac`` first, then in the order of names.

    A setting that has two names ("" and the default's own) counts once.

    Raises:
        ValueError: the same run twice, one arm with two learning rates on a task and seed, or several sizes.
    """
    found: dict[str, Pairs] = {}
    sizes = set()
    for run in runs:
        pairs = found.setdefault(arm(run), {})
        other = pairs.setdefault((run.task, run.seed), run)
        sizes.add(run.size)
        if len(sizes) > 1:
            raise ValueError(f"runs of one comparison must share the size, got {sorted(sizes)}")
        if other is not run and (other.setting == run.setting or other.lr != run.lr):
            raise ValueError(f"two runs of arm {arm(run)!r} on one task and seed: {other.key} and {run.key}")
    return dict(sorted(found.items(), key=lambda item: (item[0] != REFERENCE, _order(item[0]))))


def with_searches(arms: Mapping[str, Pairs], earlier: Iterable[Run] = ()) -> dict[str, Pairs]:
    """The arms and, for each method of :data:`SEARCHED` with two settings or more, what search makes of them.

    ``METHOD:search``: in each task and for each seed the setting that did best on the task's other seeds.
    ``METHOD:carried``: one setting for all tasks, the best on the runs of `earlier`, none of which is in `arms`.
    ``METHOD:hindsight``: in each task the setting that did best on all seeds, chosen and judged on the same runs. No
    user can have it; it bounds what any constant could reach from above.
    """
    found = dict(arms)
    earlier = list(earlier)
    for method in SEARCHED:
        options = {name: pairs for name, pairs in arms.items() if name.startswith(f"{method}:")}
        if len(options) < 2:
            continue
        found[f"{method}:search"] = left_out(options)
        found[f"{method}:hindsight"] = {cell: options[name][cell] for cell, name in _hindsight(options).items()}
        name = best_setting([run for run in earlier if run.method == method], options)
        if name:
            found[f"{method}:carried"] = options[name]
    return {name: pairs for name, pairs in found.items() if pairs}


def left_out(options: Mapping[str, Pairs]) -> Pairs:
    """For each (task, seed) the run of the option with the best mean late accuracy on the task's other seeds.

    Only cells where every option has a run count, so that half a grid does not favour an option. Ties go to the first.
    """
    chosen = {}
    for task, seeds in _whole_cells(options).items():
        for seed in seeds:
            others = [other for other in seeds if other != seed]
            if others:
                best = max(options, key=lambda name: sum(options[name][task, s].measures.late for s in others))
                chosen[task, seed] = options[best][task, seed]
    return chosen


def hindsight(options: Mapping[str, Pairs]) -> dict[str, str]:
    """For each task the option with the best mean late accuracy over all seeds that every option has."""
    return {
        task: max(options, key=lambda name: sum(options[name][task, s].measures.late for s in seeds))
        for task, seeds in _whole_cells(options).items()
    }


def best_setting(runs: Sequence[Run], options: Iterable[str]) -> str | None:
    """The option with the best mean over tasks of late accuracy among `runs`; None where fewer than two are there.

    Only (task, seed) cells that all options with runs share count; of several learning rates the best one does.
    """
    scores: dict[tuple[str, float], dict[tuple[str, int], float]] = {}
    for run in runs:
        if arm(run) in set(options):
            scores.setdefault((arm(run), run.lr), {})[run.task, run.seed] = run.measures.late
    if len({name for name, _ in scores}) < 2:
        return None
    shared = set.intersection(*(set(cells) for cells in scores.values()))
    if not shared:
        return None
    best = max(sorted(scores), key=lambda key: sum(scores[key][cell] for cell in shared))
    return best[0]


def paired(
    reference: Pairs, other: Pairs, measure: Callable[[Run], float | None] = lambda run: run.measures.late
) -> dict[str, list[float]]:
    """Reference minus other for each task, over the seeds that both have and where the measure exists."""
    found: dict[str, list[float]] = {}
    for cell in sorted(set(reference) & set(other)):
        a, b = measure(reference[cell]), measure(other[cell])
        if a is not None and b is not None:
            found.setdefault(cell[0], []).append(a - b)
    return found


def against(
    arms: Mapping[str, Pairs],
    reference: str = REFERENCE,
    measure: Callable[[Run], float | None] = lambda run: run.measures.late,
) -> dict[str, Comparison]:
    """Reference minus every other arm, where there is a pair."""
    found = {}
    for name, pairs in arms.items():
        if name != reference and reference in arms:
            differences = paired(arms[reference], pairs, measure)
            if differences:
                found[name] = compare(differences)
    return found


def mean_over_tasks(pairs: Pairs, measure: Callable[[Run], float | None]) -> float | None:
    """The mean over tasks of the mean over seeds, of what was measured; None where nothing was."""
    tasks: dict[str, list[float]] = {}
    for (task, _), run in pairs.items():
        number = measure(run)
        if number is not None:
            tasks.setdefault(task, []).append(number)
    return sum(sum(values) / len(values) for values in tasks.values()) / len(tasks) if tasks else None


def _identity(record: Mapping[str, Any]) -> tuple[str, str]:
    try:
        return record["method"], own_setting(record["setting"])
    except KeyError as missing:
        raise ValueError(f"record {record.get('key', 'without a key')} has no {missing}; run it again") from None


def _order(name: str) -> tuple[str, float, str]:
    number = value(name)
    return name.partition(":")[0], -1.0 if number is None else number, name


def _whole_cells(options: Mapping[str, Pairs]) -> dict[str, list[int]]:
    """Tasks with the seeds that every option has."""
    found: dict[str, list[int]] = {}
    for task, seed in sorted(set.intersection(*(set(pairs) for pairs in options.values()))):
        found.setdefault(task, []).append(seed)
    return found


def _hindsight(options: Mapping[str, Pairs]) -> dict[tuple[str, int], str]:
    best = hindsight(options)
    return {(task, seed): best[task] for task, seeds in _whole_cells(options).items() for seed in seeds}

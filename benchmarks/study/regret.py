"""Regret: what an arm loses to the best constant in hindsight, regime by regime.

In each regime and task the best constant is the one with the best mean late accuracy over the seeds, chosen and judged
on the same runs. That favours the constants: among near ties it is the luckiest, so that regrets are too high rather
than too low, and that of the best constant itself is 0.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.study.arms import arm, label
from benchmarks.study.inference import LEVEL, interval
from benchmarks.study.measures import late_accuracy
from benchmarks.study.methods import CANDIDATES
from benchmarks.study.regimes import CLEAN, REGIMES

CONSTANT = "fixed:mu="

SAME = {"regimes": "comparison", "regimes-confirmation": "confirmation"}
"""Phases whose runs are those of the clean regime."""

LABELLED = {"sources": "wrong-50"}
"""Regimes that differ from another by the label of each demonstration alone."""

Cells = dict[tuple[str, str, int], float]
"""Late accuracy by regime, task and seed."""


@dataclasses.dataclass(frozen=True)
class Regret:
    """Of one arm, in points of accuracy; positive where the best constant was better.

    Attributes:
        by_regime: ``(mean, low, high)`` over tasks, each with the same weight, as :func:`inference.interval` has it.
        mean: the same of the mean over regimes.
        worst: the largest mean of a regime, with bounds that hold whichever regime is the worst.
        where: that regime.
    """

    by_regime: Mapping[str, tuple[float, float, float]]
    mean: tuple[float, float, float]
    worst: tuple[float, float, float]
    where: str


def regrets(records: Iterable[Mapping[str, Any]]) -> dict[str, Regret]:
    """Regret of every arm, constants included, over the cells (regime, task, seed) that all arms have run on.

    Pairs are of one regime, task and seed. Of the mean over regimes a pair is the mean over regimes of one task and
    seed, as these share data and warm start. The bounds of the worst case are the largest of all regimes' lower and of
    their upper bounds at the level ``1 - 0.05/R``: with that probability or more all ``R`` means lie within theirs
    (Bonferroni), and then the largest mean lies between the largest bounds.

    Raises:
        ValueError: no constants or no shared cells, one arm twice in a cell, or several sizes.
    """
    arms = cells_by_arm(records)
    constants = [name for name in arms if name.startswith(CONSTANT)]
    if len(constants) < 2:
        raise ValueError(f"regret needs runs of two constants or more, got {', '.join(constants) or 'none'}")
    shared = shared_cells(arms)
    if not shared:
        raise ValueError("regret needs a regime, task and seed that every arm has run on; there is none yet")
    best = _best({name: arms[name] for name in constants}, shared)
    return {name: _regret(cells, best, shared) for name, cells in arms.items()}


def shared_cells(arms: Mapping[str, Cells]) -> set[tuple[str, str, int]]:
    """Those that every arm has run in."""
    return set.intersection(*(set(cells) for cells in arms.values()))


def cells_by_arm(records: Iterable[Mapping[str, Any]]) -> dict[str, Cells]:
    """Late accuracy of each arm; 0 of a run that broke. Raises ValueError as :func:`regrets` does."""
    found: dict[str, Cells] = {}
    sizes = set()
    for record in records:
        cells = found.setdefault(arm(record), {})
        cell = record.get("regime", CLEAN), record["task"], record["seed"]
        if cell in cells:
            raise ValueError(f"two runs of arm {arm(record)!r} in one regime, task and seed: {record['key']}")
        late = late_accuracy(record)
        cells[cell] = late if math.isfinite(late) else 0.0
        sizes.add(record["size"])
    if len(sizes) > 1:
        raise ValueError(f"runs of one regret must share the size, got {sorted(sizes)}")
    return found


def _seeds(shared: Iterable[tuple[str, str, int]]) -> dict[tuple[str, str], list[int]]:
    """Seeds by regime and task."""
    found: dict[tuple[str, str], list[int]] = {}
    for regime, task, seed in sorted(shared):
        found.setdefault((regime, task), []).append(seed)
    return found


def _best(constants: Mapping[str, Cells], shared: set[tuple[str, str, int]]) -> Cells:
    """Late accuracy of each cell under the best constant of its regime and task; the first of equals."""
    best: Cells = {}
    for place, seeds in _seeds(shared).items():
        here = {name: {(*place, seed): cells[(*place, seed)] for seed in seeds} for name, cells in constants.items()}
        best |= max((here[name] for name in sorted(here)), key=lambda cells: sum(cells.values()))
    return best


def _regret(cells: Cells, best: Cells, shared: set[tuple[str, str, int]]) -> Regret:
    lost = {cell: 100 * (best[cell] - cells[cell]) for cell in shared}
    groups: dict[str, list[np.ndarray]] = {}
    for (regime, task), seeds in _seeds(shared).items():
        groups.setdefault(regime, []).append(np.array([lost[regime, task, seed] for seed in seeds]))
    pairs: dict[tuple[str, int], list[float]] = {}
    for _, task, seed in sorted(shared):
        pairs.setdefault((task, seed), [])
    for (_, task, seed), value in sorted(lost.items()):
        pairs[task, seed].append(value)
    whole = {pair: values for pair, values in pairs.items() if len(values) == len(groups)}
    means = [
        np.array([np.mean(values) for (its, _), values in whole.items() if its == task])
        for task in sorted({task for task, _ in whole})
    ]
    by_regime = {regime: interval(parts) for regime, parts in groups.items()}
    together = {regime: interval(parts, 1 - (1 - LEVEL) / len(groups)) for regime, parts in groups.items()}
    where = max(by_regime, key=lambda regime: by_regime[regime][0])
    bounds = [_largest([bound[k] for bound in together.values()]) for k in (1, 2)]
    return Regret(
        by_regime=by_regime,
        mean=interval(means) if means else (math.nan,) * 3,
        worst=(by_regime[where][0], *bounds),
        where=where,
    )


def _largest(bounds: Sequence[float]) -> float:
    """NaN where any is unknown: it might be the largest."""
    return math.nan if any(math.isnan(bound) for bound in bounds) else max(bounds)


def of_phase(records: Iterable[Mapping[str, Any]], phase: str) -> list[Mapping[str, Any]]:
    """The runs of a phase of regimes, and of its clean regime those that another phase has made already.

    Such a run is taken for an arm and learning rate that the phase has in the same task, where it has no clean run of
    them itself with the same seed. What an arm that does not read labels has done in a regime counts in that of
    :data:`LABELLED` too, where an arm that reads them has run in it.
    """
    records = list(records)
    own = [record for record in records if record["phase"] == phase]
    cell = lambda record: (arm(record), record["task"], record["lr"], record["size"])
    arms = set(map(cell, own))
    clean = {(cell(record), record["seed"]) for record in own if record.get("regime", CLEAN) == CLEAN}
    others = (record for record in records if record["phase"] == SAME[phase] and cell(record) in arms)
    return _labelled(own + [record for record in others if (cell(record), record["seed"]) not in clean])


def _labelled(records: list[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    place = lambda record: (record.get("regime", CLEAN), record["task"], record["seed"])
    there = {place(record) for record in records}
    own = {(arm(record), place(record)) for record in records}
    found, readers = list(records), {name for name, one in CANDIDATES.items() if one.sft_weights == "source"}
    for regime, other in LABELLED.items():
        for record in records:
            now = regime, record["task"], record["seed"]
            if record.get("regime") != other or record["method"] in readers:
                continue
            if now in there and (arm(record), now) not in own:
                found.append({**record, "regime": regime})
    return found


def by_task(records: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, list[tuple[str, float]]]]:
    """Points that each arm loses in each regime, by task, means over seeds; the least worst case first.

    Raises ValueError as :func:`regrets` does.
    """
    records = list(records)
    found, arms = regrets(records), cells_by_arm(records)
    shared = shared_cells(arms)
    best = _best({name: cells for name, cells in arms.items() if name.startswith(CONSTANT)}, shared)
    result: dict[str, dict[str, list[tuple[str, float]]]] = {}
    for name in sorted(found, key=lambda name: (found[name].worst[0], name)):
        rows = result.setdefault(name, {})
        for (regime, task), seeds in sorted(_seeds(shared).items(), key=lambda item: _place(item[0])):
            lost = [100 * (best[regime, task, seed] - arms[name][regime, task, seed]) for seed in seeds]
            rows.setdefault(regime, []).append((task, sum(lost) / len(lost)))
    return result


def _place(cell: tuple[str, str]) -> tuple[int, str]:
    """Regimes in the order of :data:`REGIMES`."""
    return list(REGIMES).index(cell[0]), cell[1]


def picture(records: Iterable[Mapping[str, Any]], path: Path) -> None:
    """Draws :func:`by_task`."""
    from benchmarks.study import figures

    path.parent.mkdir(parents=True, exist_ok=True)
    figures.regrets({label(name): found for name, found in by_task(records).items()}, path)


def text(records: Iterable[Mapping[str, Any]]) -> str:
    """A table in Markdown: an arm a line, the least worst case first."""
    found = regrets(records)
    present = {regime for one in found.values() for regime in one.by_regime}
    regimes = [name for name in REGIMES if name in present]
    header = ["arm", "worst case", "in", "mean", *regimes]
    lines = ["| " + " | ".join(header) + " |", "| --- | ---: | --- |" + " ---: |" * (1 + len(regimes))]
    for name, one in sorted(found.items(), key=lambda item: (item[1].worst[0], item[0])):
        cells = [label(name), _shown(one.worst), one.where, _shown(one.mean)]
        cells += [_shown(one.by_regime[regime]) for regime in regimes]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _shown(value: tuple[float, float, float]) -> str:
    mean, low, high = value
    return f"{mean:.1f}" + ("" if math.isnan(low) else f" [{low:.1f}, {high:.1f}]")

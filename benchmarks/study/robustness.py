"""The report's chapter on regimes: what a wrong, scarce or plentiful teacher costs each arm."""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.study import grid
from benchmarks.study.arms import REFERENCE, arm, label
from benchmarks.study.inference import Comparison, compare
from benchmarks.study.methods import CANDIDATES
from benchmarks.study.regimes import CLEAN
from benchmarks.study.regret import (
    CONSTANT,
    LABELLED,
    Regret,
    by_task,
    cells_by_arm,
    of_phase,
    picture,
    regrets,
    shared_cells,
    text,
)
from benchmarks.study.wording import count, difference, equals, listing

Records = list[Mapping[str, Any]]

PICTURE = "regret.png"
"""Among the images of the page; docs/laws.md shows it, too."""

HALVES = {"regimes": "development", "regimes-confirmation": "confirmation"}


def runs(records: Iterable[Mapping[str, Any]], phase: str) -> Records:
    """What counts in a phase of regimes: as :func:`regret.of_phase`, each arm at the rate that the grid has for it.

    Raises NotReady where tuning is not complete.
    """
    records = list(records)
    rates = {arm(row.fields): row.lr for row in grid.rows(phase, records)}
    return [record for record in of_phase(records, phase) if record["lr"] == rates.get(arm(record), record["lr"])]


def everywhere(records: Records) -> Records:
    """The runs of arms that have run wherever the default law has; regimes that only add labels are left out."""
    records = [record for record in records if record.get("regime") not in LABELLED]
    places: dict[str, set[tuple[str, str]]] = {}
    for record in records:
        places.setdefault(arm(record), set()).add((record.get("regime", CLEAN), record["task"]))
    wanted = places.get(REFERENCE, set())
    return [record for record in records if wanted <= places[arm(record)]]


def chapter(records: Sequence[Mapping[str, Any]]) -> str:
    """Tables and sentences of both halves; empty where no regime has run for two constants and the default law."""
    try:
        halves = {phase: everywhere(runs(records, phase)) for phase in HALVES}
    except grid.NotReady:
        return ""
    halves = {phase: found for phase, found in halves.items() if _enough(found)}
    if "regimes" not in halves:
        return ""
    judged = _judged(regrets(halves["regimes"]))
    parts = [
        "Points of late accuracy that an arm loses to the best constant of the grid in hindsight, by regime, means "
        "over data sets; negative where it beats every constant. Arms are those that have run wherever the default law "
        "has. [What the regimes are](laws.md#regimes-in-training)."
    ]
    for phase, found in halves.items():
        parts += [_half(HALVES[phase], found, judged), text(found)]
        if phase == "regimes":
            parts.append(f"![Points lost to the best constant, by regime and data set](images/{PICTURE})")
    return "\n\n".join(parts)


def draw(records: Sequence[Mapping[str, Any]], images: Path) -> None:
    """The picture of the development half. Raises as :func:`runs` and :func:`regret.picture` do."""
    picture(everywhere(runs(records, "regimes")), images / PICTURE)


def _enough(records: Records) -> bool:
    names = {arm(record) for record in records}
    return REFERENCE in names and sum(name.startswith(CONSTANT) for name in names) >= 2


def _judged(found: Mapping[str, Regret]) -> str | None:
    """The candidate with the smallest worst case on development data: the one that confirmation is about."""
    return min((name for name in found if name in CANDIDATES), key=lambda name: found[name].worst[0], default=None)


def _half(half: str, records: Records, judged: str | None) -> str:
    found = regrets(records)
    seeds = {seed for _, _, seed in shared_cells(cells_by_arm(records))}
    number = count(len(seeds), "seed")
    lines = [f"On {half} data, {number}" + ("" if len(seeds) > 1 else ", and so without intervals") + ":"]
    constant = min((name for name in found if name.startswith(CONSTANT)), key=lambda name: found[name].worst[0])
    if judged in found:
        one, law = found[judged], found[REFERENCE]
        lines.append(
            f"{label(judged)} loses {one.mean[0]:.1f} points on average and {one.worst[0]:.1f} at worst ({one.where}), "
            f"the default law {law.mean[0]:.1f} and {law.worst[0]:.1f} ({law.where}), {label(constant)}, at worst the "
            f"best of the constants, {found[constant].mean[0]:.1f} and {found[constant].worst[0]:.1f} "
            f"({found[constant].where})."
        )
    for name in (name for name in found if name in CANDIDATES):
        over = against(records, name, REFERENCE)
        p = "" if math.isnan(over.low) else f", p {equals(over.p)}"
        lines.append(
            f"{label(name)} minus the default law, over {count(over.pairs, 'pair')} of a data set and a seed: "
            f"{difference(over)} points{p}."
        )
    half_wrong = {name: rows.get("wrong-50", []) for name, rows in by_task(records).items() if name in CANDIDATES}
    beaten = [
        f"{label(name)} {sum(lost < 0 for _, lost in rows)} of {len(rows)}" for name, rows in half_wrong.items() if rows
    ]
    if beaten:
        lines.append(
            f"Data sets with half of the demonstrations wrong in which it beats every constant: {listing(beaten)}."
        )
    return " ".join(lines)


def against(records: Records, one: str, other: str) -> Comparison:
    """One arm minus another, over the data sets and seeds in which both have run in all regimes that they share.

    A pair is the mean over regimes of one data set and seed, which share data.
    """
    arms = cells_by_arm(records)
    pairs: dict[tuple[str, int], list[float]] = {}
    for cell in sorted(arms[one].keys() & arms[other].keys()):
        pairs.setdefault(cell[1:], []).append(arms[one][cell] - arms[other][cell])
    whole = max(map(len, pairs.values()), default=0)
    by_data_set: dict[str, list[float]] = {}
    for (task, _), values in pairs.items():
        if len(values) == whole:
            by_data_set.setdefault(task, []).append(sum(values) / len(values))
    return compare(by_data_set)

"""The comparisons of the study, phase by phase, from checked runs."""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.study.arms import (
    BEFORE,
    FOUND,
    REFERENCE,
    Pairs,
    against,
    arm,
    by_arm,
    hindsight,
    is_form_of_gac,
    paired,
    with_searches,
)
from benchmarks.study.grid import ON_DEMAND, PHASES
from benchmarks.study.inference import Comparison, compare, holm
from benchmarks.study.measures import Run, read_run
from benchmarks.study.methods import PER_PROMPT

SIZES = ("small", "medium", "large")
ALPHA = 0.05


@dataclasses.dataclass(frozen=True)
class Family:
    """Arms of one phase, and ``gac`` minus each of them in late accuracy.

    Attributes:
        arms: every arm with its runs, searches included.
        versus: `gac` minus the arm. Arms without a pair are not there.
        adjusted: p after Holm's correction over the family. Arms that a search finds in the family itself are in
            none; one that is carried over from other data has the p of the setting that it is.
        left_out: number of runs on a (task, seed) that some arm has not run on.
    """

    arms: Mapping[str, Pairs]
    versus: Mapping[str, Comparison]
    adjusted: Mapping[str, float]
    left_out: int = 0

    def verdict(self, name: str) -> str:
        """``better``, ``worse`` or ``open`` for `gac` against the arm.

        ``missing`` without an interval, ``untested`` for what is found by search.
        """
        found = self.versus.get(name)
        if found is None or math.isnan(found.low):
            return "missing"
        if name not in self.adjusted:
            return "untested"
        if self.adjusted[name] >= ALPHA or found.mean == 0:
            return "open"
        return "better" if found.mean > 0 else "worse"

    def told_apart(self) -> list[str]:
        """Arms with a corrected p below the level."""
        return [name for name in self.versus if self.verdict(name) in ("better", "worse")]

    def tasks(self) -> list[str]:
        """Tasks that `gac` ran on."""
        return sorted({task for task, _ in self.arms.get(REFERENCE, {})})

    def options(self, method: str) -> dict[str, Pairs]:
        """Single settings of a method: ``fixed:mu=0.1`` and so on."""
        return {name: pairs for name, pairs in self.arms.items() if name.startswith(f"{method}:") and "=" in name}

    def rules(self) -> list[str]:
        """Arms that are neither a form of `gac`, nor a constant, nor two stages."""
        return [n for n in self.versus if not is_form_of_gac(n) and n.partition(":")[0] not in ("fixed", "sequential")]

    def controllers(self) -> list[str]:
        """Rules that set one mu a step, or the weight of demonstrations that are always there."""
        return [name for name in self.rules() if name.partition(":")[0] not in PER_PROMPT]

    def per_prompt(self) -> list[str]:
        """Rules that take demonstrations from the prompts that a step happens to draw."""
        return [name for name in self.rules() if name.partition(":")[0] in PER_PROMPT]

    def carried(self, method: str) -> str | None:
        """The arm that other data recommend of a method whose constant is searched for."""
        pairs = self.arms.get(f"{method}:carried")
        return next((name for name, other in self.arms.items() if other is pairs and not name.endswith(FOUND)), None)

    def best_constants(self) -> dict[str, float]:
        """For each task the constant that did best in hindsight."""
        options = self.options("fixed")
        if len(options) < 2:
            return {}
        return {task: float(name.partition("=")[2]) for task, name in hindsight(options).items()}


@dataclasses.dataclass(frozen=True)
class Study:
    """All that was run.

    Attributes:
        runs: by phase; every phase is there, perhaps empty.
        development, confirmation: the comparisons on both halves of the data sets.
        ablation: `gac` against its own forms, on development tasks.
        exposure: `gac`, a constant and the rules that act per prompt, where every prompt has a demonstration, on
            development tasks.
        exposure_confirmation: `gac`, its first form and the constant, where every prompt has one, on confirmation
            tasks.
        replaced: arms of the comparison at learning rates that a later pass of tuning replaced, with their runs.
    """

    runs: Mapping[str, Sequence[Run]]
    development: Family
    confirmation: Family
    ablation: Family
    exposure: Family
    exposure_confirmation: Family
    replaced: Mapping[str, Pairs] = dataclasses.field(default_factory=dict)

    def halves(self) -> list[tuple[str, Family]]:
        """The comparisons that have something to say."""
        pairs = (("development", self.development), ("confirmation", self.confirmation))
        return [(name, family) for name, family in pairs if family.versus]


def study(records: Iterable[Mapping[str, Any]], superseded: Iterable[Mapping[str, Any]] = ()) -> Study:
    """Everything that is compared, from the records of any phases; `superseded` are those of replaced runs.

    Raises:
        ValueError: a malformed record, a phase that the study does not know, or the same run twice.
    """
    runs: dict[str, list[Run]] = {phase: [] for phase in PHASES}
    for record in records:
        run = read_run(record)
        if run.phase in ON_DEMAND:
            continue
        if run.phase not in runs:
            raise ValueError(f"record {run.key}: phase must be one of {', '.join(PHASES)}, got {run.phase!r}")
        runs[run.phase].append(run)
    ablation = list(runs["ablation"])
    elsewhere = {REFERENCE, BEFORE} - {arm(run) for run in ablation}
    ablation += [run for run in runs["comparison"] if ablation and arm(run) in elsewhere]
    return Study(
        runs=runs,
        development=family(runs["comparison"], runs["tuning"]),
        confirmation=family(runs["confirmation"], runs["comparison"] or runs["tuning"]),
        ablation=family(ablation),
        exposure=family(run for run in runs["exposure"] if run.record["role"] == "development"),
        exposure_confirmation=family(run for run in runs["exposure"] if run.record["role"] == "confirmation"),
        replaced=by_arm(read_run(record) for record in superseded if record["phase"] == "comparison"),
    )


def family(runs: Iterable[Run], earlier: Iterable[Run] = ()) -> Family:
    """The family of `runs`, with what search finds in them and in `earlier`.

    Only a (task, seed) that every arm has run on counts, so that means of arms can be set side by side before a phase
    is complete. As long as there is none, all runs count.
    """
    known = by_arm(runs)
    whole = set.intersection(*(set(pairs) for pairs in known.values())) if known else set()
    shared = {name: {cell: run for cell, run in pairs.items() if cell in whole} for name, pairs in known.items()}
    left_out = sum(len(pairs) - len(whole) for pairs in known.values()) if whole else 0
    arms = with_searches(shared if whole else known, earlier)
    return _judged(arms, against(arms), left_out)


def seen_from(found: Family, reference: str) -> Family:
    """The same arms with another one, in the place of `gac`, against them; the forms of `gac` are left out."""
    arms = {n: pairs for n, pairs in found.arms.items() if n == reference or not is_form_of_gac(n)}
    return _judged(arms, against(arms, reference), found.left_out)


def _judged(arms: Mapping[str, Pairs], versus: Mapping[str, Comparison], left_out: int) -> Family:
    adjusted = holm({name: found.p for name, found in versus.items() if not _outside(name)})
    for name in versus:
        if name.endswith(":carried"):
            twin = next(other for other in arms if not _outside(other) and arms[other] is arms[name])
            adjusted[name] = adjusted[twin]
    return Family(arms, versus, adjusted, left_out)


def effect_of_exposure(found: Study, family: Family) -> dict[str, Comparison]:
    """For each arm of a family of phase "exposure", late accuracy with all demonstrations minus that with the usual."""
    usual = by_arm([*found.runs["comparison"], *found.runs["confirmation"]])
    every = {name: pairs for name, pairs in family.arms.items() if not name.endswith(FOUND)}
    differences = {name: paired(pairs, usual[name]) for name, pairs in every.items() if name in usual}
    return {name: compare(values) for name, values in differences.items() if values}


def sizes(found: Study) -> dict[str, Family]:
    """A family for each size that ran, over the tasks, arms and seeds of phase "size"; small is from the comparison."""
    wanted = {(arm(run), run.task, run.seed) for run in found.runs["size"]}
    pool = list(found.runs["size"])
    if not any(run.size == "small" for run in pool):
        same = [run for run in found.runs["comparison"] if (arm(run), run.task, run.seed) in wanted]
        pool += [run for run in same if run.size == "small"]
    by_size = {size: [run for run in pool if run.size == size] for size in SIZES}
    return {size: family(runs) for size, runs in by_size.items() if runs and wanted}


def size_contrast(families: Mapping[str, Family], name: str) -> tuple[str, str, Comparison] | None:
    """``(largest, smallest, margin over `name` at the largest minus that at the smallest)``, over shared cells."""
    have = [size for size in SIZES if size in families and name in families[size].versus]
    if len(have) < 2:
        return None
    margins = []
    for size in (have[-1], have[0]):
        arms = families[size].arms
        cells = set(arms[REFERENCE]) & set(arms[name])
        margins.append({c: arms[REFERENCE][c].measures.late - arms[name][c].measures.late for c in cells})
    differences: dict[str, list[float]] = {}
    for cell in sorted(set(margins[0]) & set(margins[1])):
        differences.setdefault(cell[0], []).append(margins[0][cell] - margins[1][cell])
    return (have[-1], have[0], compare(differences)) if differences else None


def agreement(found: Study) -> dict[str, tuple[Comparison, Comparison]]:
    """Arms judged on both halves, those in hindsight and the forms of `gac` aside."""
    first, second = found.development.versus, found.confirmation.versus
    return {n: (first[n], second[n]) for n in first if n in second and not _outside(n) and not is_form_of_gac(n)}


def ratio(reference: Pairs, other: Pairs, measure) -> Comparison | None:
    """Paired comparison of ``log(reference / other)`` of a positive measure; None without a pair."""
    differences = paired(reference, other, lambda run: _log(measure(run)))
    return compare(differences) if differences else None


def unequal_starts(runs: Iterable[Run]) -> list[str]:
    """Keys of runs whose warm start is not as accurate as that of the first run on the same task, size and seed."""
    first: dict[tuple[str, str, int], float] = {}
    return [
        run.key
        for run in runs
        if first.setdefault((run.task, run.size, run.seed), run.measures.warm) != run.measures.warm
    ]


def _outside(name: str) -> bool:
    return name.endswith(FOUND)


def _log(value: float | None) -> float | None:
    return math.log(value) if value is not None and value > 0 else None

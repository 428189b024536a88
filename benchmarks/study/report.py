"""Draws docs/study.md and its pictures from the committed records, however many of the phases are there."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.study import answers, conduct, history, losses, pictures, questions, robustness, tables, tasks, text
from benchmarks.study.analysis import SIZES, Study, study, unequal_starts
from benchmarks.study.arms import FOUND, arm, label
from benchmarks.study.measures import PROBLEMS, Run
from benchmarks.study.methods import GENERATIONS, METHODS, ROLLOUTS, STEP_DEMONSTRATIONS
from benchmarks.study.records import read_records
from benchmarks.study.wording import NOT_RUN, count, listing, percent, table

_QUESTIONS = (
    ("Is the default law better than the best constant?", questions.constants, ("study_constants", "study_forest")),
    ("Is it better than each rule?", questions.rules, ("study_curves",)),
    ("Is it better than SFT first and RL after it?", questions.stages, ()),
    ("Where does it lose, and why?", losses.losses, ("study_mu",)),
    ("Does the margin change with the size of the model?", questions.by_size, ("study_size",)),
    ("Do rules that act per prompt lack demonstrations?", questions.exposure, ()),
    ("How did the law come to count momentum?", history.before, ()),
    ("Which component carries the effect?", questions.parts, ("study_ablation",)),
    ("Is gradient space better than coefficient space?", questions.space, ()),
    ("Do development and confirmation agree?", answers.agreement_sentence, ()),
    ("Is training healthier?", conduct.health, ("study_drift",)),
    ("How much does the learning rate matter?", conduct.rates, ()),
    ("What did the second pass of tuning change?", history.replaced, ()),
    ("What does it cost?", conduct.cost, ()),
    ("Every arm, and the secondary measures", tables.every_arm, ()),
)


_TRIALS = ("tuning", "rates")
"""Phases whose runs choose learning rates and settings, and are compared with nothing."""

MARKS = ("<!-- study: begin, written by python -m benchmarks.study report -->", "<!-- study: end -->")
"""Lines of the README between which its table goes."""


def main(results: Path, out: Path, readme: Path | None = None) -> None:
    """Writes the page `out`, in the folder ``images`` beside it its pictures, and the README's table.

    Args:
        results: folder with the records, ``PHASE.jsonl``, and in ``superseded`` those of replaced runs.
        out: the page, ``docs/study.md``.
        readme: a page with both :data:`MARKS`; None leaves it.

    Raises:
        ValueError: no record at all, a malformed one, or a `readme` without the marks.
    """
    text = "" if readme is None else readme.read_text()
    if readme is not None and not all(text.count(mark) == 1 for mark in MARKS):
        raise ValueError(f"readme: {readme} must hold each of these lines once: {' and '.join(MARKS)}")
    records = read_records(results)
    if not records:
        raise ValueError(f"results: no records in {results}; make some with python -m benchmarks.study run")
    found = study(records, read_records(results / "superseded"))
    drawn = pictures.draw(found, out.parent / "images")
    regimes = robustness.chapter(records)
    if regimes:
        robustness.draw(records, out.parent / "images")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page(found, drawn, planned(records), regimes))
    if readme is not None:
        before, rest = text.split(MARKS[0])
        after = rest.split(MARKS[1])[1]
        table = "\n\n".join(part for part in (answers.status(found, planned(records)), readme_table(records)) if part)
        readme.write_text(f"{before}{MARKS[0]}\n\n{table}\n\n{MARKS[1]}{after}")


def readme_table(records: Sequence[Mapping[str, Any]]) -> str:
    """Four arms, as the README shows them."""
    return tables.short_table(study(records))


def planned(records: Sequence[Mapping[str, Any]]) -> dict[str, int | None]:
    """Number of runs that each phase has by the grid; None where it waits for tuning."""
    from benchmarks.study import grid

    found: dict[str, int | None] = {}
    for phase in grid.PHASES:
        try:
            found[phase] = len(grid.rows(phase, records))
        except grid.NotReady:
            found[phase] = None
    return found


def page(found: Study, drawn: Mapping[str, str], wanted: Mapping[str, int | None], regimes: str = "") -> str:
    """The whole page.

    Args:
        found: the study.
        drawn: pictures with their alternative texts.
        wanted: number of runs of each phase, None where it is not known yet.
        regimes: the chapter of :mod:`benchmarks.study.robustness`.
    """
    image = lambda name: f"![{drawn[name]}](images/{name}.png)" if name in drawn else ""
    steps = max((int(run.steps) for runs in found.runs.values() for run in runs), default=0)
    total = sum(len(runs) for runs in found.runs.values())
    blocks = [
        "# The study: a measured mix against chosen ones",
        f"Drawn by `python -m benchmarks.study report` from {count(total, 'run')}; verdicts and numbers follow from "
        "the data. Differences are in points of late accuracy, positive where `gac` is ahead, with 95% intervals.",
        answers.status(found, wanted),
        answers.answer(found),
        tables.main_table(found),
        _table_note(found),
        image("study"),
        "## Method",
        text.METHOD.format(steps=steps, problems=PROBLEMS, **_supervision(steps)),
        "### Data sets",
        _data_sets(found),
        "### What the data say about fairness",
        _fairness(found),
        "## Questions",
    ]
    for title, chapter, images in _QUESTIONS:
        blocks += [f"### {title}", chapter(found), *(image(name) for name in images)]
    if regimes:
        blocks += ["### What does a wrong teacher cost?", regimes]
    blocks += ["## Limits", text.LIMITS.format(steps=steps), "## To repeat it", text.REPRODUCE, _versions(found)]
    return "\n\n".join(block for block in blocks if block) + "\n"


def _supervision(steps: int) -> dict[str, int]:
    """What a run of so many steps reads."""
    prompts = ROLLOUTS // GENERATIONS
    return {
        "rollouts": ROLLOUTS,
        "generations": GENERATIONS,
        "prompts": prompts,
        "demonstrations": STEP_DEMONSTRATIONS,
        "all_demonstrations": steps * STEP_DEMONSTRATIONS,
        "few_demonstrations": steps * prompts * tasks.DEMONSTRATION_POOL // tasks.PROMPTS,
    }


def _table_note(found: Study) -> str:
    if not found.halves():
        return ""
    note = (
        "Bold, and filled in the pictures: p below 0.05 after Holm's correction. What is found by search or in "
        "hindsight is not tested. Accuracies are means over data sets of late accuracy, in percent; d is the effect "
        "size."
    )
    for half, family in found.halves():
        pairs = {versus.pairs for name, versus in family.versus.items() if not name.endswith(FOUND)}
        if family.left_out:
            note += (
                f" On {half} data {count(family.left_out, 'run')} wait for the other arms of their data set and seed."
            )
        elif len(pairs) > 1:
            span = f"{min(pairs)} to {max(pairs)}"
            note += f" On {half} data not every arm has run on every pair yet ({span}): all rests on what it has."
    return note


def _data_sets(found: Study) -> str:
    tasks: dict[str, list[Run]] = {}
    for runs in found.runs.values():
        for run in runs:
            tasks.setdefault(run.task, []).append(run)
    sizes = [size for size in SIZES if any(run.size == size for runs in tasks.values() for run in runs)]
    rows = []
    for task, runs in sorted(tasks.items(), key=lambda item: (item[1][0].domain, item[1][0].role != "development")):
        warm = [[run.measures.warm for run in runs if run.size == size] for size in sizes]
        spans = [f"{percent(min(one), 0)} to {percent(max(one), 0)}" if one else "" for one in warm]
        seeds = {run.seed for run in runs if run.phase not in _TRIALS}
        rows.append([task, runs[0].domain, runs[0].role, *spans, str(len(seeds)), str(len(runs))])
    header = ["data set", "domain", "half", *(f"{size} model, %" for size in sizes), "seeds compared", "runs"]
    starts = {(run.task, run.size, run.seed): run.measures.warm for runs in found.runs.values() for run in runs}
    outside = sum(not 0.1 <= warm <= 0.6 for warm in starts.values())
    note = f"Accuracy of warm starts, lowest to highest. Of {count(len(starts), 'warm start')}, {outside} "
    note += f"{'lies' if outside == 1 else 'lie'} outside 10% to 60%."
    return f"{table(header, rows, 3)}\n\n{note}"


def _fairness(found: Study) -> str:
    """Equal starts, steps and rollouts, and the number of trials, counted in the records."""
    compared = [run for phase, runs in found.runs.items() if phase not in _TRIALS for run in runs]
    lines = []
    if compared:
        odd = unequal_starts(compared)
        same = "all arms start from the same accuracy"
        if odd:
            same = f"{len(odd)} runs do NOT start from the accuracy of the others"
        lines.append(f"Within a data set, size and seed {same} ({count(len(compared), 'run')}).")
        lines.append(f"Optimizer steps: {_span(compared, 'steps')}.")
        if all("rollouts" in run.record for run in compared):
            lines.append(f"Rollouts of a run: {_span(compared, 'rollouts')}.")
    lines.append(_trials(found))
    overlap = {(r.task, r.seed) for phase in _TRIALS for r in found.runs[phase]} & {(r.task, r.seed) for r in compared}
    if compared and found.runs["tuning"]:
        lines.append(f"Seeds of tuning that a comparison uses as well: {len(overlap)}.")
    for size, phase in zip(SIZES, ("comparison", "size", "size"), strict=True):
        rates: dict[float, set[str]] = {}
        for run in found.runs[phase]:
            if run.size == size:
                rates.setdefault(run.lr, set()).add(label(arm(run)))
        if rates:
            chosen = "; ".join(f"{lr:g} for {listing(sorted(names))}" for lr, names in sorted(rates.items()))
            lines.append(f"Learning rates that tuning chose for {size} models: {chosen}.")
    return " ".join(line for line in lines if line) or NOT_RUN


def _trials(found: Study) -> str:
    """Number of trials of tuning: the same for every method at first, then more where an arm is no default."""
    settings: dict[str, dict[str, set[float]]] = {}
    for run in found.runs["tuning"]:
        settings.setdefault(run.method, {}).setdefault(run.setting, set()).add(run.lr)
    if not settings:
        return ""
    first = {
        m: len(own.get("", ())) + sum(s in METHODS[m].trials for s in own)
        for m, own in settings.items()
        if m in METHODS
    }
    total = {m: sum(len(lrs) for lrs in own.values()) for m, own in settings.items()}
    numbers = sorted(set(first.values()))
    text = f"Trials of tuning: {numbers[0] if numbers else 0} for every method"
    if len(numbers) > 1:
        text = f"Trials of tuning: {numbers[0]} to {numbers[-1]}, NOT the same for every method, or not complete"
    own = {label(method): total[method] - count for method, count in first.items()}
    more = [f"{name} {extra}" for name, extra in sorted(own.items()) if extra]
    return text + (f"; then, for learning rates next to an arm's own: {', '.join(more)}." if more else ".")


def _span(runs: Sequence[Run], field: str) -> str:
    """The one value of a field, or its range with the methods at both ends."""
    values: dict[float, set[str]] = {}
    for run in runs:
        values.setdefault(run.record[field], set()).add(run.method)
    if len(values) == 1:
        return f"{next(iter(values)):,} in every one"
    low, high = min(values), max(values)
    who = lambda methods: listing(sorted(methods)) if len(methods) <= 4 else count(len(methods), "method")
    return f"from {low:,} ({who(values[low])}) to {high:,} ({who(values[high])})"


def _versions(found: Study) -> str:
    seen: dict[str, set[str]] = {}
    for runs in found.runs.values():
        for run in runs:
            for name, value in (run.record.get("versions") or {}).items():
                seen.setdefault(name, set()).add(str(value))
    if not seen:
        return ""
    return (
        "Made with "
        + ", ".join(f"{name} {' and '.join(sorted(values))}" for name, values in sorted(seen.items()))
        + "."
    )

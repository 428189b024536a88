"""Where the default law loses, data set by data set, and what its losses go with."""

import math
from collections.abc import Iterable
from statistics import fmean

from benchmarks.study.analysis import Family, Study
from benchmarks.study.answers import in_task, loss_sentence
from benchmarks.study.arms import FOUND, REFERENCE, Pairs, is_form_of_gac, label, mean_over_tasks
from benchmarks.study.inference import Comparison, spearman
from benchmarks.study.measures import Run
from benchmarks.study.tables import LATE
from benchmarks.study.wording import NOT_RUN, difference, number, percent, table

NEAR = 0.1
"""A mean mu this close to the best constant is taken to be as good; constants are 0.2 apart."""


def losses(study: Study) -> str:
    """Task by task."""
    rows, reasons = [], []
    for half, family in study.halves():
        best = family.best_constants()
        for task in family.tasks():
            gac = {cell: run for cell, run in family.arms[REFERENCE].items() if cell[0] == task}
            found = in_task(family, "fixed:hindsight", task)
            rival, versus = _strongest(family, task)
            rows.append(
                [
                    task,
                    half,
                    percent(mean_over_tasks(gac, lambda run: run.measures.warm)),
                    percent(mean_over_tasks(gac, LATE)),
                    difference(in_task(family, "fixed:carried", task)),
                    difference(found),
                    f"{label(rival)} {difference(versus)}" if rival else "",
                    number(mean_over_tasks(gac, lambda run: run.measures.mean_mu)),
                    number(best.get(task), ".1f"),
                    *_noise(gac.values()),
                ]
            )
            if found and found.mean < 0:
                constant = {cell: run for cell, run in family.arms["fixed:hindsight"].items() if cell[0] == task}
                reasons.append(_reason(task, found, gac, best.get(task), constant))
    if not rows:
        return NOT_RUN
    header = [
        "data set",
        "half",
        "warm start, %",
        "`gac`, %",
        "`gac` minus constant from earlier runs",
        "`gac` minus best constant",
        "strongest other arm, `gac` minus it",
        "mean mu",
        "best constant",
        "SFT share of noise, first to last third, %",
        "disagreement, % of distance",
    ]
    text = [loss_sentence(study), *reasons, _distance_sentence(study)]
    note = (
        "The best constant and the strongest other arm of a data set are chosen in hindsight, so these columns err "
        "against `gac`. "
        "Intervals are those of single data sets, without correction."
    )
    return "\n\n".join([" ".join(part for part in text if part), table(header, rows, 2), note])


def _reason(task: str, found: Comparison, gac: Pairs, best: float | None, constant: Pairs) -> str:
    mean = mean_over_tasks(gac, lambda run: run.measures.mean_mu)
    sure = "" if math.isnan(found.high) or found.high < 0 else " (its interval includes 0)"
    text = f"On {task} it is {-100 * found.mean:.1f} points below{sure}"
    if mean is None or best is None:
        return text + "."
    rates = [{run.lr for run in pairs.values()} for pairs in (gac, constant)]
    other = (
        "" if rates[0] == rates[1] else f", which has another learning rate ({max(rates[1]):g}, not {max(rates[0]):g})"
    )
    if abs(mean - best) <= NEAR:
        why = "" if other else ": its level is not why"
        return f"{text}, with a mean mu of {mean:.2f} next to the best constant of {best:.1f}{other}{why}."
    side = "above" if mean > best else "below"
    return f"{text}, with a mean mu of {mean:.2f} {side} the best constant of {best:.1f}{other}."


def _distance_sentence(study: Study) -> str:
    """Whether the loss grows with the distance of mu from the best constant."""
    distances, margins = [], []
    for _, family in study.halves():
        for task, best in family.best_constants().items():
            gac = {cell: run for cell, run in family.arms[REFERENCE].items() if cell[0] == task}
            mean, found = (
                mean_over_tasks(gac, lambda run: run.measures.mean_mu),
                in_task(family, "fixed:hindsight", task),
            )
            if mean is not None and found:
                distances.append(abs(mean - best))
                margins.append(found.mean)
    rank = spearman(distances, margins)
    if math.isnan(rank):
        return ""
    return (
        f"Over {len(margins)} data sets the rank correlation between the margin and the distance of the mean mu from "
        f"the best constant is {rank:+.2f} (negative where distance is what costs)."
    )


def _strongest(family: Family, task: str) -> tuple[str | None, Comparison | None]:
    """The single arm, no form of `gac` and no search, that `gac` is least ahead of in a data set."""
    single = [name for name in family.versus if not is_form_of_gac(name) and not name.endswith(FOUND)]
    known = {name: found for name in single if (found := in_task(family, name, task))}
    if not known:
        return None, None
    name = min(known, key=lambda n: known[n].mean)
    return name, known[name]


def _noise(runs: Iterable[Run]) -> list[str]:
    """SFT's share of the noise in the first and last third of a run, and the disagreement's share of the distance."""
    first, last, share = [], [], []
    for run in runs:
        statistics = run.record.get("statistics") or {}
        rows = zip(*(statistics.get(name, ()) for name in ("sigma_s2", "sigma_r2", "delta_g2")), strict=False)
        rows = [row for row in rows if all(isinstance(v, int | float) for v in row)]
        third = len(rows) // 3
        if third:
            for target, part in ((first, rows[:third]), (last, rows[-third:])):
                s, r = (max(fmean(row[i] for row in part), 0.0) for i in (0, 1))
                target.append(s / (s + r) if s + r > 0 else math.nan)
            s, r, d = (fmean(row[i] for row in rows) for i in range(3))
            share.append(max(d, 0.0) / (s + r + max(d, 0.0)) if s + r > 0 else math.nan)
    if not share:
        return ["", ""]
    return [f"{100 * fmean(first):.0f} to {100 * fmean(last):.0f}", f"{100 * fmean(share):.0f}"]

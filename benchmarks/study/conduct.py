"""How runs went besides accuracy: drift, events and collapse, the learning rate, time."""

import math
from collections.abc import Mapping
from statistics import median
from typing import Any

from benchmarks.study.analysis import Family, Study, ratio
from benchmarks.study.arms import FOUND, REFERENCE, arm, is_form_of_gac, label, mean_over_tasks
from benchmarks.study.inference import Comparison
from benchmarks.study.measures import Run
from benchmarks.study.rates import lr_sensitivity
from benchmarks.study.tables import ordered
from benchmarks.study.wording import NOT_RUN, count, number, percent, table


def health(study: Study) -> str:
    """KL drift, large events of mu, collapse."""
    if not study.halves():
        return NOT_RUN
    lines, header, names = [], ["arm"], [n for n in ordered(study) if not n.endswith((":carried", ":hindsight"))]
    for half, family in study.halves():
        header += [f"{half}: KL-drift area", "large mu events, %", "variation of mu", "collapsed (beyond chance)"]
        texts = [f"On {half} data:"]
        for name in ("fixed:search", "sequential:search"):
            found = ratio(family.arms[REFERENCE], family.arms.get(name, {}), lambda run: run.measures.kl_area)
            texts += [_drift_sentence(name, found)] if found else []
        others = [family.arms[n] for n in family.arms if not is_form_of_gac(n) and not n.endswith(FOUND)]
        rest = {(*cell, index): run for index, pairs in enumerate(others) for cell, run in pairs.items()}
        mine, theirs = _collapsed(family.arms[REFERENCE]), _collapsed(rest)
        texts.append(f"Of the runs of `gac`, {mine} collapsed, of all others {theirs}; in brackets: beyond chance.")
        lines.append(" ".join(texts))
    rows = [[label(name), *(cell for _, family in study.halves() for cell in _conduct(family, name))] for name in names]
    lost = sum(run.measures.kl_area is None for runs in study.runs.values() for run in runs)
    note = (
        f"In {count(lost, 'run')} KL was not finite at some evaluation; only the areas leave them out." if lost else ""
    )
    return "\n\n".join(part for part in (*lines, table(header, rows), note) if part)


def _conduct(family: Family, name: str) -> list[str]:
    pairs = family.arms.get(name, {})
    mean = lambda measure: mean_over_tasks(pairs, lambda run: getattr(run.measures, measure))
    events, variation = percent(mean("large_mu_events"), 0), number(mean("mu_variation"))
    return [number(mean("kl_area"), ".3g"), events, variation, _collapsed(pairs) if pairs else ""]


def rates(study: Study) -> str:
    """Sensitivity to the learning rate."""
    found = lr_sensitivity(study.runs["tuning"])
    if not found:
        return NOT_RUN
    order = sorted(found, key=lambda method: found[method].off_by_one)
    loss = lambda method: f"{label(method)} ({percent(found[method].off_by_one)} points)"
    text = f"A learning rate one step of the grid off costs {loss(order[0])} least and {loss(order[-1])} most"
    if REFERENCE in found:
        rank = f"number {order.index(REFERENCE) + 1} of {len(order)}"
        text += f"; `gac` loses {percent(found[REFERENCE].off_by_one)} and is {rank}"
    wide = sorted(found, key=lambda method: found[method].spread)
    spread = lambda method: f"{label(method)} ({percent(found[method].spread)})"
    text += f". From the best to the worst of the grid it is {spread(wide[0])} least and {spread(wide[-1])} most"
    if REFERENCE in found:
        text += f"; `gac` is number {wide.index(REFERENCE) + 1}"
    seeds = len({run.seed for run in study.runs["tuning"]})
    tops = {label(method): found[method].peak for method in order if found[method].at_end}
    inside = [f"{name} {top:.2g}" for name, top in tops.items() if not math.isnan(top)]
    none = [name for name, top in tops.items() if math.isnan(top)]
    if inside:
        text += ". Where the best rate is an end of the grid, a parabola in log(lr) through the last three has its "
        text += "top at: " + ", ".join(inside)
    if none:
        text += ". At an end of the grid, with no such top: " + ", ".join(none)
    note = f"This is from {count(seeds, 'seed')} a data set: an order of magnitude, and no ranking."
    grid = sorted({lr for method in found.values() for lr in method.means})
    rows = []
    for method in order:
        one = found[method]
        means = [percent(one.means.get(lr)) for lr in grid]
        rows.append([label(method), *means, percent(one.off_by_one), percent(one.spread), str(one.tasks)])
    header = ["method, default setting", *(f"{lr:g}" for lr in grid)]
    header += ["loss, one step off, points", "best minus worst, points", "data sets"]
    return f"{text}. {note}\n\n{table(header, rows)}"


def cost(study: Study) -> str:
    """Wall time, as shares within runs: those of two arms may lie days apart."""
    lines, ratios = [], []
    for half, family in study.halves():
        other = next((n for n in ("fixed:mu=0.5", *family.options("fixed")) if n in family.versus), None)
        if other is None:
            continue
        arms = family.arms
        cells = sorted(set(arms[REFERENCE]) & set(arms[other]))
        seconds = lambda pairs, cell: pairs[cell].measures.seconds_per_step
        ratio = median(seconds(arms[REFERENCE], cell) / seconds(arms[other], cell) for cell in cells)
        own, theirs = (median(run.measures.gac_share for run in arms[n].values()) for n in (REFERENCE, other))
        text = f"On {half} data a step of `gac` spends {percent(own, 2)}% of its time in GAC's code"
        lines.append(f"{text}, one of {label(other)}, which measures as well, {percent(theirs, 2)}%.")
        ratios.append(f"{percent(ratio)}% on {half} data ({count(len(cells), 'pair')})")
    if ratios:
        text = "Whole steps of these two do the same work, and yet the median ratio of their times is "
        text += " and ".join(ratios)
        text += ": arms ran on different days, on a machine that others share. Times of different arms therefore say"
        lines.append(text + " nothing here; shares are taken within a run.")
    mine: dict[str, list[Run]] = {}
    for phase in ("comparison", "ablation", "size", "exposure", "confirmation"):
        for run in study.runs[phase]:
            if arm(run) == REFERENCE:
                mine.setdefault(run.size, []).append(run)
    if not mine:
        return NOT_RUN
    rows = [
        [
            size,
            f"{runs[0].record.get('parameters', 0) / 1e6:.1f} M",
            f"{median(run.measures.seconds_per_step for run in runs):.3f}",
            percent(median(run.measures.gac_share for run in runs), 2),
        ]
        for size, runs in mine.items()
    ]
    header = ["size", "parameters", "seconds a step of `gac`, median", "share of GAC, %"]
    return "\n\n".join(part for part in (" ".join(lines), table(header, rows)) if part)


def _drift_sentence(name: str, found: Comparison) -> str:
    change, low, high = (100 * math.expm1(value) for value in (found.mean, found.low, found.high))
    shown = f"{round(change):+d}%" + ("" if math.isnan(low) else f", {round(low):+d}% to {round(high):+d}%, untested")
    if math.isnan(low) or low <= 0 <= high:
        return f"The interval of the KL-drift area of `gac` over that of {label(name)} includes equality ({shown})."
    return (
        f"The KL-drift area of `gac` is {'larger' if change > 0 else 'smaller'} than that of {label(name)} ({shown})."
    )


def _collapsed(pairs: Mapping[Any, Run]) -> str:
    found = [run.measures for run in pairs.values()]
    return f"{sum(m.collapsed for m in found)} of {len(found)} ({sum(m.collapsed_beyond_chance for m in found)})"

"""The questions of the study, each answered by sentences that follow from the numbers and by a table."""

import math
from statistics import fmean

from benchmarks.study.analysis import ALPHA, Family, Study, effect_of_exposure, sizes
from benchmarks.study.answers import (
    exposure_sentence,
    in_task,
    loss_sentence,
    part_sentence,
    replaced_sentence,
    size_contrasts,
    space_sentence,
)
from benchmarks.study.arms import (
    BEFORE,
    FOUND,
    REFERENCE,
    RL_ALONE,
    SFT_ALONE,
    Pairs,
    against,
    is_form_of_gac,
    label,
    mean_over_tasks,
)
from benchmarks.study.inference import Comparison, spearman
from benchmarks.study.tables import LATE, evidence
from benchmarks.study.wording import (
    NOT_RUN,
    clause,
    difference,
    equals,
    excluded,
    listing,
    number,
    percent,
    table,
    tally,
)

NEAR = 0.1
"""A mean mu this close to the best constant is taken to be as good; constants are 0.2 apart."""
_PARTS = {
    "gac-sketch": "sketched instead of exact gradients",
    "gac-temporal": "one contribution a branch, noise from earlier steps",
    "gac-coefficient": "token coefficients instead of gradients",
    BEFORE: "noise of single gradients, as without momentum in the optimizer: the law before",
    "gac:no-average": "no averaging of the statistics",
    "gac:half_life=7": "one average, half-life 7 steps",
    "gac:half_life=69": "one average, half-life 69 steps",
    "gac:with-prior": "with the published prior",
    "gac:no-cap": "no bound on the change of mu in a step",
    "gac:no-disagreement": "disagreement taken as 0",
    "gac:no-noise": "noise taken as 0: mu goes to 0.5",
    "gac:no-variance": "noise taken as 0: mu goes to 0.5",
    "gac:direction": "best direction instead of least error, for Adam; one average, half-life 69 steps",
    "gac:optimizer-metric": "statistics in Adam's space",
    "gac:alpha=kl": "alpha follows the KL drift",
}


def constants(study: Study) -> str:
    """Against constants."""
    lines = []
    for half, family in study.halves():
        single = [name for name in family.options("fixed") if name in family.versus]
        if len(single) < 2:
            lines.append(f"On {half} data fewer than two constants have run.")
            continue
        text = f"On {half} data, against every constant by itself, `gac` is {tally(family, single, label)}."
        best, found = family.carried("fixed"), family.versus.get("fixed:carried")
        if best and found:
            text += (
                f" Against {label(best)}, the best on earlier runs, it is {clause(family, 'fixed:carried')}; the "
                f"interval excludes {excluded(found)}. With data sets as draws from many, the difference is "
                f"{_wide(found)}."
            )
        if half == "development" and (replaced := replaced_sentence(study)):
            text += f" {replaced}"
        text += (
            f" In hindsight the best constants are {_values(family.best_constants())}; `gac` minus these is "
            f"{difference(family.versus.get('fixed:hindsight'))}, which says what a perfect search could have."
        )
        if "fixed:search" in family.versus:
            text += f" Of a search in the same data set `gac` is {clause(family, 'fixed:search')}."
            flat = [name for name in single if family.versus[name].mean < family.versus["fixed:search"].mean]
            if flat:
                text += (
                    f" Single constants did better than that search ({listing([label(name) for name in flat])}): "
                    "among near ties it follows the noise of the other seeds."
                )
        rates = {run.lr for name in single for run in family.arms[name].values()}
        if len(rates) > 1:
            text += (
                f" Constants run at the learning rates tuned for them, {min(rates):g} to {max(rates):g}: what sets "
                "them apart, in the picture too, is both."
            )
        lines.append(text)
    return "\n\n".join(lines) or NOT_RUN


def rules(study: Study) -> str:
    """Against rules."""
    lines = []
    for half, family in study.halves():
        names = family.rules()
        text = (
            f"On {half} data, `gac` is {tally(family, family.controllers(), label)}, among controllers of the mix. "
            f"Among rules that act per prompt it is {tally(family, family.per_prompt(), label)}."
        )
        if names:
            least = min(names, key=lambda name: family.versus[name].mean)
            text += f" The strongest rule is {label(least)}: `gac` is {clause(family, least)}."
        for name in family.versus:
            if name.startswith(f"{REFERENCE}:") and name != BEFORE:
                text += f" Against its own form that is tuned like the others ({label(name)}), the default is "
                text += f"{clause(family, name)}."
        lines.append(text)
    return "\n\n".join(lines) or NOT_RUN


def stages(study: Study) -> str:
    """Against SFT first, RL after it."""
    lines = []
    for half, family in study.halves():
        options = family.options("sequential")
        if not options:
            lines.append(f"On {half} data: not yet run.")
            continue
        text = f"On {half} data, against every split by itself, `gac` is "
        text += f"{tally(family, [name for name in options if name in family.versus], label)}."
        if name := family.carried("sequential"):
            text += f" Against {label(name)}, the best on earlier runs, it is {clause(family, 'sequential:carried')}."
        if "sequential:search" in family.versus:
            text += (
                f" Of the split that a search in the same data set finds it is {clause(family, 'sequential:search')}."
            )
        for end in (RL_ALONE, SFT_ALONE):
            if end in family.versus:
                text += f" Against {label(end)} it is {clause(family, end)}."
        lines.append(text)
    return "\n\n".join(lines) or NOT_RUN


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


def by_size(study: Study) -> str:
    """Margins at the three sizes."""
    families = {size: family for size, family in sizes(study).items() if REFERENCE in family.arms}
    if not families:
        return NOT_RUN
    names = dict.fromkeys(name for family in families.values() for name in family.versus)
    contrasts = size_contrasts(study)
    rows, texts = [], []
    for name in sorted(names, key=lambda name: not name.endswith(FOUND)):
        cells = [difference(family.versus.get(name)) for family in families.values()]
        rows.append([label(name), *cells, difference(contrasts[name][2]) if name in contrasts else ""])
        if name in contrasts and not name.endswith(FOUND):
            texts.append(_trend(name, *contrasts[name]))
    header = [
        "`gac` minus",
        *(f"{size}, {_parameters(family)}" for size, family in families.items()),
        "largest minus smallest",
    ]
    note = (
        "Over the data sets, seeds and settings that ran at every size, so that small may differ from above; searches "
        "are among these settings and in no test."
    )
    return "\n\n".join([" ".join(texts) or "Only one size has run yet.", table(header, rows), note])


def parts(study: Study) -> str:
    """Ablations."""
    family = study.ablation
    names = [name for name in family.versus if is_form_of_gac(name)]
    if not names:
        return NOT_RUN
    rows = [
        [
            label(name),
            _PARTS.get(name, ""),
            percent(mean_over_tasks(family.arms[name], LATE)),
            difference(family.versus[name]),
            *evidence(family, name, family.versus[name]),
            number(mean_over_tasks(family.arms[name], lambda run: run.measures.mean_mu)),
        ]
        for name in sorted(names, key=lambda name: -family.versus[name].mean)
    ]
    header = ["form", "what is different", "late accuracy, %", "`gac` minus it", "p", "d", "won, %", "pairs", "mean mu"]
    text = part_sentence(study)
    if {"gac:direction", "gac:half_life=69"} <= set(family.arms):
        same = against(family.arms, "gac:half_life=69")["gac:direction"]
        text += (
            " The direction law averages as half_life=69 does; against that form alone the difference is "
            f"{difference(same)} points (p {equals(same.p)}, uncorrected)."
        )
    return f"{text}\n\n{table(header, rows, 2)}"


def exposure(study: Study) -> str:
    """Every prompt has a demonstration."""
    if not study.exposure.versus:
        return NOT_RUN
    text = (
        "Elsewhere a third of the prompts have a demonstration, the ones that the warm start was trained on. Here all "
        "of them have one, for every arm: three times as many, most of them new. Rules that act per prompt still read "
        "at most one for each of a step's prompts, laws of `mu` as many as ever. "
        f"{exposure_sentence(study)}"
    )
    header = [
        "arm",
        "late accuracy, %",
        "minus the same arm with a third",
        "`gac` minus it",
        "p",
        "d",
        "won, %",
        "pairs",
    ]
    parts = [text]
    for half, family in (("development", study.exposure), ("confirmation", study.exposure_confirmation)):
        change = effect_of_exposure(study, family)
        names = [REFERENCE, *(name for name in family.versus if not name.endswith(FOUND))] if family.versus else []
        rows = [
            [
                label(name),
                percent(mean_over_tasks(family.arms[name], LATE)),
                difference(change.get(name)),
                difference(family.versus.get(name)),
                *evidence(family, name, family.versus.get(name)),
            ]
            for name in names
        ]
        parts.append(f"On {half} data:\n\n{table(header, rows)}" if rows else f"On {half} data: not yet run.")
        parts += [_task_by_task(family, name) for name in family.options("fixed") if name in family.versus]
    return "\n\n".join(parts)


def _task_by_task(family: Family, name: str) -> str:
    """`gac` minus a constant in every data set, with its mean mu."""
    shown = []
    for task in family.tasks():
        gac = {cell: run for cell, run in family.arms[REFERENCE].items() if cell[0] == task}
        mean = number(mean_over_tasks(gac, lambda run: run.measures.mean_mu))
        shown.append(f"{task} {difference(in_task(family, name, task))} (mean mu {mean})")
    return f"`gac` minus {label(name)} by data set: {', '.join(shown)}."


def space(study: Study) -> str:
    """Gradients against token coefficients; exact against cheaper estimators."""
    lines = [space_sentence(study)]
    for phase, family in (("ablation", study.ablation), *study.halves()):
        for name in ("gac-sketch", "gac-temporal"):
            if name in family.versus:
                lines.append(f"Against {label(name)} ({phase}), `gac` with exact gradients is {clause(family, name)}.")
    return " ".join(lines)


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


def _noise(runs) -> list[str]:
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


def _trend(name: str, large: str, small: str, found: Comparison, p: float) -> str:
    shown = f"{difference(found)} points, p {equals(p)}"
    if math.isnan(found.low) or p >= ALPHA:
        return (
            f"From {small} to {large} the change of the margin over {label(name)} is not told apart from 0 ({shown})."
        )
    return (
        f"From {small} to {large} the margin over {label(name)} {'grows' if found.mean > 0 else 'shrinks'} ({shown})."
    )


def _wide(found: Comparison) -> str:
    if math.isnan(found.tasks_low):
        return "unknown"
    return f"{100 * found.mean:+.1f} points ({100 * found.tasks_low:+.1f} to {100 * found.tasks_high:+.1f})"


def _values(best: dict[str, float]) -> str:
    return ", ".join(f"{task} {value:g}" for task, value in sorted(best.items()))


def _parameters(family: Family) -> str:
    return (
        f"{next(iter(family.arms[REFERENCE].values())).record.get('parameters', 0) / 1e6:.1f} M"
        if REFERENCE in family.arms
        else "?"
    )

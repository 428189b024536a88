"""The questions of the study, each answered by sentences that follow from the numbers and by a table."""

import math

from benchmarks.study.analysis import ALPHA, Family, Study, effect_of_exposure, sizes
from benchmarks.study.answers import (
    exposure_sentence,
    in_task,
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
    against,
    is_form_of_gac,
    label,
    mean_over_tasks,
)
from benchmarks.study.inference import Comparison
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

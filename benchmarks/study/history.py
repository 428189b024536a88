"""What changed in the course of the study: the default law's first form, and learning rates that were replaced."""

from benchmarks.study.analysis import Family, Study, seen_from
from benchmarks.study.arms import BEFORE, FOUND, REFERENCE, label, mean_over_tasks, paired
from benchmarks.study.inference import compare
from benchmarks.study.tables import LATE
from benchmarks.study.wording import NOT_RUN, clause, difference, percent, table, tally

_WHERE = {
    "development": "On development data",
    "confirmation": "On confirmation data",
    "exposure": "Where every prompt of the development data has a demonstration",
    "exposure, confirmation": "Where every prompt of the confirmation data has one",
}
_HISTORY = (
    "The default law first took the noise of single gradients for what it has to weigh (`momentum=0`). On "
    "development data it lost to a constant of 0.5 where every prompt has a demonstration: demonstrations are "
    "many and new there, their gradient is noisy, and the law held them down to a `mu` of 0.2 to 0.5. But the "
    "optimizer, Adam, moves by an average of gradients. That leaves 1/19 of the noise of one and all of the error "
    "of a wrong `mu`, which is the same in every step; so the law gave noise 19 times the weight that it has in "
    "what moves the model. Since then it counts what momentum leaves (`docs/laws.md`). Nothing was fitted: the "
    "factor is the optimizer's. The runs of the first form on confirmation data were complete by then, and nobody "
    "had looked at them. All runs that this replaced stay in the data; here is what the first form did, with "
    "Holm's correction over its own comparisons."
)


def replaced(study: Study) -> str:
    """The comparison's arms at the learning rates that the second pass of tuning replaced."""
    family, rows = study.development, []
    rate = lambda pairs: f"{next(iter(pairs.values())).lr:g}"
    for name, pairs in study.replaced.items():
        if name in family.versus:
            row = [label(name)]
            for runs in (pairs, family.arms[name]):
                found = compare(paired(family.arms[REFERENCE], runs))
                row += [rate(runs), percent(mean_over_tasks(runs, LATE)), difference(found)]
            rows.append(row)
    if not rows:
        return "No run was replaced."
    header = ["arm", "first rate", "late accuracy, %", "`gac` minus it", "tuned rate", "late accuracy, %",
              "`gac` minus it"]  # fmt: skip
    worse = sum(
        mean_over_tasks(study.replaced[name], LATE) > mean_over_tasks(family.arms[name], LATE)
        for name in study.replaced
        if name in family.versus
    )
    text = (
        "The second pass of tuning chose another learning rate for these arms, on its one seed. All had run at the "
        f"first rate by then. On the seeds of the comparison the first rate was the better one for {worse} of "
        f"{len(rows)}; the tuned one counts everywhere else. Intervals are not corrected, and nothing here is tested."
    )
    return f"{text}\n\n{table(header, rows)}"


def before(study: Study) -> str:
    """What the law did before it counted the optimizer's momentum, and what that changed."""
    phases = [*study.halves(), ("exposure", study.exposure), ("exposure, confirmation", study.exposure_confirmation)]
    phases = [(phase, family) for phase, family in phases if BEFORE in family.arms]
    if not phases:
        return NOT_RUN
    rows: dict[str, list[str]] = {BEFORE: []}
    header, lines = ["arm"], []
    for phase, family in phases:
        first = seen_from(family, BEFORE)
        single = [name for name in first.options("fixed") if name in first.versus]
        text = f"{_WHERE[phase]} the law without momentum is, against single constants, {tally(first, single, label)}"
        if first.rules():
            text += f"; against rules it is {tally(first, first.rules(), label)}"
        if best := first.carried("fixed"):
            text += f"; against the constant from earlier runs ({label(best)}) {clause(first, 'fixed:carried')}"
        lines.append(f"{text}. The default, which counts momentum, is {clause(family, BEFORE)}.")
        header += [f"{phase}: it minus the arm", "the default minus the arm"]
        for name in (n for n in first.versus if not n.endswith(FOUND) or n.startswith("fixed:")):
            cells = rows.setdefault(name, [])
            cells += [""] * (len(header) - 3 - len(cells))
            cells += [_marked(first, name), _marked(family, name)]
    del rows[BEFORE]
    width = len(header) - 1
    shown = [[label(name), *cells, *[""] * (width - len(cells))] for name, cells in rows.items()]
    return "\n\n".join([_HISTORY, *lines, table(header, shown)])


def _marked(family: Family, name: str) -> str:
    text = difference(family.versus.get(name))
    return f"**{text}**" if text and family.verdict(name) in ("better", "worse") else text

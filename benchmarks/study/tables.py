"""The table of all arms in its forms, and the order in which arms are shown."""

from benchmarks.study.analysis import Family, Study
from benchmarks.study.arms import FOUND, REFERENCE, RL_ALONE, SFT_ALONE, against, is_form_of_gac, label, mean_over_tasks
from benchmarks.study.inference import Comparison
from benchmarks.study.wording import NOT_RUN, difference, number, percent, probability, table

LATE = lambda run: run.measures.late
_KINDS = {"fixed": "Constants", "sequential": "SFT, then RL"}


def kind(name: str) -> str:
    """Heading of the group that an arm belongs to."""
    return "Forms of gac" if is_form_of_gac(name) else _KINDS.get(name.partition(":")[0], "Rules, tuned")


def ordered(study: Study) -> list[str]:
    """Arms of both halves as tables and figures show them: `gac`, constants, stages, rules; searches first in each."""
    names = dict.fromkeys(name for _, family in study.halves() for name in family.arms)
    groups = {heading: [] for heading in ("Forms of gac", *_KINDS.values(), "Rules, tuned")}
    for name in names:
        groups[kind(name)].append(name)
    return [n for group in groups.values() for n in sorted(group, key=lambda n: not n.endswith(FOUND))]


def forest_rows(study: Study) -> list[tuple[str, str]]:
    """``(arm, label)`` of the forest plot; headings have an empty arm."""
    rows, heading = [], None
    for name in ordered(study):
        if name == REFERENCE:
            continue
        if kind(name) != heading:
            heading = kind(name)
            rows.append(("", heading))
        rows.append((name, label(name)))
    return rows


def main_table(study: Study) -> str:
    """Searches, rules and both ends of two stages on both halves, with tests and effect sizes."""
    halves = study.halves()
    if not halves:
        return NOT_RUN
    header, rows = ["arm"], []
    for half, _ in halves:
        header += [f"{half}, %", "`gac` minus it", "p", "d", "won, %", "pairs"]
    ends = (RL_ALONE, SFT_ALONE)
    for name in ordered(study):
        if kind(name) in _KINDS.values() and "=" in name and name not in ends:
            continue
        cells = [label(name)]
        for _, family in halves:
            cells += _late(family, name)
            cells += evidence(family, name, family.versus.get(name))
        rows.append(cells)
    return table(header, rows)


SHORT = (REFERENCE, "fixed:carried", RL_ALONE, "paper")
"""What the README shows: the default law, the constant that a user can have, RL alone, the paper's controller."""


def short_table(study: Study) -> str:
    """The arms of :data:`SHORT` on both halves, without tests."""
    halves = study.halves()
    if not halves:
        return NOT_RUN
    header = ["arm", *(cell for half, _ in halves for cell in (f"{half}, %", "`gac` minus it"))]
    shown = [
        name
        for name in ordered(study)
        if name in SHORT or (name.partition(":")[0] == "paper" and kind(name) == "Rules, tuned")
    ]
    return table(
        header, [[label(name), *(cell for _, family in halves for cell in _late(family, name))] for name in shown]
    )


def every_arm(study: Study) -> str:
    """All arms, single constants and splits included: late accuracy, final accuracy and area under the curve."""
    halves = study.halves()
    if not halves:
        return NOT_RUN
    measures = {"final": lambda run: run.measures.final, "area": lambda run: run.measures.area}
    found = {(half, name): against(family.arms, measure=m) for half, family in halves for name, m in measures.items()}
    header, rows = ["arm"], []
    for half, _ in halves:
        header += [f"{half}: late, %", "`gac` minus it: late", "final", "area"]
    for name in ordered(study):
        cells = [label(name)]
        for half, family in halves:
            cells += _late(family, name)
            cells += [difference(found[half, measure].get(name)) for measure in measures]
        rows.append(cells)
    return table(header, rows)


def evidence(family: Family, name: str, found: Comparison | None) -> list[str]:
    """Corrected p, effect size, share of pairs won, number of pairs."""
    if found is None:
        return ["", "", "", ""]
    return [probability(family.adjusted.get(name)), number(found.effect), percent(found.won, 0), str(found.pairs)]


def _late(family: Family, name: str) -> list[str]:
    shown = difference(family.versus.get(name))
    mean = percent(mean_over_tasks(family.arms[name], LATE)) if name in family.arms else ""
    return [mean, f"**{shown}**" if name in family.told_apart() else shown]

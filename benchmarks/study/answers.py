"""The answer in six sentences, and the sentences that it shares with the questions."""

import math

from benchmarks.study.analysis import ALPHA, Family, Study, agreement, size_contrast, sizes
from benchmarks.study.arms import FOUND, REFERENCE, is_form_of_gac, label, paired
from benchmarks.study.inference import Comparison, compare, holm, spearman
from benchmarks.study.wording import clause, count, difference, listing, tally

_SEARCHES = (("a constant searched for in the same data set", "search"), ("the best one in hindsight", "hindsight"))


def answer(study: Study) -> str:
    """The sentences that the page begins with."""
    if not study.halves():
        return "No pair of runs can be compared yet, so none of the questions below has an answer."
    rules = _halves(study, lambda family: f"is {tally(family, family.controllers(), label)}")
    prompts = _halves(study, lambda family: f"is {tally(family, family.per_prompt(), label)}")
    constants, stages = (
        _halves(study, lambda family, method=method: _carried(family, method)) for method in ("fixed", "sequential")
    )
    sentences = [
        f"**Constants.** The default law {constants}. {replaced_sentence(study)} {_constants(study)}".rstrip(),
        f"**Other rules.** Against controllers of the mix, with tuned constants, the default law {rules}. Against "
        f"rules that act per prompt, and here see far fewer demonstrations, it {prompts}. "
        f"{exposure_sentence(study)}".rstrip(),
        f"**Two stages.** The default law {stages}.",
        f"**What carries it.** {space_sentence(study)} {part_sentence(study)}",
        f"**Where it loses.** {loss_sentence(study)} {agreement_sentence(study)}",
        f"**Size.** {size_sentence(study)}",
    ]
    told = [text for text in sentences if not text.endswith("** ")]
    return "\n".join(f"{index}. {text}" for index, text in enumerate(told, start=1))


def status(study: Study, planned: dict[str, int | None]) -> str:
    """What is missing, phase by phase; nothing where every phase is complete.

    `planned` has the number of runs of each phase, None where the grid cannot say yet.
    """
    missing = []
    for phase, runs in study.runs.items():
        wanted = planned.get(phase)
        if not runs:
            missing.append(f"{phase}: not yet run")
        elif wanted is None:
            missing.append(f"{phase}: {count(len(runs), 'run')} so far")
        elif len(runs) < wanted:
            missing.append(f"{phase}: {len(runs):,} of {wanted:,} runs")
    if not missing:
        return ""
    return f"**Preliminary.** {'; '.join(missing)}. All that follows rests on the runs that are there."


def size_contrasts(study: Study) -> dict[str, tuple[str, str, Comparison, float]]:
    """For each arm that ran at several sizes: largest, smallest, change of the margin between them, Holm's p.

    Searches are in no test: their p is NaN.
    """
    families = {size: family for size, family in sizes(study).items() if REFERENCE in family.arms}
    names = dict.fromkeys(name for family in families.values() for name in family.versus)
    found = {name: contrast for name in names if (contrast := size_contrast(families, name))}
    adjusted = holm({name: contrast[2].p for name, contrast in found.items() if not name.endswith(FOUND)})
    return {name: (*contrast, adjusted.get(name, math.nan)) for name, contrast in found.items()}


def size_sentence(study: Study) -> str:
    """How margins change with the model's size, and what they are at the largest; nothing before that phase ran."""
    contrasts = {name: found for name, found in size_contrasts(study).items() if not name.endswith(FOUND)}
    if not contrasts:
        return ""
    large, small, *_ = next(iter(contrasts.values()))
    groups: dict[str, list[str]] = {"grow": [], "shrink": [], "": []}
    for name, (_, _, change, p) in contrasts.items():
        told = not math.isnan(change.low) and p < ALPHA
        groups[("grow" if change.mean > 0 else "shrink") if told else ""].append(label(name))
    parts = [f"margins over {listing(names)} {word}" for word, names in groups.items() if names and word]
    if groups[""]:
        parts.append(f"no change is told apart from 0 in those over {listing(groups[''])}")
    versus = sizes(study)[large].versus
    margins = listing([f"{difference(versus[name])} ({label(name)})" for name in contrasts if name in versus])
    text = f"From {small} to {large} models {'; '.join(parts)}"
    return f"{text}. At the largest `gac` minus the arm is, in points, {margins}."


def space_sentence(study: Study) -> str:
    """Gradient space against coefficient space."""
    parts = [
        f"{clause(family, 'gac-coefficient')} ({phase})"
        for phase, family in (("ablation", study.ablation), *study.halves())
        if "gac-coefficient" in family.versus
    ]
    if not parts:
        return "Gradient space against coefficient space: not yet run."
    return f"Against the law on token coefficients, the law on gradients is {'; '.join(parts)}."


def part_sentence(study: Study) -> str:
    """Which ablations matter."""
    family = study.ablation
    names = [name for name in family.versus if name.startswith(f"{REFERENCE}:") and is_form_of_gac(name)]
    if not names:
        return "Ablations: not yet run."
    forms = f"Of {count(len(names), 'form')} of the law with one part changed,"
    matter = sorted((n for n in names if n in family.told_apart()), key=lambda n: -abs(family.versus[n].mean))
    if not matter:
        largest = max(names, key=lambda name: abs(family.versus[name].mean))
        shown = difference(family.versus[largest])
        return f"{forms} none is told apart from the default; the largest difference is to {label(largest)} ({shown})."
    told = [f"{label(name)} (the default is {clause(family, name)})" for name in matter]
    return f"{forms} {len(matter)} {'is' if len(matter) == 1 else 'are'} told apart from the default: {listing(told)}."


def replaced_sentence(study: Study) -> str:
    """Whether the constant that earlier runs recommend did better at the learning rate that its tuning replaced."""
    family = study.development
    name = family.carried("fixed")
    before = study.replaced.get(name or "")
    if not before or family.verdict(name) == "missing":
        return ""
    found = compare(paired(family.arms[REFERENCE], before))
    if found.mean >= family.versus[name].mean:
        return ""
    rate = next(iter(before.values())).lr
    return (
        f"Tuning, on one seed, gave {label(name)} a learning rate that is worse than the one it had: at {rate:g} the "
        f"default law is ahead of it by {difference(found)} points (not tested)."
    )


def exposure_sentence(study: Study) -> str:
    """The rules that act per prompt, where every prompt has a demonstration."""
    family = study.exposure
    if not family.per_prompt():
        return ""
    single = [name for name in family.options("fixed") if name in family.versus]
    constants = "".join(f"; against {label(name)} it is {clause(family, name)}" for name in single)
    again = study.exposure_confirmation
    if single and single[0] in again.versus:
        constants += f", on confirmation data {clause(again, single[0])}"
    return (
        "Where the solution of every prompt is a demonstration, for all arms, the default law is "
        f"{tally(family, family.per_prompt(), label)}{constants}."
    )


def loss_sentence(study: Study) -> str:
    """In which data sets `gac` is below constants: the one from other data, and the best in hindsight."""
    opponents = {"fixed:carried": "the constant from earlier runs", "fixed:hindsight": "the best constant in hindsight"}
    parts = [_below(study, name, words) for name, words in opponents.items()]
    return " ".join(part for part in parts if part) or "Data set by data set: no constant was searched for yet."


def _below(study: Study, name: str, words: str) -> str:
    halves = study.halves()
    known = {task: in_task(family, name, task) for _, family in halves for task in family.tasks()}
    known = {task: found for task, found in known.items() if found}
    if not known:
        return ""
    lost = [task for task, found in known.items() if found.mean < 0]
    clear = [task for task in lost if known[task].high < 0]
    if not lost:
        return f"In none of {count(len(known), 'data set')} is `gac` below {words}."
    named = f" ({listing(clear)})" if clear else ""
    return (
        f"`gac` is below {words} in {len(lost)} of {count(len(known), 'data set')} "
        f"({listing(lost)}), and in {len(clear)} by more than the noise between seeds{named}, without correction."
    )


def _carried(family: Family, method: str) -> str:
    """How `gac` did against what other data recommend of a method."""
    name = family.carried(method)
    if name is None:
        return "is not compared yet"
    noun = {"fixed": "constant", "sequential": "split of SFT and RL"}[method]
    return f"is, against the {noun} that earlier runs recommend ({label(name)}), {clause(family, f'{method}:carried')}"


def _constants(study: Study) -> str:
    """Against every constant by itself, and against what searches find in the same data."""
    parts = []
    for half, family in study.halves():
        single = [name for name in family.options("fixed") if name in family.versus]
        if single:
            text = f"On {half} data it is {tally(family, single, label)}"
            found = [(words, family.versus.get(f"fixed:{end}")) for words, end in _SEARCHES]
            shown = [f"{difference(versus)} to {words}" for words, versus in found if versus]
            parts.append(text + (f"; untested differences: {listing(shown)}." if shown else "."))
    return " ".join(parts)


def agreement_sentence(study: Study) -> str:
    """Whether the confirmation's differences are those of development."""
    both = agreement(study)
    if not both:
        return "Whether confirmation agrees with development: not yet run."
    first, second = study.development, study.confirmation
    same = sum(a.mean * b.mean > 0 for a, b in both.values())
    inside = sum(b.low <= a.mean <= b.high for a, b in both.values())
    turned = [label(n) for n in both if {first.verdict(n), second.verdict(n)} == {"better", "worse"}]
    kept = sum(first.verdict(n) == second.verdict(n) for n in both)
    rank = spearman([a.mean for a, _ in both.values()], [b.mean for _, b in both.values()])
    text = (
        f"Of {count(len(both), 'comparison')} made on both halves, the sign is the same in {same} and the verdict in "
        f"{kept}, and {inside} of the means on development data lie in the interval of the confirmation"
    )
    text += "" if math.isnan(rank) else f" (rank correlation {rank:.2f})"
    return text + (f"; better turns to worse or back for {listing(turned)}." if turned else "; none turns around.")


def in_task(family: Family, name: str, task: str) -> Comparison | None:
    """`gac` minus an arm in one data set."""
    if name not in family.arms:
        return None
    found = paired(family.arms[REFERENCE], family.arms[name]).get(task)
    return compare({task: found}) if found else None


def _halves(study: Study, text) -> str:
    parts = []
    for half, family in (("development", study.development), ("confirmation", study.confirmation)):
        tasks = len(family.tasks())
        where = count(tasks, f"{half} data set") if tasks else f"{half} data"
        parts.append(f"{text(family)} on {where}")
    return "; it ".join(parts)

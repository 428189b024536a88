"""Which picture shows what: collects the numbers of the study's figures and has them drawn."""

from collections.abc import Iterable
from pathlib import Path
from statistics import fmean

from benchmarks.study import figures
from benchmarks.study.analysis import SIZES, Family, Study, sizes
from benchmarks.study.arms import FOUND, REFERENCE, RL_ALONE, SFT_ALONE, is_form_of_gac, label, mean_over_tasks
from benchmarks.study.measures import Run
from benchmarks.study.tables import LATE, forest_rows, kind, ordered

_CURVES = ("fixed:search", "sequential:search", "sequential:split=0")
"""Arms that share the picture of accuracy over steps with `gac` and the strongest rule."""


def draw(study: Study, folder: Path) -> dict[str, str]:
    """Draws what the data allow; ``name -> alternative text`` of the pictures that are there."""
    drawn = {}
    for name, (text, function) in _PICTURES.items():
        path = folder / f"{name}.png"
        if function(study, path):
            drawn[name] = text
        else:
            path.unlink(missing_ok=True)
    return drawn


def _overview(study: Study, path: Path) -> bool:
    rows = [row for row in forest_rows(study) if _headline(row[0])]
    return _forest(study, rows, path)


def _every_arm(study: Study, path: Path) -> bool:
    return _forest(study, forest_rows(study), path)


def _forest(study: Study, rows: list[tuple[str, str]], path: Path) -> bool:
    panels = [(f"{half} data", family.versus, family.told_apart()) for half, family in study.halves()]
    if panels:
        figures.forest(panels, rows, path, "gac minus arm, points")
    return bool(panels)


def _headline(name: str) -> bool:
    """Searches, ends of the split, rules: what the page begins with."""
    method, _, setting = name.partition(":")
    if not name or is_form_of_gac(name):
        return False
    if method == "sequential":
        return setting == "search" or name in (RL_ALONE, SFT_ALONE)
    return method != "fixed" or "=" not in setting


def _curves(study: Study, path: Path) -> bool:
    tasks = {}
    for _, family in study.halves():
        rules = family.rules()
        strongest = [min(rules, key=lambda name, family=family: family.versus[name].mean)] if rules else []
        for task in family.tasks():
            shown = {}
            for name in (REFERENCE, *_CURVES, *strongest):
                runs = [run for (t, _), run in family.arms.get(name, {}).items() if t == task]
                if runs:
                    shown[label(name)] = _mean_curve([run.accuracy for run in runs])
            tasks[_title(family, task)] = shown
    if tasks:
        figures.curves(tasks, path)
    return bool(tasks)


def _constants(study: Study, path: Path) -> bool:
    tasks = {}
    for _, family in study.halves():
        options = family.options("fixed")
        for task in family.tasks():
            late = {
                float(name.partition("=")[2]): [r.measures.late for (t, _), r in pairs.items() if t == task]
                for name, pairs in options.items()
            }
            late = {mu: values for mu, values in sorted(late.items()) if values}
            if len(late) < 2:
                continue
            gac = [run for (t, _), run in family.arms[REFERENCE].items() if t == task]
            own = [run.measures.late for run in gac]
            mu = mean_over_tasks({(run.task, run.seed): run for run in gac}, lambda run: run.measures.mean_mu)
            tasks[_title(family, task)] = {
                "mu": list(late),
                "mean": [fmean(values) for values in late.values()],
                "low": [min(values) for values in late.values()],
                "high": [max(values) for values in late.values()],
                "warm": fmean(run.measures.warm for run in gac),
                "gac": None if mu is None else (mu, fmean(own), min(own), max(own)),
            }
    if tasks:
        figures.constants(tasks, path)
    return bool(tasks)


def _paths(study: Study, path: Path) -> bool:
    tasks = {}
    for _, family in study.halves():
        best = family.best_constants()
        for task in family.tasks():
            runs = [run for (t, _), run in family.arms[REFERENCE].items() if t == task]
            tasks[_title(family, task)] = {
                "mu": [[(s, m) for s, m in enumerate(run.mu[:-1], start=2) if m is not None] for run in runs],
                "best": best.get(task),
                "statistics": _statistics(runs),
            }
    if tasks:
        figures.mu_paths(tasks, path)
    return bool(tasks)


def _margins(study: Study, path: Path) -> bool:
    families = sizes(study)
    if len(families) < 2:
        return False
    lines: dict[str, dict[str, tuple[float, float, float]]] = {}
    for size, family in families.items():
        for name, found in family.versus.items():
            if not name.endswith(FOUND):
                lines.setdefault(label(name), {})[size] = (found.mean, found.low, found.high)
    figures.margins(lines, [size for size in SIZES if size in families], path)
    return True


def _ablation(study: Study, path: Path) -> bool:
    found = {name: c for name, c in study.ablation.versus.items() if is_form_of_gac(name)}
    rows = [(name, label(name)) for name in sorted(found, key=lambda name: -found[name].mean)]
    if rows:
        figures.forest([("development data", found, study.ablation.told_apart())], rows, path, "gac minus form, points")
    return bool(rows)


def _drift(study: Study, path: Path) -> bool:
    groups = []
    for half, family in study.halves():
        shown = {}
        for name in [name for name in ordered(study) if name in _judged(family)]:
            area = mean_over_tasks(family.arms[name], lambda run: run.measures.kl_area)
            late = mean_over_tasks(family.arms[name], LATE)
            if area and late is not None:
                shown[label(name)] = (kind(name), area, late)
        groups.append((f"{half} data", shown))
    if groups:
        figures.drift(groups, path)
    return bool(groups)


def _judged(family: Family) -> list[str]:
    """`gac` and every single arm, those on all of its cells: means over unlike cells are not set side by side."""
    cells = set(family.arms[REFERENCE])
    return [name for name, pairs in family.arms.items() if cells <= set(pairs) and not name.endswith(FOUND)]


def _title(family: Family, task: str) -> str:
    domain = next(run.domain for (name, _), run in family.arms[REFERENCE].items() if name == task)
    return f"{task} ({domain})"


def _mean_curve(curves: Iterable[tuple[tuple[int, float], ...]]) -> list[tuple[float, float]]:
    tables = [dict(curve) for curve in curves]
    steps = sorted(set.intersection(*(set(table) for table in tables)))
    return [(step, fmean(table[step] for table in tables)) for step in steps]


def _statistics(runs: list[Run]) -> dict[str, list[tuple[float, float]]]:
    """Means over the runs at each step, of what was measured."""
    found: dict[str, dict[float, list[float]]] = {}
    for run in runs:
        statistics = run.record.get("statistics") or {}
        for name in ("sigma_s2", "sigma_r2", "delta_g2"):
            for step, value in zip(statistics.get("step", ()), statistics.get(name, ()), strict=False):
                if isinstance(value, int | float):
                    found.setdefault(name, {}).setdefault(step, []).append(value)
    return {name: [(step, fmean(values)) for step, values in sorted(rows.items())] for name, rows in found.items()}


_PICTURES = {
    "study": ("Late accuracy of gac minus that of other methods, with 95% intervals", _overview),
    "study_forest": ("gac minus every arm", _every_arm),
    "study_curves": ("Accuracy over steps in every data set", _curves),
    "study_constants": ("Late accuracy against the constant mu, with gac at its mean mu", _constants),
    "study_mu": ("mu and the statistics over steps in every data set", _paths),
    "study_size": ("Margin of gac by model size", _margins),
    "study_ablation": ("gac minus its forms with one thing changed", _ablation),
    "study_drift": ("Late accuracy against KL-drift area", _drift),
}

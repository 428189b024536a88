"""A run directory as one page of HTML: its numbers, pictures and what its gradients say."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gac.report import Report
from gac.report.estimates import Estimate, digits
from gac.report.page import Fact, page
from gac.report.pictures import module_pictures, run_pictures
from gac.report.sentences import TITLES
from gac.runs.console import duration
from gac.runs.folder import CONFIG, SUMMARY, read_json, write_text
from gac.runs.watching import WatchedRun

PAGE = "report.html"
"""The page's name beside a run's other files."""

MOST = 800
"""Points of a curve: more are averaged, as no screen is wider."""

_MAPS = (
    "The maps have modules from top to bottom and steps from left to right, and the whole model as a line above. Grey: "
    "not measured, or not to be told from noise. SNR is signal over noise of the gradient of one step; scale is the "
    "noise scale, the batch at which both are equal; noise is the module's share of it."
)


def write_page(directory: Path, report: Report | None, path: Path, *, missing: str = "") -> None:
    """Writes the page of a run.

    Args:
        directory: the run directory, or a history file from one.
        report: what its gradients say; None where it was not measured by module.
        path: where the page goes; it is whole or not there.
        missing: why there is no report.

    Raises:
        ImportError: matplotlib is not there.
        UsageError: the folder is no run directory.
    """
    run = WatchedRun(directory) if directory.is_dir() else None
    records = folded(run.records, MOST) if run else []
    config = _stored(directory / CONFIG)
    summary = _stored(directory / SUMMARY)
    warm = summary.get("warm_start_accuracy")
    text = page(
        str(directory),
        about=run.title.replace("  ", " \u00b7 ") if run else "",
        facts=facts(run, summary, report) if run else (),
        reading=report.reading() if report else (),
        pictures=run_pictures(records, warm) if records else None,
        maps=module_pictures(report.maps()) if report else None,
        tables=report.tables() if report else (),
        notes=[f"{report.headline()}.", _MAPS] if report else [missing] if missing else (),
        command=" ".join(map(str, config.get("command") or ())),
        versions=config.get("versions"),
    )
    write_text(path, text)


def facts(run: WatchedRun, summary: Mapping[str, Any], report: Report | None) -> list[Fact]:
    """The numbers at the top of the page; what is not known is left out."""
    found = [Fact("steps", f"{run.step}" + (f" of {run.total}" if run.total and not run.finished else ""))]
    accuracy = [record["accuracy"] for record in run.records if record.get("accuracy") is not None]
    if accuracy:
        warm = summary.get("warm_start_accuracy")
        text = f"{accuracy[-1]:.3f}" if warm is None else f"{warm:.3f} \u2192 {accuracy[-1]:.3f}"
        late = sum(accuracy[-4:]) / len(accuracy[-4:])
        found.append(Fact("held-out accuracy", text, f"mean of the last four evaluations {late:.3f}"))
    if rewards := _known(run.records, "reward"):
        found.append(Fact("reward", f"{_mean(rewards[-20:]):.3f}", f"{_mean(rewards[:20]):.3f} in the first steps"))
    if mus := _known(run.records, "gac/mu"):
        errors = _known(run.records, "gac/mu_se")
        note = f"mean over the run {_mean(mus):.3f}"
        found.append(
            Fact("mu, weight of SFT", f"{mus[-1]:.3f}", note + (f", standard error {errors[-1]:.2f}" if errors else ""))
        )
    shares = _known(run.records, "gac/overhead")
    share = summary.get("gac_share", shares[-1] if shares else None)
    if share is not None:
        note = "" if run.budget is None else f"of a budget of {100 * run.budget:g}%"
        found.append(Fact("time in GAC", f"{100 * share:.2f}%", note))
    found += _scales(report) if report else []
    if summary.get("seconds") is not None:
        found.append(Fact("total time", duration(summary["seconds"]), f"on {summary.get('device', 'unknown')}"))
    return found


def _scales(report: Report) -> list[Fact]:
    found = []
    for name, title in TITLES.items():
        scale: Estimate = getattr(report.whole, name).noise_scale
        if scale.known and report.counted:
            text = f"{scale.bound}{digits(scale.value, 2)} {report.unit}"
            found.append(Fact(f"noise scale, {title}", text, f"a step has {report.batch[name]:.4g}"))
    return found


def folded(records: Sequence[Mapping[str, Any]], most: int) -> list[dict[str, Any]]:
    """At most `most` records, each the mean over neighbours of the numbers that they have, and the last one's step."""
    width = max(1, math.ceil(len(records) / most))
    found = []
    for begin in range(0, len(records), width):
        part = records[begin : begin + width]
        keys = dict.fromkeys(key for record in part for key in record)
        means = {key: _mean(values) for key in keys if (values := _known(part, key))}
        found.append({**means, "step": part[-1]["step"]})
    return found


def _known(records: Sequence[Mapping[str, Any]], key: str) -> list[float]:
    values = (record.get(key) for record in records)
    return [float(value) for value in values if isinstance(value, (int, float)) and math.isfinite(value)]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _stored(path: Path) -> dict[str, Any]:
    found = read_json(path) if path.is_file() else {}
    return found if isinstance(found, dict) else {}

"""The tables of an audit, on a console or as Markdown."""

from __future__ import annotations

import math

from gac.audit.figures import TOLERANCE, Figures, Mixing
from gac.audit.panel import COEFFICIENT_FORMS
from gac.audit.record import RUN
from gac.audit.replicates import COLUMNS
from gac.report.estimates import Estimate
from gac.runs.console import Reporter

Table = tuple[str, list[str], list[list[str]]]
"""Title, columns, rows of text."""

PAPER_CORRELATION = 0.84
"""What the paper reports between its disagreement proxy and the disagreement (GAC, arXiv 2605.26184)."""


def tables(found: Figures) -> list[Table]:
    """Truth, estimators, what each implies for mu, the paper's proxy, laws, when they were good, and why."""
    return [
        _truth_table(found),
        *(_estimator_table(found, column) for column in COLUMNS),
        _implied_table(found),
        _proxy_table(found),
        _law_table(found),
        _part_table(found),
        _replay_table(found),
    ]


def verdict(found: Figures) -> list[str]:
    """Whether the run's law is near the oracle and beats any constant, in sentences with figures."""
    law = found.laws[RUN]
    rows = {
        "by sums": ("MSE summed over training", law.ratio, found.difference),
        "by ratios": ("mean over training of the ratio", law.mean_ratio, found.mean_difference),
    }
    lines = []
    for name, (what, ratio, difference) in rows.items():
        good = found.verdict[name]
        near = "within" if good["within_tolerance"] else "NOT within"
        beats = "not above" if good["not_above_best_fixed"] else "ABOVE"
        lines.append(
            f"{RUN}, {what}: {_ratio(ratio)} of the oracle's, {near} {100 * (TOLERANCE - 1):.0f}%; {beats} the best "
            f"constant mu, {found.best_fixed[name]:.3f}, by {_ratio(difference)}"
        )
    return lines + [f"{label} left out: the run has no {' and '.join(w)}" for label, w in found.left_out.items()]


def show(found: Figures, reporter: Reporter) -> None:
    """Prints tables and verdict."""
    for title, columns, rows in tables(found):
        reporter.table(title, columns, rows)
    for line in verdict(found):
        reporter.say(line)


def _truth_table(found: Figures) -> Table:
    rows = [[name, e.text(), _number(found.reliability[name])] for name, e in found.truth.items()]
    rows.append(["oracle mu", found.oracle.text(), "-"])
    title = f"truth: mean over {found.points} points of {found.steps} steps, {found.replicates} steps drawn at each"
    return title, ["", "mean", "real share of variance"], rows


def _estimator_table(found: Figures, column: str) -> Table:
    rows = []
    for name, qualities in found.estimators.items():
        q = qualities[column]
        spread = [q.bias.text(percent=True), _percent(q.deviation), _percent(q.drift, signed=True)]
        rows.append([name, *spread, _number(q.single), _number(q.average)])
    title = f"{column}; the standard error that exact reports is {_number(found.reported[column])} of the true one"
    return title, ["estimator", "bias", "error", "in training", "r, step", "r, average"], rows


def _implied_table(found: Figures) -> Table:
    rows = [[name, *_mixing(m)] for name, m in found.implied.items()]
    return "mu from each estimator's expectation: what bias alone costs", ["estimator", *_MIXING], rows


def _proxy_table(found: Figures) -> Table:
    populations = next(iter(found.proxies.values()))
    rows = [[name, *(_number(found.proxies[form][name]) for form in COEFFICIENT_FORMS)] for name in populations]
    title = f"correlation of the disagreement proxy with the disagreement (the paper says {PAPER_CORRELATION})"
    return (
        title,
        ["population", *(form.removeprefix("coefficient").strip(", ") or "paper" for form in COEFFICIENT_FORMS)],
        rows,
    )


def _law_table(found: Figures) -> Table:
    ranked = sorted(found.laws.items(), key=lambda item: item[1].ratio.value)
    return "laws, on this run's parameters", ["law", *_MIXING], [[label, *_mixing(m)] for label, m in ranked]


def _part_table(found: Figures) -> Table:
    parts = next(iter(found.parts.values()))
    rows = [[label, *(f"{by_part[part].value:.3f}" for part in parts)] for label, by_part in found.parts.items()]
    return "MSE over the oracle's in parts of training (sums)", ["steps", *parts], rows


def _replay_table(found: Figures) -> Table:
    rows = [[label, *_mixing(m)] for label, m in found.replays.items()]
    return "law gac over the recorded steps again", ["fed or set otherwise", *_MIXING], rows


_MIXING = ["mu", "off\nby", "MSE,\nsums", "less\nbias", "MSE,\nratios"]


def _mixing(m: Mixing) -> list[str]:
    return [f"{m.mean_mu:.3f}", f"{m.distance:.3f}", _ratio(m.ratio), f"{m.corrected:.3f}", _ratio(m.mean_ratio)]


def _ratio(value: Estimate) -> str:
    """Three decimals: a tenth of a percent; as narrow as eighty columns want it."""
    return f"{value.value:.3f}±{value.se:.3f}".replace("±0.", "±.")


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.2f}"


def _percent(value: float, *, signed: bool = False) -> str:
    return "-" if math.isnan(value) else f"{100 * value:{'+' if signed else ''}.0f}%"

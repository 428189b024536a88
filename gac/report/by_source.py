"""Sources of data in a report: what each gives to the gradient, as a table, a sentence and JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from gac.report.estimates import MEASURABLE, Estimate
from gac.sequences.sources import SourceRow, SourceTable
from gac.statistics.branch import Branch

MOST = 20
"""Sources with a line of their own in the table: those of the most contributions."""

BETWEEN = 8
"""Sources up to which the table has their cosines with each other."""

Table = tuple[list[str], list[list[str]]]


def source_table(sources: SourceTable) -> Table:
    """Columns and rows: noise of a contribution, square and length of the mean, cosines with the RL gradient."""
    order = sorted(range(len(sources.rows)), key=lambda k: -sources.rows[k].n)[:MOST]
    others = order if 1 < len(sources.rows) <= BETWEEN else []
    names = [_name(sources, k) for k in range(len(sources.rows))]
    columns = ["source", "branch", "steps", "n", "noise of one", "signal |g|^2", "norm |g|", "cosine with RL"]
    columns += [f"with {names[k]}" for k in others]
    rows = []
    for k in order:
        row = sources.rows[k]
        cells = [names[k], row.branch.value, str(row.steps), str(row.n)]
        cells += [Estimate(row.noise, row.noise_se).text(), Estimate(row.signal, row.signal_se).text()]
        cells += [norm_of(row).text(), Estimate(row.cosine, row.cosine_se).text()]
        between = ((float(sources.cosines[k, j]), float(sources.cosine_errors[k, j])) for j in others)
        rows.append(cells + [Estimate(*pair).text() for pair in between])
    if len(sources.rows) > MOST:
        rows.append([f"and {len(sources.rows) - MOST} more", *[""] * (len(columns) - 1)])
    return columns, rows


def source_sentence(sources: SourceTable) -> str:
    """Which sources of demonstrations point the way of the RL gradient, and which against it."""
    signs: dict[str, list[str]] = {"with": [], "against": [], "unknown": []}
    for k, row in enumerate(sources.rows):
        if row.branch is Branch.SFT:
            known = not math.isnan(row.cosine_se) and abs(row.cosine) > MEASURABLE * row.cosine_se
            signs["unknown" if not known else "with" if row.cosine > 0 else "against"].append(_name(sources, k))
    told = {
        "with": "point the way of the RL gradient",
        "against": "point against the RL gradient",
        "unknown": "are not told apart from a right angle to it",
    }
    parts = [f"{_some(names)} {told[sign]}" for sign, names in signs.items() if names]
    return "" if not parts else f"Sources of demonstrations, by {MEASURABLE:g} standard errors: {'; '.join(parts)}."


def norm_of(row: SourceRow) -> Estimate:
    """Length of a source's mean gradient; unknown where its square is not above zero. The error is ``se / (2 |g|)``."""
    if not row.signal > 0:
        return Estimate()
    norm = math.sqrt(row.signal)
    return Estimate(norm, row.signal_se / (2 * norm))


def to_json(sources: SourceTable) -> dict[str, Any]:
    """All numbers, as :mod:`json` takes them; what is not known is None. Labels become text."""
    rows = [
        {
            "label": str(row.label),
            "branch": row.branch.value,
            "steps": row.steps,
            "n": row.n,
            "noise": Estimate(row.noise, row.noise_se).as_json(),
            "signal": Estimate(row.signal, row.signal_se).as_json(),
            "norm": norm_of(row).as_json(),
            "cosine": Estimate(row.cosine, row.cosine_se).as_json(),
        }
        for row in sources.rows
    ]
    pairs = [
        [Estimate(*pair).as_json() for pair in zip(values, errors, strict=True)]
        for values, errors in zip(sources.cosines.tolist(), sources.cosine_errors.tolist(), strict=True)
    ]
    return {"rows": rows, "cosines": pairs}


def from_json(content: Mapping[str, Any]) -> SourceTable:
    """What :func:`to_json` made."""
    number = lambda x: math.nan if x is None else float(x)
    rows = []
    for row in content["rows"]:
        told = {name: number(row[name]["value"]) for name in ("noise", "signal", "cosine")}
        told |= {f"{name}_se": number(row[name]["se"]) for name in ("noise", "signal", "cosine")}
        rows.append(SourceRow(row["label"], Branch(row["branch"]), int(row["steps"]), int(row["n"]), **told))
    read = lambda key: torch.tensor(
        [[number(cell[key]) for cell in line] for line in content["cosines"]], dtype=torch.float64
    ).reshape(len(rows), len(rows))
    return SourceTable(tuple(rows), read("value"), read("se"))


def _name(sources: SourceTable, k: int) -> str:
    """A label, with its branch where both have it."""
    row = sources.rows[k]
    twice = sum(other.label == row.label for other in sources.rows) > 1
    return f"{row.label} ({row.branch.value})" if twice else str(row.label)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= 5 else f"{', '.join(names[:5])} and {len(names) - 5} more"

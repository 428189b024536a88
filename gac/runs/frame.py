"""One look at a run, as a terminal shows it: mu with its band, statistics, reward, overhead beside the budget."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from gac.report.estimates import Estimate, digits
from gac.runs.characters import band_chart, columns_of, gauge, sparkline
from gac.runs.console import duration
from gac.runs.watching import WatchedRun

_LATE = 20
"""Measured steps over which late means are taken."""


class Line(NamedTuple):
    """A row of the table.

    Attributes:
        name: what it is called. key: of the records; its standard error has ``_se`` behind.
        style: of rich.
        decades: whether the history is drawn by its logarithm.
        newest: whether a value says enough alone; else late ones are averaged.
    """

    name: str
    key: str
    style: str
    decades: bool = False
    newest: bool = False


LINES = (
    Line("reward", "reward", "green"),
    Line("held-out accuracy", "accuracy", "green", newest=True),
    Line("evaluation reward", "eval_reward", "green", newest=True),
    Line("aim alpha", "gac/alpha", "cyan", newest=True),
    Line("demonstrations' weight", "gac/sft_weight", "cyan"),
    Line("SFT loss", "gac/sft_loss", "blue"),
    Line("SFT noise", "gac/sigma_s2", "blue", decades=True),
    Line("RL noise", "gac/sigma_r2", "yellow", decades=True),
    Line("disagreement", "gac/delta_g2", "magenta"),
    Line("cosine", "gac/cosine", "magenta"),
    Line("informative groups", "gac/informative_groups", "green"),
    Line("KL from the start", "kl", "cyan"),
)


def frame(run: WatchedRun, *, width: int, height: int, now: float, plain: bool = False) -> Any:
    """What rich prints of a run.

    Args:
        run: the run.
        width, height: of the terminal, in characters; the chart takes what the rows leave.
        now: seconds since the epoch, for the time since the newest step.
        plain: with characters of ASCII alone.
    """
    from rich.console import Group

    parts = [*_head(run, width), _progress(run, width, now, plain)]
    if not run.records:
        return Group(*parts, _text("waiting for the first step"))
    rows = [line for line in LINES if _points(run.records, line.key)]
    notes = _notes(run)
    room = height - len(rows) - len(notes) - 11
    parts += _mu_chart(run.records, width, min(max(room, 4), 12), plain)
    parts += [_table(run.records, rows, width, plain), *_overhead(run, width, plain), *notes]
    return Group(*parts)


def _text(text: str, style: str = "") -> Any:
    from rich.text import Text

    return Text(text, style=style, no_wrap=True, overflow="crop")


def _head(run: WatchedRun, width: int) -> list[Any]:
    """The folder, and what the run is: beside it or below."""
    line = _text(str(run.folder), "bold")
    if len(line) + len(run.title) + 2 > width:
        return [line, _text(run.title, "dim")]
    return [line.append(f"  {run.title}" if run.title else "", "dim")]


def _progress(run: WatchedRun, width: int, now: float, plain: bool) -> Any:
    total = run.total
    text = f"step {run.step}" + (f" of {total}" if total else "")
    seconds = [record.get("seconds") for record in run.records[-_LATE:]]
    told = [value for value in seconds if isinstance(value, (int, float))]
    if told:
        each = sum(told) / len(told)
        text += f"   {_seconds(each)} a step"
        ended = [record.get("eval_seconds") or 0.0 for record in run.records[-_LATE:]]
        if total and run.step < total:
            text += f"   {duration((each + sum(ended) / len(ended)) * (total - run.step))} left"
    if run.finished:
        text += "   finished"
    elif run.records and (age := now - run.written()) > 10 * (sum(told) / len(told) if told else 6.0) and age > 10:
        text += f"   no step for {duration(age)}"
    if not total:
        return _text(text)
    room = max(min(width - len(text) - 3, 40), 0)
    done = round(room * min(run.step / total, 1.0))
    line = _text("")
    line.append(("#" if plain else "━") * done, "green")
    line.append(("." if plain else "─") * (room - done), "dim")
    line.append("   " + text if room else text)
    return line


def _mu_chart(records: Sequence[Mapping[str, Any]], width: int, height: int, plain: bool) -> list[Any]:
    """mu over the steps, over the law's estimate with its standard error."""
    mu, raw = _points(records, "gac/mu"), _points(records, "gac/mu_raw")
    if not mu:
        return [_text("no mu in these records")]
    errors = dict(_points(records, "gac/mu_se"))
    band = [(step, value - errors[step], value + errors[step]) for step, value in raw if step in errors]
    head = _text("\nmu ")
    head.append(f"{mu[-1][1]:.3f}", "bold cyan")
    head.append(", weight of the SFT branch")
    if raw and raw[-1][0] in errors:
        sign = "+-" if plain else "±"
        head.append(f"; estimate {raw[-1][1]:.3f} {sign} {errors[raw[-1][0]]:.3f}", "dim")
    chart = band_chart(mu, band, max(width - 6, 8), height, plain=plain)
    lines = [head]
    for row, cells in enumerate(chart):
        label = {0: "1.0", height - 1: "0.0"}.get(row, "0.5" if row == height // 2 and height % 2 else "")
        line = _text(f"{label:>4} ", "dim")
        for cell in cells:
            line.append(cell.text, {"line": "bold cyan", "band": "dim cyan"}.get(cell.shows, ""))
        lines.append(line)
    steps = [step for step, *_ in (*mu, *band)]
    first, last = f"{min(steps):g}", f"step {max(steps):g}"
    lines.append(_text(" " * 5 + first + last.rjust(max(width - 6 - len(first), len(last) + 1)), "dim"))
    return lines


def _table(records: Sequence[Mapping[str, Any]], rows: Sequence[Line], width: int, plain: bool) -> Any:
    from rich.table import Table

    ranged = width >= 72
    table = Table(box=None, padding=(0, 1), pad_edge=False, header_style="dim")
    table.add_column("", no_wrap=True)
    table.add_column(f"late mean ({_LATE})", justify="right", no_wrap=True)
    table.add_column("over the steps", no_wrap=True)
    if ranged:
        table.add_column("from, to", no_wrap=True, style="dim")
    texts = [_late(records, line, plain) for line in rows]
    beside = max((len(line.name) for line in rows), default=0) + max(14, *map(len, texts), 14)
    room = min(max(width - beside - (28 if ranged else 6), 8), 60)
    for line, text in zip(rows, texts, strict=True):
        columns, low, high = _history(records, line, room)
        back: Callable[[float], float] = (lambda x: 10.0**x) if line.decades else (lambda x: x)
        cells = [_text(line.name), _text(text), _text(sparkline(columns, low, high, plain=plain), line.style)]
        if ranged:
            cells.append(f"{digits(back(low), 2)}, {digits(back(high), 2)}" + (" (log)" if line.decades else ""))
        table.add_row(*cells)
    return table


def _late(records: Sequence[Mapping[str, Any]], line: Line, plain: bool) -> str:
    """The mean of the values measured last, with its standard error where theirs are known; evaluations as they are."""
    points = _points(records, line.key)[-1 if line.newest else -_LATE :]
    errors = dict(_points(records, f"{line.key}_se"))
    known = [errors[step] ** 2 for step, _ in points if step in errors]
    error = math.sqrt(sum(known)) / len(points) if len(known) == len(points) else math.nan
    text = Estimate(sum(value for _, value in points) / len(points), error).text()
    return text.replace("±", "+-") if plain else text


def _history(records: Sequence[Mapping[str, Any]], line: Line, count: int) -> tuple[list[float], float, float]:
    """Means over parts of the steps, and the lowest and highest of the picture."""
    points = _points(records, line.key)
    columns = columns_of(points, count, points[0][0], points[-1][0])
    if line.decades:
        columns = [math.log10(value) if value > 0 else math.nan for value in columns]
    known = [value for value in columns if not math.isnan(value)] or [0.0]
    return columns, min(known), max(known)


def _overhead(run: WatchedRun, width: int, plain: bool) -> list[Any]:
    """The share of the time that GAC takes, beside the budget for it."""
    shares = _points(run.records, "gac/overhead")
    if shares:
        share = shares[-1][1]
    else:
        both = [(r.get("gac/seconds"), r.get("seconds")) for r in run.records[-_LATE:]]
        known = [(own, all_of) for own, all_of in both if own is not None and all_of]
        if not known:
            return []
        share = sum(own for own, _ in known) / sum(all_of for _, all_of in known)
    measured = sum(1 for record in run.records if (record.get("gac/n_s") or 0) + (record.get("gac/n_r") or 0) > 0)
    line = _text(f"\n{100 * share:.2f}% of the time in GAC")
    if run.budget is not None:
        line.append(f", of a budget of {100 * run.budget:g}%  ")
        within = share <= 1.1 * run.budget
        line.append(gauge(share, run.budget, 16, plain=plain), "green" if within else "red")
    told = f"   {measured} of {len(run.records)} steps measured"
    if len(line) + len(told) - 1 > width:  # the line begins with a break
        return [line, _text(told.strip(), "dim")]
    line.append(told, "dim")
    return [line]


def _notes(run: WatchedRun) -> list[Any]:
    """What should not be overlooked."""
    newest = run.records[-1]
    notes = []
    if newest.get("gac/skipped"):
        notes.append(f"{newest['gac/skipped']:g} steps with non-finite gradients were left out")
    for letter, name in (("s", "SFT"), ("r", "RL")):
        if newest.get(f"gac/silent_{letter}"):
            notes.append(f"the {name} gradient of the newest step is zero")
    return [_text(note, "yellow") for note in notes]


def _points(records: Sequence[Mapping[str, Any]], key: str) -> list[tuple[int, float]]:
    """Steps and values where `key` was measured."""
    found = [(record["step"], record.get(key)) for record in records]
    return [(step, float(value)) for step, value in found if isinstance(value, (int, float)) and math.isfinite(value)]


def _seconds(value: float) -> str:
    return f"{1000 * value:.0f} ms" if value < 1 else f"{value:.3g} s"

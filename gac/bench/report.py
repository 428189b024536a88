"""Results for eyes and for machines: rich tables, Markdown, JSON."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gac.bench.figures import Figure, figures

FORMAT = 1
"""Version of the layout of result files."""

_PEERS = (("eager", "eager"), ("foreach", "foreach"), ("compile", "compile"))


def write_json(path: Path, results: dict) -> None:
    """Writes results as one file, whole or not at all; numbers that JSON lacks become null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(_rounded(results), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(part, path)


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(item) for item in value]
    return value


def seconds(value: float) -> str:
    """``0.00123`` -> ``1.23 ms``."""
    for unit, scale in (("us", 1e-6), ("ms", 1e-3)):
        if value < 1000 * scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value:.3g} s"


def kernel_columns(gpu: bool) -> list[str]:
    """Columns of the kernels' table."""
    ratios = ["over eager", "over foreach", "over compile"]
    host = ["host p50", "wall p50"] if gpu else []
    return ["operation", "p20", "p50", "p80", *host, "GB/s", "x read", "% of read", *ratios, "note"]


def kernel_row(row: dict, gpu: bool) -> list[str]:
    """One row as text. With a red gate there is nothing to compare, and the note says why."""
    name = f"{row['operation']} {row['dtype']} {row['label']}"
    ours = row.get("variants", {}).get("gac")
    if ours is None:
        return [name, *[""] * (len(kernel_columns(gpu)) - 2), row["note"]]
    times = [seconds(ours[key]) for key in (("p20", "p50", "p80", "host", "wall") if gpu else ("p20", "p50", "p80"))]
    if not row["gate"]["ok"]:
        note = f"GATE RED: error {row['gate']['error']:.3g} times its bound"
        return [name, *times, *[""] * 6, note]
    numbers = [f"{row['gbps']:.3g}", f"{row['times_read']:.2f}", f"{row['percent_of_read']:.0f}"]
    return [name, *times, *numbers, *[_speedup(row, kind, gpu) for kind, _ in _PEERS], row["note"]]


def _speedup(row: dict, kind: str, gpu: bool) -> str:
    """The speed-up over the fastest peer of a kind (end to end on a GPU)."""
    found = row.get("speedup_wall" if gpu else "speedup", {})
    values = [value for name, value in found.items() if name.startswith(kind)]
    return f"{min(values):.2f}x" if values else "-"


def step_columns() -> list[str]:
    """Columns of the whole-step table."""
    return ["model, tokens", "plain step", "in GAC, every step", "every 10th", "whole step, every step", "every 10th",
            "noise of a step", "sketch / gradients"]  # fmt: skip


def step_row(result: dict) -> list[str]:
    """One configuration as text."""
    one, ten = result["intervals"]["1"], result["intervals"]["10"]
    percent = lambda value, digits=3: f"{100 * value:.{digits}f}%"
    return [
        f"{result['model']} {result['dtype']}, {result['tokens']}{_of(result)}",
        seconds(result["arms"]["plain"]["p50"]),
        percent(one["share_in_gac"]),
        percent(ten["share_in_gac"]),
        percent(one["whole_step"]),
        percent(ten["whole_step"]),
        percent(one["noise"], 1),
        percent(result["sketch_bytes"] / result["gradient_bytes"], 2),
    ]


def _of(result: dict) -> str:
    """The estimator, where it is that of sequences: the others are chosen by size."""
    return ", sequences" if result.get("estimator") == "sequence" else ""


def figure_row(figure: Figure) -> list[str]:
    """One figure as text."""
    return [figure.name, figure.target, figure.value, "yes" if figure.ok else "NO"]


FIGURE_COLUMNS = ("figure", "to reach", "measured", "reached")


def tables(results: dict) -> list[tuple[str, Sequence[str], list[list[str]]]]:
    """All tables of the results: title, columns, rows."""
    gpu = results["device_type"] == "cuda"
    found: list[tuple[str, Sequence[str], list[list[str]]]] = []
    if results.get("kernels"):
        rows = [kernel_row(row, gpu) for row in results["kernels"]]
        found.append(("Kernels (speed-ups over the fastest peer of each kind)", kernel_columns(gpu), rows))
    if results.get("step"):
        found.append(("Whole steps", step_columns(), [step_row(result) for result in results["step"]]))
    reached = [figure_row(figure) for figure in figures(results)]
    if reached:
        found.append(("Figures to reach", FIGURE_COLUMNS, reached))
    return found


def markdown(results: dict) -> str:
    """All tables as Markdown, figures first, with what they were measured on."""
    facts = results["facts"]
    lines = [
        f"Measured {facts['date']} on {facts['device']} ({facts['threads']} threads, {facts['isa']}), "
        f"torch {facts['versions']['torch']}, by `{facts['command']}`.",
        f"Read limit: {results['read_limit']}.",
    ]
    for title, columns, rows in reversed(tables(results)):
        lines += [f"### {title}", _markdown_table(columns, rows)]
    return "\n\n".join(lines) + "\n"


def _markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = ["| " + " | ".join(columns) + " |", "|" + "|".join(["---", *["---:"] * (len(columns) - 1)]) + "|"]
    return "\n".join(head + ["| " + " | ".join(row) + " |" for row in rows])


def show(results: dict, console: Any = None) -> None:
    """Prints all tables."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    console = console or Console()
    if not console.is_terminal:
        console = Console(file=console.file, width=max(console.width, 160))
    for title, columns, rows in tables(results):
        table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
        for index, column in enumerate(columns):
            table.add_column(
                column, justify="left" if index in (0, len(columns) - 1) else "right", no_wrap=index < len(columns) - 1
            )
        for row in rows:
            style = "bold red" if row[-1].startswith("GATE RED") or row[-1] == "NO" else None
            table.add_row(*row, style=style)
        console.print(table)

"""Tables of a report as plain text."""

from __future__ import annotations

from collections.abc import Sequence

from gac.report.estimates import Estimate, digits


def share_text(share: Estimate) -> str:
    """Without its error: noise is the number that is known best."""
    return f"{digits(100 * share.value, 2)}%" if share.known else "-"


def text_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns under each other: the first to the left, numbers to the right."""
    widths = [max(len(row[k]) for row in (columns, *rows)) for k in range(len(columns))]
    line = lambda row: "  ".join(
        cell.ljust(width) if k == 0 else cell.rjust(width)
        for k, (cell, width) in enumerate(zip(row, widths, strict=True))
    ).rstrip()
    return "\n".join(["", line(columns), "  ".join("-" * width for width in widths), *map(line, rows), ""])

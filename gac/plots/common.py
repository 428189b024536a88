"""What the pictures share: colours, settings, curves of records, legends below their panels."""

from collections.abc import Mapping, Sequence
from typing import Any

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#555555", "#000000")
STYLES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)))
SETTINGS = {
    "figure.dpi": 130,
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.6,
    "legend.frameon": True,  # white over curves, without a line: "best" finds no free place in a busy panel
    "legend.edgecolor": "none",
    "legend.framealpha": 0.85,
    "legend.fontsize": 8,
    "lines.linewidth": 1.6,
}
"""matplotlib's parameters for every picture of the project."""

Record = Mapping[str, Any]


def pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")  # no display is needed
    import matplotlib.pyplot as plt

    return plt


def points_of(records: Sequence[Record], key: str) -> list[tuple[int, float]]:
    """Steps and values where `key` was measured."""
    return [(record["step"], record[key]) for record in records if record.get(key) is not None]


def smooth(points: Sequence[tuple[int, float]], weight: float = 0.9) -> list[tuple[int, float]]:
    """Bias-corrected moving average, for the eye only."""
    out, mean, mass = [], 0.0, 0.0
    for step, value in points:
        mean, mass = weight * mean + (1 - weight) * value, weight * mass + (1 - weight)
        out.append((step, mean / mass))
    return out


def smooth_with_band(
    values: Sequence[tuple[int, float]], errors: Mapping[int, float], weight: float = 0.9
) -> list[tuple[int, float, float]]:
    """Steps, moving averages as :func:`smooth` has them, and their standard errors (of independent steps)."""
    out, mean, variance, mass = [], 0.0, 0.0, 0.0
    for step, value in values:
        mean, mass = weight * mean + (1 - weight) * value, weight * mass + (1 - weight)
        error = errors.get(step)
        known = variance if error is None else error**2  # before the second measurement: as the average so far
        variance = weight**2 * variance + (1 - weight) ** 2 * known
        out.append((step, mean / mass, variance**0.5 / mass))
    return out


def legend_below(
    axis: Any,
    handles: Sequence[Any] | None = None,
    labels: Sequence[str] | None = None,
    *,
    columns: int = 4,
    has_label: bool | None = None,
) -> None:
    """Puts the legend under a panel, where no curve runs.

    Args:
        handles, labels: of the entries; None: those of the axis.
        columns: of entries.
        has_label: whether the horizontal axis has a label there; None: in the last row alone.
    """
    if handles is None or labels is None:
        handles, labels = axis.get_legend_handles_labels()
    if has_label is None:
        has_label = axis.get_subplotspec().is_last_row()
    if handles:
        where = {
            "loc": "upper left",
            "bbox_to_anchor": (-0.02, -0.19 if has_label else -0.04),
        }
        axis.legend(handles, labels, ncols=columns, handlelength=2.4, columnspacing=1.2, borderaxespad=0.0, **where)


def draw_line(axis: Any, points: Sequence[tuple[int, float]], label: str | None, **style: Any) -> None:
    if points:
        axis.plot(*zip(*points, strict=True), label=label, **style)


def draw_noisy_line(axis: Any, points: Sequence[tuple[int, float]], label: str, **style: Any) -> None:
    """The raw values, faint, under their moving average."""
    draw_line(axis, points, None, color=style["color"], alpha=0.22, linewidth=0.7)
    draw_line(axis, smooth(points), label, **style)

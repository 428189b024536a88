"""Heat maps of modules over steps."""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from gac.plots.common import SETTINGS, pyplot


def draw_modules(
    maps: Mapping[str, Any], path: Any, *, title: str = "", names: Sequence[str] = (), file_format: str | None = None
) -> None:
    """Modules over steps as heat maps: disagreement, cosine, noise of both branches; the whole model above each.

    Args:
        maps: what :meth:`gac.report.Report.maps` returns. A map without any number is left out.
        path: where the picture goes, or a file; the suffix says in which format.
        title: a line above all panels.
        names: of the maps to draw; by default all, with a note on what is grey.
        file_format: such as ``"svg"``, where `path` is a file.
    """
    panels = [(name, *_PANELS[name]) for name in names or _PANELS if _any_number(maps[name][0])]
    missing = [name.replace("_", " of ") for name in names or _PANELS if not _any_number(maps[name][0])]
    if not panels:
        raise ValueError("draw_modules: nothing was measurable in any module; measure more steps")
    plt = pyplot()
    labels, steps = maps["labels"], maps["steps"]
    height = min(max(2.0, 0.155 * len(labels)), 24.0)
    size = (1.6 + 3.3 * len(panels), height + 2.6)
    with plt.rc_context(SETTINGS | {"axes.grid": False}):
        figure, axes = plt.subplots(
            2, len(panels), figsize=size, layout="constrained", squeeze=False, height_ratios=(1.0, height), sharex="col"
        )
        for (line, image), (name, heading, above, colours, limits) in zip(axes.T, panels, strict=True):
            grid, whole = maps[name]
            _whole_panel(line, steps, whole, heading, above, limits)
            _heat_panel(plt, figure, image, steps, grid, colours, limits)
        _module_ticks(axes[1, 0], labels, height)
        for image in axes[1, 1:]:
            image.set_yticks([])
        note = "grey: not measured, or not to be told from noise"
        note += f"; so everywhere, and left out: {', '.join(missing)}" if missing else ""
        if not names:
            figure.supxlabel(note, x=0.01, ha="left", fontsize=7)
        figure.get_layout_engine().set(w_pad=0.08)
        if title:
            figure.suptitle(title, x=0.01, ha="left", fontsize=11)
        figure.savefig(path, format=file_format)
        plt.close(figure)


_PANELS = {
    "disagreement": ("Disagreement: module's share", "part of distance", "viridis", (0.0, None)),
    "cosine": ("Cosine between the branches", "whole model", "RdBu", (-1.0, 1.0)),
    "noise_sft": ("SFT: noise in |G|\u00b2", "whole model", "cividis", (0.0, 1.0)),
    "noise_rl": ("RL: noise in |G|\u00b2", "whole model", "cividis", (0.0, 1.0)),
}
"""For each map: heading, what the line above it shows, colours, limits (None: the map's own)."""


def _any_number(rows: Sequence[Sequence[float]]) -> bool:
    return any(math.isfinite(value) for row in rows for value in row)


def _whole_panel(
    axis: Any, steps: Sequence[float], values: Sequence[float], heading: str, what: str, limits: Any
) -> None:
    axis.set_title(heading)
    axis.plot(steps, values, color="#333333", linewidth=1.2, marker="." if len(steps) < 3 else None)
    known = [value for value in values if math.isfinite(value)]
    axis.set_ylim(min([limits[0], *known]) - 0.05, max([1.0, *known]) + 0.05)
    axis.set_ylabel(what, fontsize=7)
    axis.tick_params(labelsize=7)
    if limits[0] < 0:
        axis.axhline(0, color="#999999", linewidth=0.6)


def _heat_panel(
    plt: Any, figure: Any, axis: Any, steps: Sequence[float], grid: Sequence[Sequence[float]], colours: str, limits: Any
) -> None:
    """Grey where nothing is known. Each column reaches half-way to its neighbours."""
    low, high = limits
    if high is None:
        found = sorted(value for row in grid for value in row if math.isfinite(value))
        high = max(found[int(0.99 * (len(found) - 1))], 1e-9) if found else 1.0
    middles = [(a + b) / 2 for a, b in pairwise(steps)]
    first, last = (
        (1.5 * steps[0] - 0.5 * steps[1], 1.5 * steps[-1] - 0.5 * steps[-2]) if middles else (0.0, 2 * steps[0])
    )
    axis.set_facecolor("#d0d0d0")
    masked = [[value if math.isfinite(value) else math.nan for value in row] for row in grid]
    edges = range(len(grid) + 1)
    drawn = axis.pcolormesh([first, *middles, last], edges, masked, cmap=colours, vmin=low, vmax=high, rasterized=True)
    axis.invert_yaxis()
    axis.set_xlabel("optimizer step")
    axis.tick_params(labelsize=8)
    ticks = plt.MaxNLocator(5) if limits[1] is None else [low + (high - low) * k / 4 for k in range(5)]
    bar = figure.colorbar(drawn, ax=axis, location="bottom", fraction=0.04, pad=0.02, aspect=30, ticks=ticks)
    bar.ax.tick_params(labelsize=7)
    bar.outline.set_visible(False)


def _module_ticks(axis: Any, labels: Sequence[str], height: float) -> None:
    """All labels where they have room, else every second, third, ..."""
    room = max(1, math.ceil(len(labels) * 0.13 / height))
    shown = range(0, len(labels), room)
    axis.set_yticks([index + 0.5 for index in shown], [labels[index] for index in shown], fontsize=7)

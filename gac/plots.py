"""Pictures of one run and of several, drawn with matplotlib from the records of metrics.jsonl.

Colours are Okabe and Ito's, which stay apart for colour-blind readers; lines that share a panel also differ in style.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#555555", "#000000")
_STYLES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)))
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


def draw_run(records: Sequence[Record], summary: Mapping[str, Any], path: str | Path, *, title: str = "") -> None:
    """One run as a PNG: accuracy and reward; mu; the three statistics; branch gradient norms and their cosine.

    Args:
        records: lines of metrics.jsonl, at least one.
        summary: needs ``warm_start_accuracy``.
        path: where the PNG goes.
        title: a line above all panels.
    """
    if not records:
        raise ValueError("draw_run: no records to draw")
    plt = _pyplot()
    with plt.rc_context(SETTINGS):
        figure, axes = plt.subplots(2, 2, figsize=(9.2, 6.8), layout="constrained", sharex=True)
        for axis, draw in zip(axes.flat, RUN_PANELS.values(), strict=True):
            draw(axis, records, summary["warm_start_accuracy"])
        for axis in axes[1]:
            axis.set_xlabel("optimizer step")
        if title:
            figure.suptitle(title, x=0.01, ha="left", fontsize=11)
        figure.savefig(path)
        plt.close(figure)


def draw_comparison(runs: Mapping[str, Sequence[Mapping[str, Any]]], path: str | Path, *, title: str = "") -> None:
    """Several laws as a PNG: held-out accuracy and mu over steps, final accuracy of every run.

    Args:
        runs: for each law the runs of all seeds, each with ``records`` (lines of metrics.jsonl) and ``summary``.
            Lines are means over seeds and bands go from the lowest to the highest seed.
        path: where the PNG goes.
        title: a line above all panels.
    """
    if not runs or not all(runs.values()):
        raise ValueError("draw_comparison: every law needs at least one run")
    plt = _pyplot()
    with plt.rc_context(SETTINGS):
        figure, axes = plt.subplots(1, 3, figsize=(12, 3.9), layout="constrained", width_ratios=(1.15, 1.15, 0.9))
        for index, (law, seeds) in enumerate(runs.items()):
            style = {"color": COLOURS[index % len(COLOURS)], "linestyle": _STYLES[index % len(_STYLES)]}
            curves = [[(0, s["summary"]["warm_start_accuracy"]), *_points(s["records"], "accuracy")] for s in seeds]
            _band(axes[0], curves, law, style)
            _band(axes[1], [_points(s["records"], "gac/mu") for s in seeds], law, style)
        for axis, name in ((axes[0], "Held-out accuracy"), (axes[1], "mu, weight of the SFT branch")):
            axis.set_title(name)
            axis.set_xlabel("optimizer step")
        axes[1].set_ylim(-0.02, 1.02)
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=6, handlelength=3)  # no curve runs there
        _final_panel(axes[2], runs)
        if title:
            figure.suptitle(title, x=0.01, ha="left", fontsize=11)
        figure.savefig(path)
        plt.close(figure)


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
    plt = _pyplot()
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


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")  # no display is needed
    import matplotlib.pyplot as plt

    return plt


def _points(records: Sequence[Record], key: str) -> list[tuple[int, float]]:
    """Steps and values where `key` was measured."""
    return [(record["step"], record[key]) for record in records if record.get(key) is not None]


def _smooth(points: Sequence[tuple[int, float]], weight: float = 0.9) -> list[tuple[int, float]]:
    """Bias-corrected moving average, for the eye only."""
    out, mean, mass = [], 0.0, 0.0
    for step, value in points:
        mean, mass = weight * mean + (1 - weight) * value, weight * mass + (1 - weight)
        out.append((step, mean / mass))
    return out


def _smooth_with_band(
    values: Sequence[tuple[int, float]], errors: Mapping[int, float], weight: float = 0.9
) -> list[tuple[int, float, float]]:
    """Steps, moving averages as :func:`_smooth` has them, and their standard errors (of independent steps)."""
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


def _line(axis: Any, points: Sequence[tuple[int, float]], label: str | None, **style: Any) -> None:
    if points:
        axis.plot(*zip(*points, strict=True), label=label, **style)


def _noisy_line(axis: Any, points: Sequence[tuple[int, float]], label: str, **style: Any) -> None:
    """The raw values, faint, under their moving average."""
    _line(axis, points, None, color=style["color"], alpha=0.22, linewidth=0.7)
    _line(axis, _smooth(points), label, **style)


def _accuracy_panel(axis: Any, records: Sequence[Record], warm: float | None) -> None:
    axis.set_title("Held-out accuracy and training reward")
    accuracy: list[tuple[int, float]] = _points(records, "accuracy")
    if warm is not None:
        axis.axhline(warm, color=COLOURS[6], linestyle=":", linewidth=1.2, label="after the warm start")
        accuracy = [(0, warm), *accuracy]
    _noisy_line(axis, _points(records, "reward"), "reward", color=COLOURS[1], linestyle="--")
    _line(axis, accuracy, "accuracy", color=COLOURS[0], marker="o", markersize=3)
    axis.set_ylim(-0.02, 1.02)
    legend_below(axis)


def _mu_panel(axis: Any, records: Sequence[Record], warm: float | None) -> None:
    axis.set_title("mu, weight of the SFT branch")
    raw, error = _points(records, "gac/mu_raw"), dict(_points(records, "gac/mu_se"))
    _line(axis, raw, "estimate, with its standard error", color=COLOURS[5], linewidth=1.0)
    low = [max(value - error.get(step, 0.0), 0.0) for step, value in raw]
    high = [min(value + error.get(step, 0.0), 1.0) for step, value in raw]
    axis.fill_between([step for step, _ in raw], low, high, color=COLOURS[5], alpha=0.2, linewidth=0)
    _line(axis, _points(records, "gac/prior"), "prior", color=COLOURS[4], linestyle="--")
    _line(axis, _points(records, "gac/mu"), "mu", color=COLOURS[0], linewidth=2.0)
    axis.set_ylim(-0.02, 1.02)
    legend_below(axis)


def _statistics_panel(axis: Any, records: Sequence[Record], warm: float | None) -> None:
    axis.set_title("Gradient statistics with standard errors")
    panels = (
        ("gac/sigma_s2", "SFT noise", COLOURS[0], "-"),
        ("gac/sigma_r2", "RL noise", COLOURS[1], "--"),
        ("gac/delta_g2", "disagreement", COLOURS[2], "-."),
    )
    width = 0.0
    for key, label, colour, style in panels:
        points = _smooth_with_band(_points(records, key), dict(_points(records, f"{key}_se")))
        if points:
            steps, means, errors = zip(*points, strict=True)
            axis.plot(steps, means, label=label, color=colour, linestyle=style)
            low = [m - e for m, e in zip(means, errors, strict=True)]
            high = [m + e for m, e in zip(means, errors, strict=True)]
            axis.fill_between(steps, low, high, color=colour, alpha=0.2, linewidth=0)
            sizes = sorted(abs(m) for m in means) if key != "gac/delta_g2" else sorted(errors)
            width = sizes[len(sizes) // 2] or width
    if width > 0:
        # Noise spans decades, and the disagreement is unbiased and may fall below zero: asinh is a logarithm far out
        # and a straight line through zero, here as far as the disagreement's own error (else the noise measured last).
        axis.set_yscale("asinh", linear_width=width)
        axis.axhline(0, color="#999999", linewidth=0.6)
        ticks = _asinh_ticks(width, *axis.get_ylim())
        axis.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.set_yticks([], minor=True)
    axis.set_ylabel("squared gradient norm")
    legend_below(axis)


def _asinh_ticks(width: float, low: float, high: float) -> list[float]:
    """0 and what follows it among ``+-1, 3, 10, 30, ...`` with room for a label; matplotlib's own crowd around 0."""
    place = lambda value: math.asinh(value / width)
    room = 0.07 * (place(high) - place(low))
    powers = range(math.floor(math.log10(width)) - 1, math.ceil(math.log10(max(high, -low, width))) + 1)
    ticks, last = [0.0], 0.0
    for size in (float(f"{digit}e{power}") for power in powers for digit in (1, 3)):
        if place(size) - last >= room:
            ticks += [size, -size]
            last = place(size)
    return sorted(tick for tick in ticks if low <= tick <= high)


def _norms_panel(axis: Any, records: Sequence[Record], warm: float | None) -> None:
    axis.set_title("Branch gradient norms and their cosine")
    for key, label, colour, style in (
        ("gac/norm_s2", "|SFT gradient|", COLOURS[0], "-"),
        ("gac/norm_r2", "|RL gradient|", COLOURS[1], "--"),
    ):
        points = [(step, max(value, 0.0) ** 0.5) for step, value in _points(records, key)]
        _noisy_line(axis, points, label, color=colour, linestyle=style)
    axis.set_ylim(bottom=0)
    axis.set_ylabel("norm")
    twin = axis.twinx()
    twin.grid(False)
    twin.spines["right"].set_visible(True)
    _line(twin, _smooth(_points(records, "gac/cosine")), "cosine (right)", color=COLOURS[3], linestyle="-.")
    twin.axhline(0, color=COLOURS[3], linewidth=0.6, alpha=0.5)
    twin.set_ylim(-1.05, 1.05)
    twin.set_ylabel("cosine", color=COLOURS[3])
    handles = [axis.get_legend_handles_labels(), twin.get_legend_handles_labels()]
    legend_below(axis, handles[0][0] + handles[1][0], handles[0][1] + handles[1][1])


RUN_PANELS = {
    "accuracy and reward": _accuracy_panel,
    "mu": _mu_panel,
    "gradient statistics": _statistics_panel,
    "gradient norms and their cosine": _norms_panel,
}
"""The panels of a run by what they show, each drawn by a call with an axis, records, and the accuracy after the warm
start or None."""


def _band(axis: Any, curves: Sequence[Sequence[tuple[int, float]]], label: str, style: Mapping[str, Any]) -> None:
    """Mean over the runs at the steps that all have, between their lowest and highest."""
    tables = [dict(curve) for curve in curves]
    steps = sorted(set.intersection(*(set(table) for table in tables)))
    if not steps:
        return
    rows = [[table[step] for table in tables] for step in steps]
    axis.plot(steps, [sum(row) / len(row) for row in rows], label=label, **style)
    axis.fill_between(steps, [min(r) for r in rows], [max(r) for r in rows], color=style["color"], alpha=0.13, lw=0)


def _final_panel(axis: Any, runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    axis.set_title("Mean of the last four evaluations")
    for index, (_, seeds) in enumerate(runs.items()):
        values = [seed["summary"]["last_four_accuracy"] for seed in seeds]
        colour = COLOURS[index % len(COLOURS)]
        axis.plot(values, [index] * len(values), "o", color=colour, markersize=5, alpha=0.6)
        axis.plot([sum(values) / len(values)], [index], "|", color=colour, markersize=18, markeredgewidth=2.5)
    axis.set_yticks(range(len(runs)), list(runs))
    axis.set_ylim(len(runs) - 0.5, -0.5)
    axis.set_xlabel("held-out accuracy")
    axis.grid(axis="y", visible=False)

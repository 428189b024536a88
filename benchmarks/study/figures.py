"""The pictures of the study. They are drawn from numbers that are ready; nothing is computed here but axis limits.

Colours are Okabe and Ito's, which stay apart for colour-blind readers; what shares a panel also differs in line style
or marker. Sizes are chosen so that text stays readable where a page shows a picture at half its width.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from benchmarks.study.inference import Comparison
from gac.plots import COLOURS, SETTINGS

BLUE, ORANGE, GREEN, PINK, YELLOW, SKY, GREY = COLOURS[:7]
_CYCLE = (BLUE, ORANGE, GREEN, PINK, YELLOW, SKY, GREY)
_STYLES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)))
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_SETTINGS = SETTINGS | {
    "figure.dpi": 140,
    "font.size": 11,
    "axes.titlesize": 11,
    "legend.fontsize": 10,
    "lines.linewidth": 1.8,
    "svg.hashsalt": "gac",
}
_WIDTH = 8.0

Curve = Sequence[tuple[float, float]]


def forest(
    panels: Sequence[tuple[str, Mapping[str, Comparison], Collection[str]]],
    rows: Sequence[tuple[str, str]],
    path: Path,
    axis_label: str,
) -> None:
    """Means with 95% intervals, a row for each arm and a panel for each set of data, around 0.

    Args:
        panels: title, comparisons by arm, and the arms whose difference is told apart from 0, which are filled and
            coloured. An arm that a panel lacks leaves its row empty.
        rows: arm and its label, from the top. An empty arm draws a gap with the label as a heading.
        path: where the PNG goes.
        axis_label: what is to the right of 0.
    """
    with _Figure(1, len(panels), (_WIDTH, 1.1 + 0.27 * len(rows)), path, sharey=True, sharex=True) as axes:
        for axis, (title, found, clear) in zip(axes[0], panels, strict=True):
            axis.axvline(0, color="black", linewidth=1.0)
            for index, (name, _) in enumerate(rows):
                if name in found:
                    _whisker(axis, index, found[name], name in clear)
            axis.set_title(title)
            axis.set_xlabel(axis_label)
            axis.grid(axis="y", visible=False)
            axis.tick_params(axis="y", length=0)
        axes[0][0].set_yticks(range(len(rows)), [label for _, label in rows])
        for text, (name, _) in zip(axes[0][0].get_yticklabels(), rows, strict=True):
            text.set_fontweight("normal" if name else "bold")
        axes[0][0].set_ylim(len(rows) - 0.4, -0.6)


def _whisker(axis, height: float, found: Comparison, clear: bool) -> None:
    colour = GREY if not clear else BLUE if found.mean > 0 else ORANGE
    if not math.isnan(found.low):
        axis.plot([100 * found.low, 100 * found.high], [height, height], color=colour, linewidth=2.0)
    face = colour if clear else "white"
    axis.plot([100 * found.mean], [height], "o", color=colour, markerfacecolor=face, markersize=5.5)


_PANELS_A_ROW = 5
"""So many titles fit beside each other."""


def regrets(arms: Mapping[str, Mapping[str, Sequence[tuple[str, float]]]], path: Path) -> None:
    """What arms lose to the best constant in hindsight, an arm a row: a mark a task, a tick for a regime's mean.

    Regimes have scales of their own: some cost 50 points, some 3.

    Args:
        arms: by label, from the top; for each regime its tasks with the points lost, negative where the arm is better.
        path: where the PNG goes.
    """
    regimes = list(dict.fromkeys(regime for found in arms.values() for regime in found))
    tasks = list(dict.fromkeys(task for found in arms.values() for lost in found.values() for task, _ in lost))
    rows = math.ceil(len(regimes) / _PANELS_A_ROW)
    columns = math.ceil(len(regimes) / rows)
    with _Figure(rows, columns, (_WIDTH, 0.9 + rows * (1.0 + 0.3 * len(arms))), path, sharey=True) as axes:
        panels = list(axes.flat)
        for unused in panels[len(regimes) :]:
            unused.set_axis_off()
        for axis, regime in zip(panels, regimes, strict=False):
            axis.axvline(0, color="black", linewidth=1.0)
            for row, found in enumerate(arms.values()):
                lost = found.get(regime, ())
                for task, points in lost:
                    index = tasks.index(task)
                    style = {"color": _CYCLE[index], "marker": _MARKERS[index], "markersize": 4.5, "alpha": 0.8}
                    axis.plot([points], [row], linestyle="", label=task if row == 0 else None, **style)
                if lost:
                    mean = sum(points for _, points in lost) / len(lost)
                    axis.plot([mean, mean], [row - 0.35, row + 0.35], color="black", linewidth=2.2)
            axis.set_title(regime)
            axis.locator_params(axis="x", nbins=4, integer=True)
            axis.grid(axis="y", visible=False)
            axis.tick_params(axis="y", length=0)
        for axis in panels[len(regimes) - columns : len(regimes)]:
            axis.set_xlabel("points lost")
        axes[0][0].set_yticks(range(len(arms)), list(arms))
        axes[0][0].set_ylim(len(arms) - 0.4, -0.6)
        handles, labels = axes[0][0].get_legend_handles_labels()
        axes[0][0].figure.legend(handles, labels, loc="outside lower center", ncols=len(tasks), frameon=False)


def curves(tasks: Mapping[str, Mapping[str, Curve]], path: Path) -> None:
    """Held-out accuracy over steps, a panel a task, a line an arm (means over seeds)."""
    labels = list(dict.fromkeys(label for arms in tasks.values() for label in arms))
    with _Panels(list(tasks), path, "optimizer step", "accuracy, %") as panels:
        for axis, arms in zip(panels, tasks.values(), strict=True):
            for label, curve in arms.items():
                index = labels.index(label)
                _line(axis, [(x, 100 * y) for x, y in curve], label, index)


def constants(tasks: Mapping[str, Mapping[str, object]], path: Path) -> None:
    """Late accuracy against the constant mu, a panel a task, with ``gac`` at its mean mu.

    Args:
        tasks: for each ``mu`` (list), ``mean``, ``low``, ``high`` (over seeds, in shares), ``gac`` as
            ``(mean mu, late accuracy, lowest, highest)`` or None, and ``warm``.
        path: where the PNG goes.
    """
    with _Panels(list(tasks), path, "mu", "late accuracy, %") as panels:
        for axis, task in zip(panels, tasks.values(), strict=True):
            mean = [100 * value for value in task["mean"]]
            axis.fill_between(
                task["mu"],
                [100 * v for v in task["low"]],
                [100 * v for v in task["high"]],
                color=GREY,
                alpha=0.15,
                lw=0,
            )
            axis.plot(task["mu"], mean, color=GREY, marker="o", markersize=4, label="constant (band: all seeds)")
            axis.axhline(100 * task["warm"], color=GREY, linestyle=":", linewidth=1.2, label="warm start")
            if task["gac"]:
                mu, late, low, high = task["gac"]
                axis.errorbar(
                    [mu],
                    [100 * late],
                    yerr=[[100 * (late - low)], [100 * (high - late)]],
                    color=BLUE,
                    marker="D",
                    markersize=7,
                    linestyle="none",
                    zorder=5,
                    label="gac, at its mean mu",
                )
            axis.set_xlim(0, 1)


def mu_paths(tasks: Mapping[str, Mapping[str, object]], path: Path) -> None:
    """What ``gac`` did in each task: mu of every seed with the best constant above, the statistics below.

    Args:
        tasks: for each ``mu`` (a curve a seed), ``best`` (constant found in hindsight, or None) and ``statistics``
            (name -> curve, mean over seeds).
        path: where the PNG goes.
    """
    names = (
        ("sigma_s2", "SFT noise", BLUE, "-"),
        ("sigma_r2", "RL noise", ORANGE, "--"),
        ("delta_g2", "disagreement", GREEN, "-."),
    )
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    columns = min(4, len(tasks))
    blocks = math.ceil(len(tasks) / columns)
    with _Figure(2 * blocks, columns, (max(_WIDTH, 2.5 * columns), 4.2 * blocks + 0.7), path, sharex=True) as axes:
        for place in range(blocks * columns):
            top, bottom = (axes[2 * (place // columns) + row][place % columns] for row in (0, 1))
            if place >= len(tasks):
                top.set_visible(False)
                bottom.set_visible(False)
                continue
            title, task = list(tasks.items())[place]
            for index, curve in enumerate(task["mu"]):
                _plain(top, curve, "gac, each seed" if index == 0 else None, color=SKY, linewidth=1.0)
            if task["best"] is not None:
                top.axhline(task["best"], color="black", linestyle=(0, (4, 2)), label="best constant in hindsight")
            top.set_ylim(0, 1)
            top.set_title(title, fontsize=9)
            for key, label, colour, style in names:
                curve = [(x, y) for x, y in task["statistics"].get(key, ()) if y > 0]
                _plain(bottom, curve, label, color=colour, linestyle=style)
            bottom.set_yscale("log")
            bottom.yaxis.set_major_locator(LogLocator(subs=(1.0, 3.0), numticks=8))
            bottom.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            bottom.yaxis.set_minor_formatter(NullFormatter())
            if place % columns == 0:
                top.set_ylabel("mu")
                bottom.set_ylabel("squared norm")
            if place + columns >= len(tasks):
                bottom.set_xlabel("optimizer step")
        _shared_legend(axes[0][0].figure, axes)


def margins(lines: Mapping[str, Mapping[str, tuple[float, float, float]]], sizes: Sequence[str], path: Path) -> None:
    """Margin of ``gac`` by model size: ``lines[arm][size] = (mean, low, high)`` in shares."""
    with _Figure(1, 1, (_WIDTH, 3.6), path) as axes:
        axis = axes[0][0]
        axis.axhline(0, color="black", linewidth=1.0)
        for index, (label, found) in enumerate(lines.items()):
            have = [(place, *found[size]) for place, size in enumerate(sizes) if size in found]
            shift = 0.07 * (index - (len(lines) - 1) / 2)
            x, y = [p[0] + shift for p in have], [100 * p[1] for p in have]
            reach = [[100 * _or_zero(p[1] - p[2]) for p in have], [100 * _or_zero(p[3] - p[1]) for p in have]]
            axis.errorbar(
                x,
                y,
                yerr=reach,
                label=label,
                color=_CYCLE[index % 7],
                linestyle=_STYLES[index % 7],
                marker=_MARKERS[index % 7],
                markersize=6,
            )
        axis.set_xticks(range(len(sizes)), sizes)
        axis.set_xlim(-0.4, len(sizes) - 0.6)
        axis.set_ylabel("gac minus arm, points")
        axis.grid(axis="x", visible=False)
        axis.figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=3)


def drift(groups: Sequence[tuple[str, Mapping[str, tuple[str, float, float]]]], path: Path) -> None:
    """Late accuracy against KL-drift area, a panel a set of data; arms have numbers that are listed below.

    Args:
        groups: title and ``arm label -> (kind, KL-drift area, late accuracy in shares)``; arms of one kind share colour
            and marker.
        path: where the PNG goes.
    """
    from matplotlib.ticker import FuncFormatter

    labels = list(dict.fromkeys(label for _, found in groups for label in found))
    kinds = list(dict.fromkeys(kind for _, found in groups for kind, _, _ in found.values()))
    look = {kind: ((BLUE, "D"), (GREY, "o"), (GREEN, "^"), (ORANGE, "s"))[i % 4] for i, kind in enumerate(kinds)}
    rows = math.ceil(len(labels) / 3)
    plain = FuncFormatter(lambda value, _: f"{value:g}")
    with _Figure(1, len(groups), (_WIDTH, 4.4 + 0.2 * rows), path, sharey=True) as axes:
        for axis, (title, found) in zip(axes[0], groups, strict=True):
            for label, (kind, area, late) in found.items():
                colour, marker = look[kind]
                axis.plot(area, 100 * late, marker, color=colour, markersize=6)
                place = {"textcoords": "offset points", "fontsize": 9, "color": colour}
                axis.annotate(str(labels.index(label) + 1), (area, 100 * late), (4, 3), **place)
            axis.set_xscale("log")
            axis.xaxis.set_major_formatter(plain)
            axis.xaxis.set_minor_formatter(plain)
            axis.tick_params(axis="x", which="both", labelsize=9)
            axis.set_title(title)
            axis.set_xlabel("KL-drift area")
        axes[0][0].set_ylabel("late accuracy, %")
        figure = axes[0][0].figure
        colours = {label: look[found[label][0]] for _, found in groups for label in found}
        handles = [axes[0][0].plot([], [], colours[name][1], color=colours[name][0])[0] for name in labels]
        numbered = [f"{index}  {label}" for index, label in enumerate(labels, start=1)]
        figure.legend(handles, numbered, loc="outside lower center", ncols=3, fontsize=9, handlelength=1)


class _Figure:
    """A grid of axes that is saved to `path` when its block ends without an error."""

    def __init__(self, rows: int, columns: int, size: tuple[float, float], path: Path, **shared) -> None:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        self._plt, self._path = plt, path
        self._context = plt.rc_context({**matplotlib.rcParamsDefault, "backend": "Agg", **_SETTINGS})
        self._context.__enter__()
        self._figure, self.axes = plt.subplots(
            rows, columns, figsize=size, layout="constrained", squeeze=False, **shared
        )

    def __enter__(self):
        return self.axes

    def __exit__(self, kind, error, trace) -> None:
        try:
            if kind is None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._figure.savefig(self._path, metadata={"Software": None})
        finally:
            self._plt.close(self._figure)
            self._context.__exit__(kind, error, trace)


class _Panels(_Figure):
    """A panel for each title, two a row, with one legend below all."""

    def __init__(self, titles: Sequence[str], path: Path, xlabel: str, ylabel: str) -> None:
        columns = min(2, len(titles))
        rows = math.ceil(len(titles) / columns)
        super().__init__(rows, columns, (_WIDTH, 2.5 * rows + 0.6), path, sharex=True)
        self._used = [axis for row in self.axes for axis in row][: len(titles)]
        for axis in [axis for row in self.axes for axis in row][len(titles) :]:
            axis.set_visible(False)
        for index, (axis, title) in enumerate(zip(self._used, titles, strict=True)):
            axis.set_title(title)
            if index % columns == 0:
                axis.set_ylabel(ylabel)
            if index + columns >= len(titles):
                axis.set_xlabel(xlabel)
                axis.tick_params(labelbottom=True)

    def __enter__(self):
        return self._used

    def __exit__(self, kind, error, trace) -> None:
        if kind is None:
            _shared_legend(self._figure, [self._used])
        super().__exit__(kind, error, trace)


def _shared_legend(figure, rows) -> None:
    found = {}
    for row in rows:
        for axis in row:
            for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
                found.setdefault(label, handle)
    if found:
        figure.legend(list(found.values()), list(found), loc="outside lower center", ncols=3, handlelength=2.6)


def _line(axis, points: Curve, label: str, index: int) -> None:
    style = {"color": _CYCLE[index % 7], "linestyle": _STYLES[index % 7], "linewidth": 2.4 if index == 0 else 1.6}
    _plain(axis, points, label, marker=_MARKERS[index % 7], markersize=4, **style)


def _plain(axis, points: Curve, label: str | None, **style) -> None:
    if points:
        axis.plot(*zip(*points, strict=True), label=label, **style)


def _or_zero(value: float) -> float:
    return 0.0 if math.isnan(value) else value

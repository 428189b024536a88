"""Pictures of several laws and seeds."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gac.plots.common import COLOURS, SETTINGS, STYLES, points_of, pyplot


def draw_comparison(
    runs: Mapping[str, Sequence[Mapping[str, Any]]], path: str | Path, *, title: str = "", best: str | None = None
) -> None:
    """Several laws as a PNG: held-out accuracy, regret and mu over steps, final accuracy of every run.

    Args:
        runs: for each law the runs of all seeds, each with ``records`` (lines of metrics.jsonl) and ``summary``.
            Lines are means over seeds and bands go from the lowest to the highest seed.
        path: where the PNG goes.
        title: a line above all panels.
        best: the law whose accuracy the others are held against, seed by seed; None: no regret is drawn.
    """
    if not runs or not all(runs.values()):
        raise ValueError("draw_comparison: every law needs at least one run")
    plt = pyplot()
    with plt.rc_context(SETTINGS):
        names = ["accuracy", *(["regret"] if best is not None else []), "mu", "final"]
        size, shape = ((9.2, 7.2), (2, 2)) if best is not None else ((12, 3.9), (1, 3))
        figure, grid = plt.subplots(*shape, figsize=size, layout="constrained")
        axes = dict(zip(names, grid.flat, strict=True))
        for index, (law, seeds) in enumerate(runs.items()):
            style = {"color": COLOURS[index % len(COLOURS)], "linestyle": STYLES[index % len(STYLES)]}
            curves = [_accuracies(seed) for seed in seeds]
            _band(axes["accuracy"], curves, law, style)
            _band(axes["mu"], [points_of(s["records"], "gac/mu") for s in seeds], law, style)
            if best is not None:
                pairs = zip(runs[best], curves, strict=True)
                _band(axes["regret"], [_lost(_accuracies(one), curve) for one, curve in pairs], law, style)
        axes["accuracy"].set_title("Held-out accuracy")
        axes["mu"].set_title("mu, weight of the SFT branch")
        axes["mu"].set_ylim(-0.02, 1.02)
        if best is not None:
            axes["regret"].set_title(f"Regret: accuracy lost to {best}")
            axes["regret"].set_ylabel(f"mean of {_LATE} evaluations", fontsize=8)
        for name in names[:-1]:
            axes[name].set_xlabel("optimizer step")
        handles, labels = axes["accuracy"].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=6, handlelength=3)  # no curve runs there
        _final_panel(axes["final"], runs)
        if title:
            figure.suptitle(title, x=0.01, ha="left", fontsize=11)
        figure.savefig(path)
        plt.close(figure)


_LATE = 4
"""Evaluations whose mean counts as late accuracy."""


def _accuracies(run: Mapping[str, Any]) -> list[tuple[int, float]]:
    return [(0, run["summary"]["warm_start_accuracy"]), *points_of(run["records"], "accuracy")]


def _lost(best: Sequence[tuple[int, float]], other: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """What a run lost to another at the steps of both: the mean over the last evaluations until then."""
    table = dict(best)
    lost = [(step, table[step] - value) for step, value in other if step in table]
    found = []
    for index, (step, _) in enumerate(lost):
        late = [value for _, value in lost[max(index + 1 - _LATE, 0) : index + 1]]
        found.append((step, sum(late) / len(late)))
    return found


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

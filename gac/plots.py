"""Pictures of one run and of several, drawn with matplotlib from the records of metrics.jsonl.

Colours are Okabe and Ito's, which stay apart for colour-blind readers; lines that share a panel also differ in style.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#555555", "#000000")
_STYLES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)))
_SETTINGS = {
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
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.6,
}

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
    with plt.rc_context(_SETTINGS):
        figure, axes = plt.subplots(2, 2, figsize=(10, 6.4), layout="constrained", sharex=True)
        _accuracy_panel(axes[0, 0], records, summary["warm_start_accuracy"])
        _mu_panel(axes[0, 1], records)
        _statistics_panel(axes[1, 0], records)
        _norms_panel(axes[1, 1], records)
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
    with plt.rc_context(_SETTINGS):
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
        axes[0].legend(loc="lower right", handlelength=3)
        _final_panel(axes[2], runs)
        if title:
            figure.suptitle(title, x=0.01, ha="left", fontsize=11)
        figure.savefig(path)
        plt.close(figure)


def _pyplot():
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


def _line(axis, points: Sequence[tuple[int, float]], label: str | None, **style: Any) -> None:
    if points:
        axis.plot(*zip(*points, strict=True), label=label, **style)


def _noisy_line(axis, points: Sequence[tuple[int, float]], label: str, **style: Any) -> None:
    """The raw values, faint, under their moving average."""
    _line(axis, points, None, color=style["color"], alpha=0.22, linewidth=0.7)
    _line(axis, _smooth(points), label, **style)


def _accuracy_panel(axis, records: Sequence[Record], warm: float) -> None:
    axis.set_title("Held-out accuracy and training reward")
    axis.axhline(warm, color=COLOURS[6], linestyle=":", linewidth=1.2, label="accuracy after the warm start")
    _noisy_line(axis, _points(records, "reward"), "reward of rollouts", color=COLOURS[1], linestyle="--")
    _line(axis, [(0, warm), *_points(records, "accuracy")], "accuracy", color=COLOURS[0], marker="o", markersize=3)
    axis.set_ylim(-0.02, 1.02)
    axis.legend(loc="lower right")


def _mu_panel(axis, records: Sequence[Record]) -> None:
    axis.set_title("mu, weight of the SFT branch")
    _line(axis, _points(records, "gac/mu_raw"), "raw estimate", color=COLOURS[5], linewidth=1.0)
    _line(axis, _points(records, "gac/prior"), "prior", color=COLOURS[4], linestyle="--")
    _line(axis, _points(records, "gac/mu"), "mu", color=COLOURS[0], linewidth=2.0)
    axis.set_ylim(-0.02, 1.02)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(loc="best")


def _statistics_panel(axis, records: Sequence[Record]) -> None:
    axis.set_title("Gradient statistics (moving average)")
    panels = (
        ("gac/sigma_s2", "SFT noise", COLOURS[0], "-"),
        ("gac/sigma_r2", "RL noise", COLOURS[1], "--"),
        ("gac/delta_g2", "disagreement", COLOURS[2], "-."),
    )
    positive: list[float] = []
    for key, label, colour, style in panels:
        points = _smooth(_points(records, key))
        positive += [value for _, value in points if value > 0]
        _line(axis, points, label, color=colour, linestyle=style)
    if positive:
        # the disagreement is unbiased and may fall below zero: a scale that is linear around zero shows it
        axis.set_yscale("symlog", linthresh=max(min(positive), max(positive) * 1e-3))
    axis.set_ylabel("squared gradient norm")
    if axis.get_legend_handles_labels()[0]:
        axis.legend(loc="best")


def _norms_panel(axis, records: Sequence[Record]) -> None:
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
    axis.legend(handles[0][0] + handles[1][0], handles[0][1] + handles[1][1], loc="upper right")


def _band(axis, curves: Sequence[Sequence[tuple[int, float]]], label: str, style: Mapping[str, Any]) -> None:
    """Mean over the runs at the steps that all have, between their lowest and highest."""
    tables = [dict(curve) for curve in curves]
    steps = sorted(set.intersection(*(set(table) for table in tables)))
    if not steps:
        return
    rows = [[table[step] for table in tables] for step in steps]
    axis.plot(steps, [sum(row) / len(row) for row in rows], label=label, **style)
    axis.fill_between(steps, [min(r) for r in rows], [max(r) for r in rows], color=style["color"], alpha=0.13, lw=0)


def _final_panel(axis, runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
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

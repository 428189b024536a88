"""Pictures of one run."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gac.plots.common import (
    COLOURS,
    SETTINGS,
    Record,
    draw_line,
    draw_noisy_line,
    legend_below,
    points_of,
    pyplot,
    smooth,
    smooth_with_band,
)

Points = Sequence[tuple[int, float]]
"""Steps and numbers."""


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
    plt = pyplot()
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


def _accuracy_panel(axis: Any, records: Sequence[Record], warm: float | None) -> None:
    axis.set_title("Held-out accuracy and training reward")
    accuracy: list[tuple[int, float]] = points_of(records, "accuracy")
    if warm is not None:
        axis.axhline(warm, color=COLOURS[6], linestyle=":", linewidth=1.2, label="after the warm start")
        accuracy = [(0, warm), *accuracy]
    draw_noisy_line(axis, points_of(records, "reward"), "reward", color=COLOURS[1], linestyle="--")
    draw_line(axis, accuracy, "accuracy", color=COLOURS[0], marker="o", markersize=3)
    axis.set_ylim(-0.02, 1.02)
    legend_below(axis)


def _mu_panel(axis: Any, records: Sequence[Record], warm: float | None) -> None:
    axis.set_title("mu, weight of the SFT branch, with standard errors")
    raw, aim, worth = (points_of(records, f"gac/{name}") for name in ("mu_raw", "alpha", "sft_weight"))
    draw_line(axis, raw, "estimate", color=COLOURS[5], linewidth=1.0)
    _draw_band(axis, raw, points_of(records, "gac/mu_se"), COLOURS[5])
    draw_line(axis, points_of(records, "gac/prior"), "prior", color=COLOURS[4], linestyle="--")
    draw_line(axis, aim, "aim alpha", color=COLOURS[2], linestyle="-.", linewidth=1.0)
    _draw_band(axis, aim, points_of(records, "gac/alpha_se"), COLOURS[2])
    smoothed = smooth_with_band(worth, dict(points_of(records, "gac/sft_weight_se")))
    means = [(step, mean) for step, mean, _ in smoothed]
    draw_line(axis, means, "weight of demonstrations", color=COLOURS[3], linestyle=":")
    _draw_band(axis, means, [(step, error) for step, _, error in smoothed], COLOURS[3])
    draw_line(axis, points_of(records, "gac/mu"), "mu", color=COLOURS[0], linewidth=2.0)
    axis.set_ylim(-0.02, 1.02)
    legend_below(axis)


def _draw_band(axis: Any, points: Points, errors: Points, colour: str) -> None:
    """One standard error about numbers between 0 and 1; none where it is not known."""
    known = dict(errors)
    low = [max(value - known.get(step, 0.0), 0.0) for step, value in points]
    high = [min(value + known.get(step, 0.0), 1.0) for step, value in points]
    axis.fill_between([step for step, _ in points], low, high, color=colour, alpha=0.2, linewidth=0)


def _statistics_panel(axis: Any, records: Sequence[Record], warm: float | None) -> None:
    axis.set_title("Gradient statistics with standard errors")
    panels = (
        ("gac/sigma_s2", "SFT noise", COLOURS[0], "-"),
        ("gac/sigma_r2", "RL noise", COLOURS[1], "--"),
        ("gac/delta_g2", "disagreement", COLOURS[2], "-."),
    )
    width = 0.0
    for key, label, colour, style in panels:
        points = smooth_with_band(points_of(records, key), dict(points_of(records, f"{key}_se")))
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
        points = [(step, max(value, 0.0) ** 0.5) for step, value in points_of(records, key)]
        draw_noisy_line(axis, points, label, color=colour, linestyle=style)
    axis.set_ylim(bottom=0)
    axis.set_ylabel("norm")
    twin = axis.twinx()
    twin.grid(False)
    twin.spines["right"].set_visible(True)
    draw_line(twin, smooth(points_of(records, "gac/cosine")), "cosine (right)", color=COLOURS[3], linestyle="-.")
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

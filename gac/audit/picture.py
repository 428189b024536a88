"""The audit as a picture: mu over training with the oracle's band, and the estimates against the truth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gac.audit.figures import search
from gac.audit.panel import COEFFICIENT, EXACT, SKETCH, TEMPORAL
from gac.audit.record import RUN, Record
from gac.audit.replicates import COLUMNS, mean_squared_error, oracle
from gac.plots import COLOURS, SETTINGS, legend_below

_LAWS = {
    RUN: (COLOURS[0], "-"),
    "gac on temporal": (COLOURS[2], "--"),
    "gac on coefficient": (COLOURS[4], "-."),
    "paper on coefficient, raw": (COLOURS[3], ":"),
    "chord-mu": (COLOURS[5], (0, (5, 1))),
}
_ESTIMATORS = {EXACT: (COLOURS[0], "-"), SKETCH: (COLOURS[1], "--"), TEMPORAL: (COLOURS[2], ":")}
_NAMES = {
    "sigma_s2": "Noise of the SFT gradient",
    "sigma_r2": "Noise of the RL gradient",
    "delta_g2": "Disagreement of the true gradients",
}
_HALF_LIFE = 69.0
"""Of the running averages that are drawn: the default of law ``gac``."""


def draw_audit(record: Record, path: str | Path, *, title: str = "") -> None:
    """A PNG with six panels: mu; excess error of the mix; the three numbers; the proxy against the disagreement.

    Args:
        record: with at least one point.
        path: where it goes; the suffix says in which format.
        title: a line above all panels.
    """
    import matplotlib

    matplotlib.use("Agg")  # no display is needed
    import matplotlib.pyplot as plt

    values, deleted = record.truths()
    with plt.rc_context(SETTINGS):
        figure, axes = plt.subplots(2, 3, figsize=(13, 7), layout="constrained")
        _mu_panel(axes[0, 0], record, record.counted(values), record.counted(deleted))
        _excess_panel(axes[0, 1], record, record.counted(values))
        _proxy_panel(axes[0, 2], record, values, deleted)
        for k, axis in enumerate(axes[1]):
            _number_panel(axis, record, values, deleted, k)
        for axis in (*axes[0, :2], *axes[1]):
            axis.set_xlabel("optimizer step")
        if title:
            figure.suptitle(title, x=0.01, ha="left", fontsize=11)
        figure.savefig(path)
        plt.close(figure)


def _mu_panel(axis: Any, record: Record, values: Tensor, deleted: Tensor) -> None:
    best = oracle(values, record.alpha)
    spread = 2 * _errors(oracle(deleted, record.alpha))
    axis.fill_between(record.steps, best - spread, (best + spread).clamp(max=1), color="#cccccc", linewidth=0)
    axis.plot(record.steps, best, color="#000000", marker=".", linewidth=0.8, label="oracle, 2 standard errors")
    for label, (colour, style) in _LAWS.items():
        if label in record.mu:
            axis.plot(record.mu[label], color=colour, linestyle=style, label=label)
    axis.set_ylim(0, 1.02)
    axis.set_title("mu, weight of the SFT branch")
    legend_below(axis, columns=2, has_label=True)


def _excess_panel(axis: Any, record: Record, values: Tensor) -> None:
    least = mean_squared_error(oracle(values, record.alpha), values, record.alpha)
    for label, (colour, style) in _LAWS.items():
        if label in record.mu:
            error = mean_squared_error(record.mu_at_points(label), values, record.alpha)
            axis.plot(record.steps, error / least, color=colour, linestyle=style, label=label)
    constant = search(values, record.alpha, False)
    axis.plot(
        record.steps, mean_squared_error(constant, values, record.alpha) / least,
        color="#000000", linewidth=0.9, label=f"best constant, {constant:.3f}",
    )  # fmt: skip
    axis.set_yscale("log", nonpositive="mask")  # a truth without bias may be below 0: a gap, no cliff
    legend_below(axis, columns=2, has_label=True)
    axis.set_title("MSE of the mixed gradient over the oracle's")


def _proxy_panel(axis: Any, record: Record, values: Tensor, deleted: Tensor) -> None:
    k = COLUMNS.index("delta_g2")
    proxy = record.draws(COEFFICIENT)[..., k].mean(1)
    axis.errorbar(
        values[:, k], proxy, xerr=_errors(deleted)[:, k], fmt="none", ecolor="#bbbbbb", elinewidth=0.8, zorder=1
    )
    drawn = axis.scatter(values[:, k], proxy, c=record.steps, cmap="viridis", s=18, zorder=2)
    axis.figure.colorbar(drawn, ax=axis, label="optimizer step", fraction=0.05, pad=0.02)
    axis.set_title("Paper's proxy against the disagreement")
    axis.set_xlabel("true delta_g2, 1 standard error")
    axis.set_ylabel("coefficient delta_g2")


def _number_panel(axis: Any, record: Record, values: Tensor, deleted: Tensor, k: int) -> None:
    name = COLUMNS[k]
    axis.errorbar(
        record.steps, values[:, k], yerr=2 * _errors(deleted)[:, k], fmt=".", color="#000000", elinewidth=0.8,
        label="truth, 2 standard errors", zorder=3,
    )  # fmt: skip
    for estimator, (colour, style) in _ESTIMATORS.items():
        series = torch.tensor(record.estimates[estimator], dtype=torch.float64)[:, k]
        axis.plot(_running_average(series), color=colour, linestyle=style, label=f"{estimator}, averaged")
    if name == "delta_g2":
        axis.axhline(0, color="#999999", linewidth=0.6)
        axis.set_yscale("symlog", linthresh=float(values[:, k].abs().median().clamp(min=1e-12)))
    elif (values[:, k] > 0).any():
        axis.set_yscale("log")
    axis.set_title(f"{_NAMES[name]}, {name}")
    if k == 0:
        legend_below(axis, columns=2)


def _errors(deleted: Tensor) -> Tensor:
    """Jackknife errors of ``[T, J, ...]``: ``[T, ...]``."""
    j = deleted.shape[1]
    return ((j - 1) / j * (deleted - deleted.mean(1, keepdim=True)).square().sum(1)).sqrt()


def _running_average(series: Tensor) -> list[float]:
    """Bias-corrected exponential average; unknown values leave it alone."""
    keep = 0.5 ** (1 / _HALF_LIFE)
    total = weight = 0.0
    out = []
    for value in series.tolist():
        if value == value:
            total, weight = keep * total + (1 - keep) * value, keep * weight + (1 - keep)
        out.append(total / weight if weight else float("nan"))
    return out

"""The picture: how near each operation comes to the read limit, from 1K elements to whole parameter lists."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gac.plots import COLOURS, SETTINGS

_MARKERS = {
    "moments": "o",
    "sketch": "s",
    "weighted_sketch": "X",
    "absorb_sketch_": "p",
    "accumulate_": "h",
    "pair_moments": "^",
    "mix_": "D",
    "absorb_": "v",
    "token_moments": "P",
    "kronecker_sketch": "*",
}


def draw(results: dict, path: str | Path) -> None:
    """Draws achieved bandwidth over bytes moved, a panel for each dtype, as a PNG.

    Args:
        results: of ``gac bench``; rows with a red gate are left out.
        path: where the PNG goes.

    Raises:
        ValueError: no row can be drawn.
    """
    rows = [row for row in results.get("kernels", []) if row.get("gate", {}).get("ok")]
    if not rows:
        raise ValueError("draw: no kernel result with a green gate")
    import matplotlib

    matplotlib.use("Agg")  # no display is needed
    import matplotlib.pyplot as plt

    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    with plt.rc_context(SETTINGS):
        figure, axes = plt.subplots(
            1, len(dtypes), figsize=(5.6 * len(dtypes), 4.6), layout="constrained", sharey=True, squeeze=False
        )
        for axis, dtype in zip(axes[0], dtypes, strict=True):
            _panel(axis, [row for row in rows if row["dtype"] == dtype], dtype, results.get("nominal_gbps"))
        axes[0, 0].set_ylabel("GB/s")
        drawn = [bandwidth for row in rows for bandwidth in (row["gbps"], row["read_gbps"])]
        axes[0, 0].set_ylim(min(drawn) * 0.7, max([*drawn, results.get("nominal_gbps", 0.0)]) * 1.5)
        axes[0, 0].yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        handles = {}
        for axis in axes[0]:
            handles |= {label: handle for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4)
        facts = results["facts"]
        figure.suptitle(f"Bandwidth against the read limit: {facts['device']}", x=0.01, ha="left", fontsize=11)
        figure.savefig(path)
        plt.close(figure)


def _panel(axis: Any, rows: list[dict], dtype: str, nominal: float | None) -> None:
    axis.set_title(dtype)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xlabel("bytes moved")
    roof = _roof(rows)
    if len(roof) > 1:
        axis.plot(*zip(*roof, strict=True), color=COLOURS[7], linewidth=2.2, label="read limit, measured", zorder=2)
        axis.fill_between(*zip(*roof, strict=True), 1e-6, color="#f3f3f3", zorder=0)
    if nominal:
        axis.axhline(nominal, color=COLOURS[6], linestyle=":", label="datasheet bandwidth")
    for index, (operation, marker) in enumerate(_MARKERS.items()):
        own = [row for row in rows if row["operation"] == operation]
        sizes = sorted((row for row in own if row["tensors"] == 1), key=lambda row: row["bytes"])
        lists = [row for row in own if row["tensors"] > 1]
        style = {"color": COLOURS[index % 6], "marker": marker, "markersize": 5}
        points = lambda found: ([row["bytes"] for row in found], [row["gbps"] for row in found])
        axis.plot(*points(sizes), label=operation, linewidth=1.3, **style)
        axis.plot(*points(lists), linestyle="none", markerfacecolor="none", markeredgewidth=1.4, **style)
    if any(row["tensors"] > 1 for row in rows):
        axis.plot([], [], linestyle="none", marker="o", color=COLOURS[6], markerfacecolor="none",
                  label="hollow: parameter lists of models")  # fmt: skip
    axis.xaxis.set_major_formatter(lambda value, _: _bytes(value))


def _roof(rows: list[dict]) -> list[tuple[int, float]]:
    """The fastest read of each number of bytes, in one buffer where there were such cases."""
    single = [row for row in rows if row["tensors"] == 1] or rows
    best: dict[int, float] = {}
    for row in single:
        best[row["read_bytes"]] = max(row["read_gbps"], best.get(row["read_bytes"], 0.0))
    return sorted(best.items())


def _bytes(value: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:g} {unit}"
        value /= 1024
    return f"{value:g} TiB"

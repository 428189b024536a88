"""Pictures for a page: SVG whose colours the page's style sheet decides, so that they fit a light and a dark one."""

import io
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from gac.plots import COLOURS, RUN_PANELS, SETTINGS, draw_modules

_INK = "#010203"
"""Stands for the colour of the page's text while a picture is drawn."""

VARIABLES: dict[str, str] = {
    _INK: "currentColor",
    "#333333": "currentColor",
    "#999999": "var(--faint)",
    "#555555": "var(--muted)",
    str(SETTINGS["grid.color"]): "var(--grid)",
    "#d0d0d0": "var(--unknown)",
    **{colour.lower(): f"var(--c{index})" for index, colour in enumerate(COLOURS[:6])},
}
"""What the colours of a picture become; a style sheet gives the variables their values."""

_THEME: dict[str, Any] = {
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), _INK),
    **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), "none"),
    "svg.fonttype": "none",
    "svg.hashsalt": "gac",
    "axes.edgecolor": _INK,
    "axes.linewidth": 0.6,
}


def run_pictures(records: Sequence[Mapping[str, Any]], warm: float | None) -> dict[str, str]:
    """The panels of a run as SVG, by what they show.

    Args:
        records: of its steps, at least one.
        warm: held-out accuracy after the warm start; None where there was none.
    """
    from matplotlib.figure import Figure

    def draw(file: Any, panel: Callable[..., None]) -> None:
        figure = Figure(figsize=(5.4, 3.5), layout="constrained")
        axis = figure.subplots()
        panel(axis, records, warm)
        axis.set_xlabel("optimizer step")
        figure.savefig(file, format="svg")

    return {name: _svg(partial(draw, panel=panel), name) for name, panel in RUN_PANELS.items()}


def module_pictures(maps: Mapping[str, Any]) -> dict[str, str]:
    """Heat maps of modules over steps as SVG, by what they show; without those that have no number.

    Args:
        maps: what :meth:`gac.report.Report.maps` returns.
    """
    found = {}
    for name, heading in MAPS.items():
        try:
            found[heading] = _svg(partial(draw_modules, maps, names=(name,), file_format="svg"), heading)
        except ValueError:  # nothing measurable
            continue
    return found


MAPS = {
    "disagreement": "disagreement of the branches, by module",
    "cosine": "cosine between the branches, by module",
    "noise_sft": "noise of the SFT gradient, by module",
    "noise_rl": "noise of the RL gradient, by module",
}
"""Names of the maps, and what they show."""


def _svg(draw: Callable[[Any], None], label: str) -> str:
    """What `draw` writes to a file as the SVG of a page: coloured by variables, with names that are its own."""
    import matplotlib

    matplotlib.use("Agg")  # no display is needed
    file = io.StringIO()
    settings: Any = {**SETTINGS, **_THEME}
    with matplotlib.rc_context(settings):
        draw(file)
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", text, flags=re.DOTALL)
    for colour, variable in VARIABLES.items():
        text = re.sub(rf"{colour}\b", variable, text, flags=re.IGNORECASE)
    prefix = re.sub(r"\W+", "-", label)
    text = re.sub(r'\bid="', f'id="{prefix}-', text)
    text = re.sub(r'(href="|url\()#', rf"\1#{prefix}-", text)
    head, end, rest = text.partition(">")
    head = re.sub(r' (width|height)="[^"]*"', "", head)  # the page decides; the viewBox keeps the shape
    return head.replace("<svg", f'<svg role="img" aria-label="{label}"', 1) + end + rest

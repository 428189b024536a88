"""Pictures of one run and of several, drawn with matplotlib from the records of metrics.jsonl.

Colours are Okabe and Ito's, which stay apart for colour-blind readers; lines that share a panel also differ in style.
"""

from gac.plots.common import COLOURS, SETTINGS, Record, legend_below
from gac.plots.comparison import draw_comparison
from gac.plots.modules import draw_modules
from gac.plots.run import RUN_PANELS, draw_run

__all__ = [
    "COLOURS",
    "RUN_PANELS",
    "SETTINGS",
    "Record",
    "draw_comparison",
    "draw_modules",
    "draw_run",
    "legend_below",
]

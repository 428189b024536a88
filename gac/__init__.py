"""Sets the SFT/RL mix of a training step from measured gradient statistics.

``mixer = gac.patch(model)``, then train: see :class:`gac.Mixer`. Importing this package imports torch alone; trainers,
losses and the command line are modules of their own.
"""

from gac import laws, schedules
from gac.laws import Controller
from gac.mixer import Mixer
from gac.patching import patch
from gac.report import Report
from gac.statistics import ModuleStatistics, Statistics, coefficient_statistics
from gac.version import __version__

__all__ = [
    "Controller",
    "Mixer",
    "ModuleStatistics",
    "Report",
    "Statistics",
    "__version__",
    "coefficient_statistics",
    "laws",
    "patch",
    "schedules",
]

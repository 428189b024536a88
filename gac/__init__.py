"""Sets the SFT/RL mix of a training step from measured gradient statistics.

``mixer = gac.patch(model)``, then train: see :class:`gac.Mixer`. Importing this package imports torch alone; trainers,
losses and the command line are modules of their own.
"""

from gac import laws, schedules
from gac.laws import Controller
from gac.mixer import Mixer
from gac.patching import patch
from gac.statistics import Statistics, coefficient_statistics

__version__ = "0.1.0"

__all__ = ["Controller", "Mixer", "Statistics", "coefficient_statistics", "laws", "patch", "schedules"]

"""Who may import whom, as data: the floors of the house from the ground up.

A module may import from its own floor's folder and from floors below. Each entry is a folder or a module; the most
specific one counts. ``tests/test_order.py`` holds the code against it.
"""

FLOORS = (
    ("gac_kernels",),
    ("gac.statistics",),
    ("gac.schedules", "gac.version"),
    ("gac.observe", "gac.laws"),
    ("gac.options", "gac.weights", "gac.metrics"),
    ("gac.measurement",),
    ("gac.branches",),
    ("gac.report",),
    ("gac.mixer",),
    ("gac.patching",),
    ("gac",),  # the package's face
    ("gac.losses", "gac.plots", "gac.plan"),
    ("gac.trainers",),
    ("gac.tasks",),
    ("gac.bench", "gac.audit"),
    ("gac.runs",),
    ("gac.cli",),
    ("benchmarks",),
)

ALLOWED_UPWARDS = {
    ("gac.report.report", "gac.plots"): "Report.plot draws by matplotlib, imported when asked",
}
"""Imports against the order, each with its reason."""

"""Who may import whom, as data: the floors of the house from the ground up.

A module may import from its own entry and from floors below; the entries of one floor do not know each other. An entry
is a folder or a module. One that has entries of its own beneath it (``gac``) means itself alone, so that a new folder
has to be given a floor. ``tests/test_order.py`` holds the code against it.
"""

FLOORS = (
    ("gac_kernels",),
    ("gac.state",),  # imports nothing of the package
    ("gac.files", "gac.modes"),
    ("gac.statistics",),
    ("gac.plots", "gac.schedules", "gac.version"),  # these import nothing of the package
    ("gac.laws", "gac.observe", "gac.accumulation", "gac.cadence", "gac.silence"),
    ("gac.fused", "gac.sequences"),
    ("gac.metrics", "gac.options", "gac.saved", "gac.weights", "gac.worth"),
    ("gac.finishing", "gac.spending"),
    ("gac.measurement", "gac.quiet"),
    ("gac.branches", "gac.ending", "gac.following"),
    ("gac.report",),  # below the mixer, whose report() makes one when asked
    ("gac.results",),
    ("gac.mixer",),
    ("gac.patching",),
    ("gac",),  # the package's face
    ("gac.losses", "gac.plan"),
    ("gac.trainers",),
    ("gac.tasks",),
    ("gac.runs",),
    ("gac.audit", "gac.bench"),
    ("gac.cli",),
    (
        "benchmarks.accumulate",
        "benchmarks.audit_budget",
        "benchmarks.budget_runs",
        "benchmarks.communication",
        "benchmarks.conftest",
        "benchmarks.fallback",
        "benchmarks.kill_and_resume",
        "benchmarks.on_device",
        "benchmarks.overhead",
        "benchmarks.predictions",
        "benchmarks.real",
        "benchmarks.sequences",
        "benchmarks.study",
        "benchmarks.test_kernels",
        "benchmarks.test_step",
    ),
    ("benchmarks.two_sources",),  # on the study's tasks
    ("benchmarks.equal_bytes",),
)

ALLOWED_UPWARDS: dict[tuple[str, str], str] = {}
"""``(importer, imported)`` against the order, each with its reason. Imports for types count as any other."""

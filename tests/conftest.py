"""Which tests `make quick` leaves out, and which tests have to share a process of pytest-xdist."""

from pathlib import Path

import pytest

TESTS = Path(__file__).parent

SLOW = (
    "benchmarks",
    "gac/audit",
    "gac/bench",
    "gac/cli",
    "gac/distributed",
    "gac/laws/test_choice.py",
    "gac/laws/test_half_life.py",
    "gac/laws/test_momentum.py",
    "gac/plan",
    "gac/statistics",
    "gac/tasks",
    "gac/trainers",
    "gac_kernels/test_aot.py",
    "gac_kernels/test_cpu_builtins.py",
    "gac_kernels/test_cpu_library.py",
    "gac_kernels/test_interpreter.py",
    "test_readme.py",
)
"""Folders and modules that take long, next to what they say about a small change: `make test` runs them too."""


def is_slow(module: Path) -> bool:
    """Whether a test module is one of :data:`SLOW`, or lies in one of its folders."""
    place = module.relative_to(TESTS)
    return any(place.is_relative_to(entry) for entry in SLOW)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if is_slow(item.path):
            item.add_marker("slow")
        # What a module's fixtures make is made once; on a GPU most of a test's time is the compiler's, so they spread.
        if not any(item.get_closest_marker(name) for name in ("xdist_group", "gpu")):
            item.add_marker(pytest.mark.xdist_group(item.path.relative_to(TESTS).as_posix()))

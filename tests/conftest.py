"""Which tests `make quick` leaves out, and which modules pytest-xdist takes first."""

import functools
import gc
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).parent

SLOW = (
    # other processes, ranks, compilers, training
    "benchmarks",
    "examples",
    "gac/audit",
    "gac/bench",
    "gac/cli",
    "gac/distributed",
    "gac/fused/test_interpreter.py",
    "gac/tasks",
    "gac/trainers",
    "gac_kernels/test_aot.py",
    "gac_kernels/test_interpreter.py",
    "gac_kernels/test_prepared.py",
    "test_readme.py",
    # simulations of many steps
    "gac/laws/test_choice.py",
    "gac/laws/test_half_life.py",
    "gac/laws/test_momentum.py",
    "gac/laws/test_paper_choices.py",
    "gac/laws/test_planted.py",
    "gac/laws/test_prior_weight.py",
    "gac/laws/test_standard_error.py",
    "gac/observe/test_optimizer_space.py",
    "gac/plan",
    "gac/sequences/test_engines.py",
    "gac/sequences/test_errors.py",
    "gac/sequences/test_ranks.py",
    "gac/statistics/test_coefficient.py",
    "gac/statistics/test_correlated.py",
    "gac/statistics/test_of_models.py",
    "gac/statistics/test_sketch_error.py",
    "gac/statistics/test_smoothing.py",
    "gac/statistics/test_standard_errors.py",
    "gac/statistics/test_unbiased.py",
    # pictures
    "gac/runs/test_page.py",
    "gac/test_plots.py",
    # a thousand cases
    "fuzz",
    "gac/laws/test_edges.py",
    "gac/test_misuse.py",
    "gac/test_saved.py",
    "gac/test_spending.py",
    "gac_kernels/test_cpu_library.py",
    "gac_kernels/test_fallback.py",
    "gac_kernels/test_kronecker.py",
    "gac_kernels/test_ops.py",
)
"""Folders and modules that take long for what they say about a small change; `make test` runs them too."""


LONGEST = (
    "gac/bench/test_command.py",
    "gac/distributed/test_engines.py",
    "gac/trainers/test_ranks.py",
    "gac/trainers/test_trl_options.py",
    "gac_kernels/test_aot.py",
    "gac_kernels/test_interpreter.py",
)
"""Those of a minute and more: first of all, so that no worker ends with one."""


TOGETHER = ("gac/distributed/test_gpu.py",)
"""Whose fixtures take long: with ``--dist loadgroup``, as in the GPU suite, one worker has all tests of each."""


def is_longest(module: Path) -> bool:
    """Whether a test module is one of :data:`LONGEST`."""
    return module.relative_to(TESTS).as_posix() in LONGEST


@functools.cache
def is_slow(module: Path) -> bool:
    """Whether a test module (or a folder) is one of :data:`SLOW`, or lies in one of its folders."""
    place = module.relative_to(TESTS)
    return any(place.is_relative_to(entry) for entry in SLOW)


@pytest.fixture(autouse=True)
def a_budget_for_every_step(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mixers that are asked for nothing else measure every step, however fast the machine; see the marker `budget`."""
    if request.node.get_closest_marker("budget") is None:
        monkeypatch.setattr("gac.options.OVERHEAD", 1e9)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Without slow tests their modules are not read either: importing trainers takes longer than many a test."""
    return True if config.getoption("markexpr") == "not slow" and is_slow(collection_path) else None


def pytest_collection_finish() -> None:
    """What importing made lives as long as the process: the garbage collector need not look at it again.

    accelerate collects at both ends of every training, which took half of the time of a test that trains.
    """
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # extensions look for leaks when the process ends


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Groups for ``--dist loadgroup``: pytest-xdist 3.8 hands its own on in what pytest 9.2 no longer reads."""
    if config.getoption("dist") != "loadgroup":
        return None
    from xdist.scheduler import LoadScopeScheduling  # an extra of the tests

    class ByModule(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            module = nodeid.partition("::")[0]
            return module if module.endswith(TOGETHER) else nodeid

    return ByModule(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if is_slow(item.path):
            item.add_marker("slow")
    if hasattr(config, "workerinput"):  # of pytest-xdist
        items.sort(key=lambda item: (not is_longest(item.path), not is_slow(item.path)))

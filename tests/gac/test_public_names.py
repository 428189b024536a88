"""The names that other code imports: they stay, whatever moves behind them."""

import importlib
import re
from importlib.metadata import version
from pathlib import Path

import pytest

NAMES = {
    "gac": (
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
    ),
    "gac.laws": ("Law", "Step", "available", "create", "register"),
    "gac.laws.base": ("momentum_of",),
    "gac.plan": ("DEVICES", "Noise", "Parameters", "Setup", "make_plan"),
    "gac.report": ("HISTORY", "BranchSignal", "ModuleSummary", "Report", "append_record", "read_history"),
    "gac.schedules": ("warmup_cosine",),
    "gac.statistics": ("Statistics",),
    "gac.trainers": ("GacCallback", "HybridGRPOConfig", "HybridGRPOTrainer", "MixedBatch"),
    "gac_kernels": (
        "SketchLayout",
        "absorb_",
        "absorb_sketch_",
        "accumulate_",
        "mix_",
        "moments",
        "pair_moments",
        "sketch",
        "token_moments",
    ),
    "gac_kernels.reference": (
        "absorb_",
        "absorb_sketch_",
        "accumulate_",
        "mix_",
        "moments",
        "pair_moments",
        "sketch",
        "token_moments",
    ),
}
METHODS = (
    "backward",
    "follow",
    "load_state_dict",
    "metrics",
    "mixed_loss",
    "mu",
    "observe",
    "observe_tokens",
    "report",
    "rl",
    "sft",
    "state_dict",
    "statistics",
    "step",
    "unpatch",
    "weight",
)


@pytest.mark.parametrize(("module", "name"), [(module, name) for module, names in NAMES.items() for name in names])
def test_names_stay(module, name):
    assert getattr(importlib.import_module(module), name) is not None


@pytest.mark.parametrize("name", METHODS)
def test_methods_of_the_mixer_stay(name):
    import gac

    assert hasattr(gac.Mixer, name)


def test_the_version_stands_in_one_place():
    import gac

    assert re.fullmatch(r"\d+\.\d+\.\d+", gac.__version__)
    assert version("gac-kernels") == gac.__version__
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert 'dynamic = ["version"]' in project
    assert not re.search(r'^version = "', project, flags=re.MULTILINE)


def test_annotations_are_shipped():
    import gac
    import gac_kernels

    for package in (gac, gac_kernels):
        assert (Path(package.__file__).parent / "py.typed").exists()


def test_no_module_is_long():
    """Over 400 lines a module has more than one job; kernels, which repeat what cannot be shared, are exempt."""
    root = Path(__file__).parents[2]
    paths = [path for package in ("gac", "gac_kernels", "benchmarks") for path in (root / package).rglob("*.py")]
    long = {str(p.relative_to(root)): n for p in paths if (n := len(p.read_text().splitlines())) > 400}
    assert set(long) <= {"gac_kernels/triton/kernels.py"}

"""Options of ``pytest benchmarks/``: the device, and how large a run is wanted."""

from __future__ import annotations

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--device`` and ``--sizes``."""
    group = parser.getgroup("gac benchmarks")
    group.addoption("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    group.addoption("--sizes", default="64K,16M", help="elements of each tensor, as 1K,64K,16M")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Sizes become parameters."""
    if "elements" in metafunc.fixturenames:
        from gac.bench.case import size_label
        from gac.cli.bench import parse_size

        sizes = [parse_size(text) for text in metafunc.config.getoption("--sizes").split(",")]
        metafunc.parametrize("elements", sizes, ids=size_label, scope="module")


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where to measure."""
    return torch.device(request.config.getoption("--device"))

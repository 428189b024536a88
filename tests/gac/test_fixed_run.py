"""A fixed small run gives what it gave before the packages were arranged by job; see ``tests/gac/fixed_run.py``."""

import json
import math
from pathlib import Path

import pytest

import gac.ending
import gac.observe.summing
import gac_kernels.cpu.ending
from gac.fused.host import HostProgram
from gac_kernels.cpu.ending import serves
from tests.gac import fixed_run

RECORD = json.loads((Path(__file__).parent.parent / "data" / "fixed_run.json").read_text())
ROUNDED = {"one contribution", "coefficients"}
"""Moving means and z-scores round: their last digits may differ between machines."""


def same(found: object, expected: object, *, rel: float) -> bool:
    """Whether both hold the same numbers, NaN beside NaN."""
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(same(found[k], expected[k], rel=rel) for k in expected)
    if isinstance(expected, list):
        return len(found) == len(expected) and all(same(f, e, rel=rel) for f, e in zip(found, expected, strict=True))
    if isinstance(expected, float):
        return (math.isnan(found) and math.isnan(expected)) or math.isclose(found, expected, rel_tol=rel, abs_tol=0.0)
    return found == expected


@pytest.mark.parametrize("case", fixed_run.CASES)
def test_statistics_and_gradients(case):
    found = json.loads(json.dumps(fixed_run.measure(**fixed_run.CASES[case])))
    assert same(found, RECORD["runs"][case], rel=1e-6 if case in ROUNDED else 0.0), found


@pytest.mark.parametrize("law", fixed_run.LAWS)
def test_mu(law):
    assert same(fixed_run.control(law, fixed_run.LAWS[law]), RECORD["laws"][law], rel=1e-12)


@pytest.mark.parametrize("law", fixed_run.LAWS)
def test_mu_where_every_step_is_measured(law):
    """As before gaps were counted by steps: without any nothing may differ."""
    found = fixed_run.control(law, fixed_run.LAWS[law], gaps=False)
    assert same(found, RECORD["laws, every step measured"][law], rel=1e-12)


@pytest.mark.parametrize("by_library", [True, False])
@pytest.mark.parametrize("case", fixed_run.MOVING)
def test_law_gac_in_a_mixer(case, by_library, monkeypatch):
    """As before the library ended steps: whether it does, or Python's numbers do as on a machine without it."""
    ended = []
    ordinary = HostProgram.__call__
    monkeypatch.setattr(HostProgram, "__call__", lambda *args, **more: ended.append(1) or ordinary(*args, **more))
    if not by_library:
        for module in (gac_kernels.cpu.ending, gac.observe.summing):
            monkeypatch.setattr(module, "serves", lambda: False)
    # without the library gradients are summed in float32: up to 2e-4 of what cancels to a hundredth of its terms
    rel = 1e-12 if serves() else 1e-3
    assert same(fixed_run.moving(**fixed_run.MOVING[case]), RECORD["law gac, mu moving"][case], rel=rel)
    assert len(ended) == (12 if by_library and serves() else 0)

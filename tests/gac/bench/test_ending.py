"""The end of a step, timed by part."""

import json
from time import perf_counter, sleep

import pytest
import torch

from gac.bench import ending


def test_the_parts_of_a_step(tmp_path, monkeypatch):
    """Which are written as they come."""
    written, write = [], ending.write_json
    monkeypatch.setattr(ending, "write_json", lambda path, found: (written.append(len(found)), write(path, found)))
    assert ending.main(["--rounds", "3", "--out", str(tmp_path / "ending.json")]) == 0
    assert written == [1, 2, 3, 4, 5]
    found = json.loads((tmp_path / "ending.json").read_text())
    steps = {"sketch", "exact", "sketch, 300 tensors", "exact, 300 tensors"}
    assert set(found) == {*steps, "seconds"}
    for estimator in steps:
        measured, unmeasured = found[estimator]["measured"], found[estimator]["unmeasured"]
        assert set(measured["parts"]) == set(ending.PARTS)
        assert measured["parts"]["sums"] > 0 < measured["parts"]["metrics"]
        assert measured["parts"]["program"] > 0
        assert 0 < measured["quickest"] <= measured["thread"]
        assert measured["floor"] > 0
        assert not any(unmeasured["parts"].values())  # it is passed by
        assert 0 < unmeasured["quickest"] < measured["quickest"]


def test_a_call_is_timed():
    few, many = (ending.calls(torch.device("cpu"), tensors, times=3) for tensors in (1, 300))
    assert 0 < few < many


def test_a_part_has_no_time_of_those_within_it():
    parts = ending.Parts()
    inner = parts._timed("inner", lambda: sleep(0.05))
    outer = parts._timed("outer", lambda: (inner(), sleep(0.02)))
    start = perf_counter()
    outer()
    whole = perf_counter() - start
    assert parts.seconds["inner"] >= 0.05
    assert 0.02 <= parts.seconds["outer"] <= whole - parts.seconds["inner"]


def test_steps_are_as_before_once_they_were_watched():
    before = [getattr(owner, name) for methods in ending.PARTS.values() for owner, name in methods]
    with pytest.raises(RuntimeError, match="stop"), ending.Parts().watching():
        raise RuntimeError("stop")
    assert [getattr(owner, name) for methods in ending.PARTS.values() for owner, name in methods] == before


def test_what_is_predicted_is_what_the_program_starts():
    """3 programs and 2 fills; ``tests/gac/fused/test_device.py`` counts them."""
    assert ending.PREDICTED["measured"]["kernels"] == 5
    assert ending.PREDICTED["unmeasured"]["kernels"] == 1
    assert ending.Steps(torch.device("cpu")).mixer.estimator == "sketch"

"""Launches that repeat go to the compiled kernel directly, with what an ordinary launch hands over (stub_driver.py)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
PROGRAM = Path(__file__).parent / "stub_driver.py"


def observed(*options: str) -> dict:
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "GAC_BACKEND")}
    command = [sys.executable, str(PROGRAM), *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def prepared():
    return observed()


@pytest.fixture(scope="module")
def unprepared():
    return observed("--unprepared")


def launched(call: dict) -> list:
    """Kernel, grid, stream and function of each launch, and its arguments but for addresses, which differ."""
    return [
        (name, grid, stream, function, ["address" if isinstance(a, int) else a for a in args])
        for name, grid, stream, function, args in call["reached"]
    ]


def test_repeated_calls_go_to_the_launcher(prepared):
    counts = {"sketch": 2, "accumulate_": 2, "absorb_": 1, "absorb_sketch_": 2, "gather": 2, "finish": 1}
    for name, count in (counts | {"weighted": 2, "absorbed weighted": 2, "no into": 2}).items():
        first, second, third = prepared[name]
        assert len(first["reached"]) == count
        assert 0 < len(first["ordinary"]) <= count or name == "no into"  # the first kernel is that of another call
        assert second["ordinary"] == third["ordinary"] == []
        assert launched(second) == launched(third) == launched(first)
    moved = prepared["moved"]
    assert [call["ordinary"] for call in moved] == [[], []]  # another table of addresses, nothing else
    table = lambda call: call["reached"][0][4][0]
    assert table(moved[0]) == table(moved[1]) != table(prepared["sketch"][2])


def test_the_end_of_a_step_has_a_program_for_each_kind_of_step(prepared):
    for name in ("nothing", "told"):
        first, second = prepared[name]
        assert first["ordinary"] == ["finish_kernel"], name
        assert second["ordinary"] == [], name
    (longer,) = prepared["longer"]
    assert longer["ordinary"] == []
    assert [name for name, *_ in longer["reached"]] == ["pair_kernel", "gather_kernel"]
    assert longer["reached"][1][1] == [1, 1, 1]  # one program
    numbers = longer["reached"][1][4]
    assert [numbers[k] for k in (3, 4, 5, 6)] == ["4", "16", "16", "1"]  # stride, rows, contributions, cells


def test_arguments_of_another_kind_are_compiled_for(prepared):
    """An address that is no multiple of 16, a number in place of a tensor: the kernel at hand does not fit them."""
    assert [call["ordinary"] for call in prepared["other scale"]] == [[], []]
    for name in ("unaligned scale", "unaligned out", "number"):
        first, second = prepared[name]
        assert first["ordinary"] == ["sketch_finish_kernel"], name
        assert second["ordinary"] == [], name
    values = [[a for a in call["reached"][1][4] if a in ("0.25", "0.75")] for call in prepared["number"]]
    assert values == [["0.25"], ["0.75"]]
    assert len(prepared["two dtypes"][0]["ordinary"]) == 3
    assert prepared["two dtypes"][1]["ordinary"] == []


def test_repeated_calls_write_where_they_are_told_and_read_what_the_first_stage_wrote(prepared):
    out, into, previous, sums = prepared["addresses"]
    for name, vectors in (("sketch", (out, into)), ("absorb_sketch_", (previous, sums))):
        for call in prepared[name]:
            start, finish = (arguments for *_, arguments in call["reached"])
            assert set(vectors) <= set(finish)
            lanes, partials = start[4:6]
            assert finish[0] == lanes
            assert partials in finish
            assert lanes < partials or call is prepared[name][0]  # in one piece of memory, once it is repeated
    first, second = prepared["absorbed elsewhere"]
    assert first["ordinary"] == second["ordinary"] == []
    assert previous not in first["reached"][1][4]
    assert previous in second["reached"][1][4]


def test_what_is_wrong_is_refused_whatever_was_right_before(prepared):
    first, second = prepared["refused"]
    assert "accepted" not in first
    assert first == second


def test_profilers_see_every_launch(prepared):
    if "watched" not in prepared:
        pytest.skip("this Triton has no hooks of launches")
    assert len(prepared["watched"][0]["ordinary"]) == 2
    assert prepared["no longer watched"][0]["ordinary"] == []


def test_with_a_triton_that_is_not_known_every_launch_is_ordinary(prepared, unprepared):
    assert unprepared.pop("refused") == prepared["refused"]
    del unprepared["addresses"]
    for name, calls in unprepared.items():
        for number, call in enumerate(calls):
            assert len(call["ordinary"]) == len(call["reached"]) > 0
            assert launched(call) == launched(prepared[name][number]), name

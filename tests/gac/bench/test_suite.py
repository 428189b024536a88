"""The GPU suite's own doing: its time, and what is left of it when it is stopped. A script stands in for Python."""

import os
import re
import signal
import subprocess
import time
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import on_device
from tests.conftest import TESTS, TOGETHER, pytest_xdist_make_scheduler

SUITE = Path(__file__).parents[3] / "benchmarks" / "gpu_suite.sh"
MOST = 480
"""Seconds."""

PYTHON = """\
#!/usr/bin/env bash
echo "$*" >> "$CALLS"
case "$*" in *"/out/$SLOW"*) exec sleep 60 ;; esac
while [ $# -gt 1 ]; do [ "$1" != --out ] || echo '{}' > "${2%.json}.json"; shift; done
"""

TIMEOUT = """\
#!/usr/bin/env bash
shift
echo "$1" >> "$SECONDS_OF_PARTS"
shift
exec "$@"
"""


def limits():
    done = subprocess.run(["bash", SUITE, "/tmp", "--limits"], capture_output=True, text=True, check=True)
    return {name: int(seconds) for name, seconds in map(str.split, done.stdout.splitlines())}


def executable(path, text):
    path.write_text(text)
    path.chmod(0o755)
    return path


@pytest.fixture
def start(tmp_path):
    """Starts the suite with a Python that only leaves files; ``slow``: the part that takes a minute."""
    started = []

    def begin(*parts, slow="nothing", path=""):
        environment = os.environ | {
            "PYTHON": str(executable(tmp_path / "python", PYTHON)),
            "CALLS": str(tmp_path / "calls"),
            "SLOW": slow,
            "SECONDS_OF_PARTS": str(tmp_path / "seconds"),
            "PATH": f"{path}:{os.environ['PATH']}" if path else os.environ["PATH"],
        }
        command = ["bash", str(SUITE), str(tmp_path / "out"), *parts]
        started.append(subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, start_new_session=True))
        return started[-1]

    yield begin
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def until(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_the_limits_are_those_of_the_parts_and_add_up():
    text = SUITE.read_text()
    assert sum(limits().values()) <= MOST
    assert [name for name in limits() if name != "summary"] == re.findall(r"^part (\w+) ", text, flags=re.MULTILINE)


def test_what_the_cases_of_the_budget_take_fits_its_limit():
    """By the steps that an H100 took: before, 16 steps and more of each were 350 s in a part of 75."""
    seconds = float(re.search(r"^  on_device=\(--device cuda --seconds (\d+)\)", SUITE.read_text(), re.MULTILINE)[1])
    planned = [on_device.planned(case, seconds) for case in on_device.BUDGET]
    assert on_device.LOADING + sum(planned) <= limits()["budget"] - 4  # what a command is told is its limit
    assert max(planned) == planned[-1], "what takes longest is the first to be left out"
    first = on_device.planned(on_device.COMPILED[0], seconds, compiled=True)
    assert on_device.LOADING + first <= limits()["compiled"] - 4


def test_no_part_goes_beyond_the_limits_so_far(start, tmp_path):
    """What a part leaves is the next one's, and no more."""
    (tmp_path / "bin").mkdir()
    executable(tmp_path / "bin" / "timeout", TIMEOUT)
    assert start(path=str(tmp_path / "bin")).wait(timeout=60) == 0
    given = [int(seconds) + 2 for seconds in (tmp_path / "seconds").read_text().split()]  # 2 s until it is killed
    ends = list(accumulate(limits().values()))
    assert len(given) == len(ends)
    assert all(one <= end for one, end in zip(given, ends, strict=True))
    assert all(one > own for one, own in zip(given[1:], list(limits().values())[1:], strict=True)), "none took its time"
    told = re.search(r"on_device budget .*--limit (\d+)", (tmp_path / "calls").read_text())
    assert int(told[1]) == given[3] - 4


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_a_suite_that_is_killed_loses_nothing_that_was_done(start, tmp_path, how):
    suite, out = start("step", "kernels", "sequence", slow="kernels"), tmp_path / "out"
    until(lambda: "== kernels" in _text(out / "suite.log"))
    assert (out / "step.json").exists(), "at its place while the suite goes on"
    suite.send_signal(how)
    code = suite.wait(timeout=30)
    assert (out / "step.json").read_text() == "{}\n"
    assert "part step exit 0" in _text(out / "suite.log")
    assert not (out / "sequence.json").exists()
    calls = (tmp_path / "calls").read_text()
    if how == signal.SIGTERM:
        assert code == 143
        assert "gac.bench.summary" in calls
        until(lambda: not _alive(suite.pid))
    else:
        assert "gac.bench.summary" not in calls


def _text(path):
    return path.read_text() if path.exists() else ""


def _alive(group):
    """Whether any process of the suite's session is left: its slow part is ended with it."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_worker_has_all_tests_of_the_engines():
    """Each of twelve would start ranks of its own on the one GPU."""
    pytest.importorskip("xdist")
    assert "--dist loadgroup" in SUITE.read_text()
    options = {"dist": "loadgroup", "tx": ["2*popen"]}
    config = SimpleNamespace(getoption=options.__getitem__, getvalue=options.__getitem__)
    scope_of = pytest_xdist_make_scheduler(config, None)._split_scope
    for module in TOGETHER:
        assert (TESTS / module).is_file()
        assert scope_of(f"tests/{module}::test_one[1]") == scope_of(f"tests/{module}::test_two")
    assert scope_of("tests/gac/test_gpu.py::test_one") != scope_of("tests/gac/test_gpu.py::test_two")
    assert pytest_xdist_make_scheduler(SimpleNamespace(getoption=lambda name: "loadscope"), None) is None

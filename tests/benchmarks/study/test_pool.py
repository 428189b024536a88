"""The study's runner with rows that train nothing."""

import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest

from benchmarks.study import UsageError, __main__, pool
from benchmarks.study.progress import Progress, time_left
from benchmarks.study.records import append, read_records

ROOT = Path(__file__).parents[3]


@dataclasses.dataclass(frozen=True)
class Row:
    name: str
    what: str = "quick"
    warm: str = ""
    phase: str = "tuning"
    size: str = "small"

    @property
    def key(self) -> str:
        return f"{self.phase}/{self.name}"


def train(row: Row, cache: Path) -> dict:
    """Leaves a file with the time it began and ended; `what` says how it goes."""
    begun = time.time()
    print(f"training {row.name}")
    if row.what == "raises":
        raise ArithmeticError(f"no luck with {row.name}")
    if row.what == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    if row.what == "slow":
        time.sleep(0.6)
    if row.what == "endless":
        (cache / f"{row.name}.pid").write_text(str(os.getpid()))
        time.sleep(60)
    value = float("nan") if row.what == "nan" else 0.5
    with (cache / "times.jsonl").open("a") as file:
        file.write(json.dumps([row.name, begun, time.time()]) + "\n")
    return {
        "key": row.key,
        **vars(row),
        "accuracy": [[0, 0.25], [20, value]],
        "statistics": {"sigma_s2": [float("nan")]},
        "seconds": time.time() - begun,
        "threads": os.environ["OMP_NUM_THREADS"],
    }


@pytest.fixture
def run(tmp_path):
    """``run(rows, ...)`` in folders of this test; ``run.lines`` holds what was shown."""
    from rich.console import Console

    shown = io.StringIO()

    def function(rows, **options):
        progress = Progress(Console(file=shown, width=200))
        return pool.run_rows(rows, train=train, folder=tmp_path / "data", cache=tmp_path, report=progress, **options)

    function.lines = lambda: shown.getvalue().splitlines()
    return function


def spans(cache: Path) -> dict[str, tuple[float, float]]:
    lines = (cache / "times.jsonl").read_text().splitlines()
    return {name: (begun, ended) for name, begun, ended in map(json.loads, lines)}


def test_records_survive_a_torn_line(tmp_path):
    path = tmp_path / "tuning.jsonl"
    append(path, {"key": "a", "value": 1, "odd": [float("nan"), float("inf"), (0.5,)]})
    append(path, {"key": "b"})
    append(path, {"key": "a", "value": 2, "odd": [float("nan"), float("inf"), (0.5,)]})
    with path.open("a") as file:
        file.write('{"key": "c", "val')
    kept = [{"key": "a", "value": 2, "odd": [None, None, [0.5]]}, {"key": "b"}]
    assert read_records(tmp_path) == kept
    append(path, {"key": "c"})
    assert read_records(tmp_path) == [*kept, {"key": "c"}]
    assert len(path.read_text().splitlines()) == 4
    path.write_text('{"key": "a"}\n<<<<<<<\n')
    with pytest.raises(UsageError, match=r"tuning\.jsonl, line 2"):
        read_records(tmp_path)


def test_two_rows_at_a_time_each_on_one_thread(run, tmp_path):
    rows = [Row(name, "slow") for name in "abcd"]
    assert run(rows) == []
    assert {record["key"] for record in read_records(tmp_path / "data")} == {row.key for row in rows}
    assert {record["threads"] for record in read_records(tmp_path / "data")} == {"1"}
    times = spans(tmp_path)
    beside = [sum(b < end and begun < e for b, e in times.values()) for begun, end in times.values()]
    assert max(beside) >= 2
    starts = sorted(begun for begun, _ in times.values())
    ends = sorted(end for _, end in times.values())
    assert starts[2] > ends[0]
    assert starts[3] > ends[1]
    assert run.lines()[-1].startswith("4/4  tuning/")
    assert "0.250 -> 0.500" in run.lines()[-1]


def test_a_failing_row_stops_no_other_and_is_tried_again(run, tmp_path):
    rows = [Row("a", "raises"), Row("b", "dies"), Row("c", "nan"), Row("d")]
    failures = {failure.key: failure for failure in run(rows)}
    assert failures["tuning/a"].reason == "ArithmeticError: no luck with a"
    assert failures["tuning/b"].reason == "killed by SIGKILL"
    assert "accuracy is not finite" in failures["tuning/c"].reason
    log = failures["tuning/a"].log.read_text()
    assert log.startswith("training a\nTraceback")
    assert log.endswith("ArithmeticError: no luck with a\n")
    assert any("ArithmeticError" in line and str(failures["tuning/a"].log) in line for line in run.lines())
    assert [record["key"] for record in read_records(tmp_path / "data")] == ["tuning/d"]
    assert run([Row("a"), Row("d", "raises")]) == []
    assert [record["key"] for record in read_records(tmp_path / "data")] == ["tuning/d", "tuning/a"]


def test_rows_of_one_warm_start_wait_for_its_first(run, tmp_path):
    rows = [Row("a", "slow", "x"), Row("b", "slow", "x"), Row("c", "quick", "y"), Row("d", "slow", "x")]
    run(rows, warm_start_id=lambda row: row.warm)
    times = spans(tmp_path)
    assert times["c"][0] < times["a"][1]
    assert min(times["b"][0], times["d"][0]) > times["a"][1]
    assert times["b"][0] < times["d"][1]
    assert times["d"][0] < times["b"][1]


def test_no_run_starts_after_the_deadline(run, tmp_path):
    assert run([Row("a")], deadline=time.monotonic()) == []
    assert read_records(tmp_path / "data") == []


def test_one_process_writes(run, tmp_path):
    with pool._alone(tmp_path / "data"), pytest.raises(UsageError, match="another process"):
        run([Row("a")])


def test_time_left():
    seconds = {"small": [10.0, 20.0, 90.0], "large": [100.0]}
    assert time_left(["small", "large"], [], seconds, 2) == (20 + 100) / 2
    assert time_left(["medium"], [("small", 15.0)], seconds, 1) == 55 + 5
    assert time_left([], [("large", 10.0), ("small", 50.0)], seconds, 2) == 90
    assert time_left(["small"], [], {}, 2) is None


COMMAND = """
import sys
from tests.benchmarks.study import test_pool
sys.modules.update(test_pool.parts({rows}))
from benchmarks.study.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


class NotReady(Exception):
    pass


def parts(rows: list[Row]) -> dict[str, types.SimpleNamespace]:
    """A grid whose tuning shows four rows beyond what is done and whose other phase needs all of tuning."""

    def of_phase(phase: str, records: list[dict]) -> list[Row]:
        done = {record["key"] for record in records}
        tuning = [row for row in rows if row.phase == "tuning"]
        missing = [row for row in tuning if row.key not in done]
        if phase == "tuning":
            return [row for row in tuning if row not in missing[4:]]
        if missing:
            raise NotReady(f"{len(missing)} rows of tuning are missing")
        return [row for row in rows if row.phase == phase]

    def from_record(record: dict) -> Row:
        return Row(**{field.name: record[field.name] for field in dataclasses.fields(Row)})

    return {
        "benchmarks.study.grid": types.SimpleNamespace(
            PHASES=("tuning", "comparison"),
            ON_DEMAND=(),
            NotReady=NotReady,
            rows=of_phase,
            Row=types.SimpleNamespace(from_record=from_record),
        ),
        "benchmarks.study.training": types.SimpleNamespace(
            PRELOAD=(), train_row=train, warm_start_id=lambda row: row.name
        ),
    }


@pytest.fixture
def main(tmp_path, monkeypatch):
    """``main(rows, argument, ...)`` in this process."""

    def function(rows, *argv):
        for name, part in parts(rows).items():
            monkeypatch.setitem(sys.modules, name, part)
        return __main__.main([*argv, "--results", str(tmp_path / "data"), "--cache", str(tmp_path)])

    return function


def command(tmp_path: Path, rows: list[Row], *argv: str) -> subprocess.Popen:
    script = COMMAND.format(rows="[" + ", ".join(f"test_pool.{row!r}" for row in rows) + "]")
    return subprocess.Popen(
        [sys.executable, "-c", script, *argv, "--results", str(tmp_path / "data"), "--cache", str(tmp_path)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


@pytest.mark.parametrize("how", ["term", "term group", "kill", "kill group"])
def test_a_killed_command_goes_on_where_it_stopped(main, tmp_path, how):
    rows = [Row("a"), Row("b", "endless"), Row("c", "slow"), Row("d", "endless")]
    process = command(tmp_path, rows, "run")
    wait_for(lambda: (tmp_path / "b.pid").exists() and (tmp_path / "d.pid").exists())
    number = signal.SIGTERM if how.startswith("term") else signal.SIGKILL
    (os.killpg if how.endswith("group") else os.kill)(process.pid, number)
    shown, _ = process.communicate(timeout=20)
    assert process.returncode == (128 + signal.SIGTERM if number == signal.SIGTERM else -number)
    assert "Traceback" not in shown
    for name in "bd":
        wait_for(lambda name=name: not alive(int((tmp_path / f"{name}.pid").read_text())))
    assert {record["key"] for record in read_records(tmp_path / "data")} == {"tuning/a", "tuning/c"}
    begun = spans(tmp_path)

    assert main([*(Row(name) for name in "abcdef"), Row("g", phase="comparison")], "run") == 0
    assert {name: spans(tmp_path)[name] for name in "ac"} == {name: begun[name] for name in "ac"}
    assert sorted(record["name"] for record in read_records(tmp_path / "data")) == list("abcdefg")


def test_phases_in_turn_up_to_a_limit(main, tmp_path, capsys):
    rows = [*(Row(name) for name in "abcd"), Row("e", phase="comparison")]
    for limit, done in ((3, "abc"), (1, "abcd"), (5, "abcde")):
        assert main(rows, "run", "--limit", str(limit)) == 0
        assert sorted(record["name"] for record in read_records(tmp_path / "data")) == list(done)
        assert ("comparison waits: 1 rows" in capsys.readouterr().out) == (done == "abc")
    assert main([Row("f", "raises")], "run") == 1
    assert "tuning/f: ArithmeticError: no luck with f" in capsys.readouterr().err


def test_a_row_is_repeated_and_compared(main, tmp_path, capsys):
    assert main([Row("a")], "run") == 0
    assert main([], "row", "tuning/a") == 0
    (record,) = read_records(tmp_path / "data")
    append(tmp_path / "data" / "tuning.jsonl", record | {"accuracy": [[0, 0.25], [20, 0.51]], "seconds": 99})
    assert main([], "row", "tuning/a") == 1
    assert "differs: accuracy[1][1]: 0.51 -> 0.5\ndiffering values: 1" in capsys.readouterr().out
    assert main([], "row", "tuning/b") == 2


def wait_for(condition, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False

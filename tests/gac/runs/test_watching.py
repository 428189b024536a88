"""A run directory as it grows, and what a terminal shows of it."""

import io
import json
import math
import os
import time

import pytest

from gac.files import DamagedFile
from gac.runs.characters import band_chart, columns_of, gauge, sparkline
from gac.runs.errors import UsageError
from gac.runs.folder import CONFIG, METRICS, MetricsFile, write_json
from gac.runs.frame import frame
from gac.runs.watching import STATE, WatchedRun


def record(step, **others):
    return {
        "step": step, "seconds": 0.5, "reward": 0.25, "gac/mu": 0.5, "gac/mu_raw": 0.5, "gac/mu_se": 0.125,
        "gac/sigma_s2": 2.0, "gac/sigma_s2_se": 0.5, "gac/overhead": 0.02, "gac/n_s": 4.0, "gac/n_r": 4.0, **others,
    }  # fmt: skip


def write(folder, steps, **options):
    write_json(folder / CONFIG, {"options": {"steps": 8, "law": "gac", "interval": None, "overhead": None} | options})
    (folder / METRICS).write_text("".join(json.dumps(record(step)) + "\n" for step in steps))
    return folder


def shown(run, width=80, **options):
    rich = pytest.importorskip("rich.console")
    console = rich.Console(file=io.StringIO(), width=width)
    console.print(frame(run, width=width, height=30, now=time.time(), **options))
    return console.file.getvalue()


def steps_of(run):
    return [one["step"] for one in run.records]


def test_new_records_are_read_and_half_a_line_waits(tmp_path):
    run = WatchedRun(write(tmp_path, [1, 2]))
    assert (run.step, run.total, run.finished) == (2, 8, False)
    assert not run.poll()
    line = json.dumps(record(3))
    with (tmp_path / METRICS).open("a") as file:
        file.write(line[:20])
        file.flush()
        run.poll()
        assert steps_of(run) == [1, 2]
        file.write(line[20:] + "\n" + json.dumps(record(4)) + "\n")
    assert run.poll()
    assert steps_of(run) == [1, 2, 3, 4]


def test_a_resumed_run_is_read_anew(tmp_path):
    """gac train --resume drops the steps beyond its checkpoint and may ask for more of them."""
    run = WatchedRun(write(tmp_path, range(1, 9)))
    assert run.finished
    metrics = MetricsFile(tmp_path / METRICS, last_step=4)
    write_json(tmp_path / CONFIG, {"options": {"steps": 20}})
    assert run.poll()
    assert steps_of(run) == [1, 2, 3, 4]
    assert not run.finished
    metrics.append(record(5))
    metrics.close()
    run.poll()
    assert steps_of(run) == [1, 2, 3, 4, 5]


def test_a_line_that_a_kill_cut_is_passed_over(tmp_path):
    write(tmp_path, [1])
    with (tmp_path / METRICS).open("a") as file:
        file.write('{"step": 2, "re\n' + json.dumps(record(2)) + "\n")
    assert steps_of(WatchedRun(tmp_path)) == [1, 2]
    with (tmp_path / METRICS).open("a") as file:
        file.write("[3]\n")
    with pytest.raises(DamagedFile, match=r"\[3\] is no step"):
        WatchedRun(tmp_path)


def test_checkpoints_of_a_trainer(tmp_path):
    """The newest by its number, not by its name; entries without a loss are summaries."""
    for step in (9, 10):
        logged = [record(k, loss=0.1) for k in range(1, step + 1)] + [{"step": step, "train_runtime": 1.0}]
        write_json(tmp_path / f"checkpoint-{step}" / STATE, {"log_history": logged, "max_steps": 10})
    run = WatchedRun(tmp_path)
    assert steps_of(run) == list(range(1, 11))
    assert run.finished
    assert run.budget is None
    assert "step 10 of 10" in shown(run)
    write_json(tmp_path / "checkpoint-11" / STATE, [])
    with pytest.raises(DamagedFile, match="no state of a trainer"):
        run.poll()


def test_folders_that_are_no_run_say_what_to_name(tmp_path):
    with pytest.raises(UsageError, match="does not exist"):
        WatchedRun(tmp_path / "absent")
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is a file"):
        WatchedRun(tmp_path / "file")
    with pytest.raises(UsageError, match="no run directory"):
        WatchedRun(tmp_path)
    for inside in ("runs/gac/seed0", "some"):  # of gac compare; of a folder of runs
        (tmp_path / inside).mkdir(parents=True)
        write(tmp_path / inside, [1])
        with pytest.raises(UsageError, match=f"such as {tmp_path / inside}"):
            WatchedRun(tmp_path)


@pytest.mark.parametrize("plain", [False, True])
def test_the_frame_has_every_number(tmp_path, plain):
    text = shown(WatchedRun(write(tmp_path, range(1, 7), task=["gcd[bold]"], seed=3)), plain=plain)
    sign = "+-" if plain else "±"
    for part in ("gcd[bold]  law gac  seed 3", "step 6 of 8   500 ms a step   1 s left", "mu 0.500",
                 f"estimate 0.500 {sign} 0.125", "0.25", "6 of 6 steps measured",
                 "2.00% of the time in GAC, of a budget of 1%", f"2.0{sign}0.2"):  # fmt: skip
        assert part in text, part
    assert text.isascii() is plain
    assert max(map(len, text.splitlines())) <= 80
    assert max(len(line) for line in shown(WatchedRun(tmp_path), width=40).splitlines()) <= 40


def test_what_is_not_known_is_left_out(tmp_path):
    write(tmp_path, [])
    assert "waiting for the first step" in shown(WatchedRun(tmp_path))
    (tmp_path / METRICS).write_text(json.dumps({"step": 1, "gac/mu": None, "gac/skipped": 2, "gac/silent_r": 1.0}))
    assert WatchedRun(tmp_path).records == []  # no end of the line yet
    with (tmp_path / METRICS).open("a") as file:
        file.write("\n")
    text = shown(WatchedRun(tmp_path))
    assert "no mu in these records" in text
    assert "2 steps with non-finite gradients" in text
    assert "the RL gradient of the newest step is zero" in text
    assert "SFT noise" not in text
    assert "of the time in GAC" not in text


def test_a_run_that_stands_still_says_for_how_long(tmp_path):
    write(tmp_path, [1, 2])
    os.utime(tmp_path / METRICS, (time.time() - 75, time.time() - 75))
    assert "no step for 1 min 15 s" in shown(WatchedRun(tmp_path))


def test_columns_are_means_of_equal_parts_of_the_steps():
    assert columns_of([(0, 1.0), (1, 3.0), (2, 5.0), (3, 5.0)], 2, 0, 4) == [2.0, 5.0]
    few = columns_of([(1, 1.0), (2, math.nan), (3, 2.0)], 6, 0, 4)
    assert math.isnan(few[0])
    assert few[1:5] == [1.0, 1.0, 1.0, 2.0]
    assert math.isnan(few[5])  # after the last there is nothing


def test_sparklines():
    assert sparkline([0.0, 0.5, 1.0, math.nan], 0.0, 1.0) == "▁▅█ "
    assert sparkline([3.0, 3.0], 3.0, 3.0) == "▅▅"
    assert sparkline([-9.0, 9.0], 0.0, 1.0, plain=True) == "_#"


def test_the_gauge_stands_at_its_mark():
    assert gauge(1.0, 1.0, 8, plain=True) == "####|..."
    assert gauge(0.25, 1.0, 8, plain=True) == "#...|..."
    assert gauge(99.0, 1.0, 8) == "████│███"
    assert gauge(math.nan, 1.0, 8, plain=True) == "....|..."


def test_a_chart_has_the_line_over_its_band():
    """A line at 0.1 that jumps to 0.9 within a column; a band of 0 to 0.4, then beyond the upper edge."""
    drawn = lambda **options: [
        "".join(cell.text for cell in row)
        for row in band_chart([(0, 0.1), (1, 0.9)], [(0, 0.0, 0.4), (1, 0.6, 2.0)], 4, 5, **options)
    ]
    assert drawn(plain=True) == ["   *", "   *", "   *", ":::*", "*** "]
    assert drawn() == ["   ⢰", "   ⢸", "   ⢸", "░░░⢸", "⠤⠤⠤⠜"]
    shows = [[cell.shows for cell in row] for row in band_chart([(0, 0.9)], [(0, 0.0, 0.4)], 1, 2)]
    assert shows == [["line"], ["band"]]

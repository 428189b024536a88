"""Runs of several laws and seeds, told together."""

import json

import pytest

from gac.runs.comparison import (
    COLUMNS,
    best_constant,
    check_stored,
    collect,
    result_line,
    run_directory,
    warm_start_directory,
)
from gac.runs.config import TrainConfig
from gac.runs.errors import UsageError
from gac.runs.folder import CONFIG, METRICS, SUMMARY, write_json, write_text


def finish(out, law, seed, late):
    """The files of a finished run."""
    folder = run_directory(out, law, seed)
    summary = {"warm_start_accuracy": 0.1, "final_accuracy": late, "last_four_accuracy": late, "mean_mu": 0.25}
    write_json(folder / SUMMARY, {**summary, "gac_share": 0.01})
    records = [{"step": step, "gac/mu": 0.2 + 0.1 * step, "accuracy": late} for step in (1, 2)]
    write_text(folder / METRICS, "".join(json.dumps(record) + "\n" for record in records))
    return folder


def test_places(tmp_path):
    assert run_directory(tmp_path, "gac:half_life=5,cap=0.1", 2) == tmp_path / "runs/gac-half_life=5,cap=0.1/seed2"
    assert warm_start_directory(tmp_path, 2) == tmp_path / "warm_start/seed2"


def test_a_row_for_each_law_and_three_files(tmp_path):
    for law, late in (("gac", (0.4, 0.6)), ("fixed:0.5", (0.3, 0.3))):
        for seed in (0, 1):
            folder = finish(tmp_path, law, seed, late[seed])
    assert result_line(folder) == "accuracy 0.100 -> 0.300"
    rows = collect(tmp_path, TrainConfig(), ["gac", "fixed:0.5"], range(2), ["gac", "compare"])
    assert rows == [
        ["gac", "0.100", "0.500", "0.500", "0.400", "0.600", "-0.200", "0.250", "1.00%"],
        ["fixed:0.5", "0.100", "0.300", "0.300", "0.300", "0.300", "+0.000", "0.250", "1.00%"],
    ]
    data = json.loads((tmp_path / "compare.json").read_text())
    assert data["command"] == ["gac", "compare"]
    assert data["options"] == vars(TrainConfig())
    assert data["seeds"] == [0, 1]
    assert data["best_constant"] == "fixed:0.5"
    assert data["regret"] == {"gac": pytest.approx(-0.2), "fixed:0.5": 0.0}
    assert data["laws"]["gac"][1]["accuracy"] == [[1, 0.6], [2, 0.6]]
    assert data["laws"]["gac"][1]["mu"] == [0.3, 0.4]
    lines = (tmp_path / "compare.md").read_text().splitlines()
    assert lines[0] == "| " + " | ".join(COLUMNS) + " |"
    assert len(lines) == 4
    assert (tmp_path / "compare.png").read_bytes()[:4] == b"\x89PNG"


def test_the_best_constant_is_the_best_in_hindsight(tmp_path):
    late = {"gac": 0.9, "fixed:0.1": 0.4, "fixed:mu=0.5": 0.6, "chord": 0.7}
    assert best_constant(late) == "fixed:mu=0.5"
    assert best_constant({"gac": 0.9, "chord": 0.7}) is None
    for law in ("gac", "chord"):
        finish(tmp_path, law, 0, 0.5)
    rows = collect(tmp_path, TrainConfig(), ["gac", "chord"], [0], ["gac", "compare"])
    assert [row[COLUMNS.index("regret")] for row in rows] == ["-", "-"]
    assert (tmp_path / "compare.png").read_bytes()[:4] == b"\x89PNG"


def test_runs_with_other_options_are_not_mixed_in(tmp_path):
    check_stored(tmp_path, TrainConfig())  # no run there
    write_json(tmp_path / CONFIG, {"options": vars(TrainConfig(threads=1))})
    check_stored(tmp_path, TrainConfig(threads=2))
    with pytest.raises(UsageError, match=r"other options \(--lr, --seed\)"):
        check_stored(tmp_path, TrainConfig(lr=0.5, seed=1))

"""The files of a run directory."""

import json
import math

from gac.runs.folder import (
    CONFIG,
    MetricsFile,
    peak_memory_bytes,
    read_json,
    read_metrics,
    versions,
    write_config,
    write_json,
    write_text,
)


def test_metrics_file_drops_what_a_kill_left_behind(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"ste')
    file = MetricsFile(path, last_step=2)
    file.append({"step": 3, "x": float("nan")})
    file.close()
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3, "x": null}\n'


def test_metrics_are_read_up_to_a_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert read_metrics(path) == []
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert read_metrics(path) == [{"step": 1}, {"step": 2}]
    assert read_metrics(path, last_step=1) == [{"step": 1}]


def test_files_are_written_whole_in_folders_that_are_made(tmp_path):
    path = tmp_path / "a" / "b.json"
    write_json(path, {"x": [1.5, math.nan, math.inf], "y": (1, {"z": -math.inf})})
    assert read_json(path) == {"x": [1.5, None, None], "y": [1, {"z": None}]}
    write_text(path, "{}\n")
    assert path.read_text() == "{}\n"
    assert [other.name for other in path.parent.iterdir()] == ["b.json"]


def test_the_configuration_says_what_a_run_is(tmp_path):
    provenance = write_config(tmp_path / "run", {"steps": 3}, ["gac", "train"], tmp_path / "warm")
    assert provenance == {"options": {"steps": 3}, "command": ["gac", "train"], "versions": versions()}
    stored = json.loads((tmp_path / "run" / CONFIG).read_text())
    assert stored == {**provenance, "warm_start": str(tmp_path / "warm")}
    write_config(tmp_path / "run", {"steps": 3}, ["gac", "train"], None)
    assert read_json(tmp_path / "run" / CONFIG)["warm_start"] is None


def test_versions_name_every_package():
    found = versions()
    assert {"python", "gac-kernels", "torch", "transformers", "trl"} <= set(found)
    assert all(isinstance(version, str) and version for version in found.values())


def test_memory_of_the_process():
    assert peak_memory_bytes("cpu") > 2**20

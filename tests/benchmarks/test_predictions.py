"""Predictions: committed, of figures that the suite leaves, from numbers that are in committed data."""

import json
from math import prod

import pytest

from benchmarks import on_device, predictions
from gac.bench import ending
from gac.plan.shapes import MODELS

H100 = predictions.RESULTS / "h100"


def named(text):
    (found,) = (one for one in predictions.predictions() if one.figure == text)
    return found


def test_what_is_committed_is_what_follows_today(tmp_path):
    predictions.write(tmp_path / "now.json", [one.row() for one in predictions.predictions()])
    assert (tmp_path / "now.json").read_text() == (predictions.RESULTS / "next_prediction.json").read_text()


def test_every_figure_has_a_range_and_a_reason():
    rows = list(predictions.predictions())
    assert len({one.figure for one in rows}) == len(rows)
    assert all(0 < one.low <= one.high and one.how for one in rows)
    asked = {one.reach for one in rows}
    assert {"under 0.5%", "under 1.5%", "under 1%", "90%", "at most 5", "at most 300 us", "at most 80 us"} <= asked


def test_they_start_from_what_was_measured():
    steps = [row for name in ("step", "step_1k") for row in json.loads((H100 / f"{name}.json").read_text())["step"]]
    assert {(row["model"], row["tokens"]): row["arms"]["plain"]["p50"] for row in steps} == predictions.STEPS
    for model, tensors in predictions.TENSORS.items():
        assert len(MODELS[model].shapes()) == tensors
        assert sum(map(prod, MODELS[model].shapes())) == MODELS[model].numel()
    for kind, expected in ending.PREDICTED.items():
        low, high = (named(f"end of a step, {kind}, sketch, 100 tensors, {what}") for what in ("launches", "host"))
        assert low.low == low.high == expected["kernels"]
        assert high.low <= expected["host"] <= high.high


def test_each_finds_its_figure_where_the_suite_leaves_it():
    """In the run before, whose kernels and steps have the same form."""
    found = {
        one.figure: one.found(H100) for one in predictions.predictions() if one.file in ("kernels.json", "step.json")
    }
    assert found["sketch, bf16, 0.1B list, of the read limit"] == pytest.approx(77.086)
    assert found["GAC's kernels in a measured step, 1B"] == 110
    assert found["the same, seconds of the device"] == pytest.approx(0.0042812)
    assert found["whole step, 1B, 8192 tokens a micro-batch, interval 1"] == pytest.approx(0.0027952)
    cases = {f"{case.model} {case.tokens}" for case in on_device.BUDGET}
    assert cases == {one.keys[0] for one in predictions.predictions() if one.file == "budget.json"}
    assert {f"{case.model} {case.tokens}" for case in on_device.COMPILED} == {
        one.keys[0] for one in predictions.predictions() if one.file == "compiled.json"
    }


def test_what_came_out_stands_beside(tmp_path, capsys):
    (tmp_path / "budget.json").write_text(
        '{"0.1B 8192": {"host_share": 0.9, "share": null}, "1B 1024": {"left_out": ""}}'
    )
    (tmp_path / "ending.json").write_text('{"sketch": {"measured": {"kernels": 5, "host"')  # it was cut short
    assert predictions.main([str(tmp_path)]) == 0
    rows = {row["figure"]: row for row in json.loads((tmp_path / "predicted.json").read_text())}
    assert len(rows) == len(list(predictions.predictions()))
    row = rows["host time in GAC, 0.1B, 8192 tokens a micro-batch, eager, interval 1"]
    assert (row["found"], row["within"]) == (0.9, False)
    assert sum(row["found"] is not None for row in rows.values()) == 1
    assert capsys.readouterr().out.startswith("NO  host time in GAC, 0.1B, 8192")

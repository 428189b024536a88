"""``gac plan`` from arguments to output, and the tables of docs/scaling.md."""

import json
from pathlib import Path

import pytest

from gac import plan
from gac.cli import main
from gac.cli import plan as command

SCALING = Path(__file__).parents[3] / "docs" / "scaling.md"


def output(capsys, *arguments):
    assert main(["plan", *arguments]) == 0
    return capsys.readouterr().out


def test_json_holds_what_was_asked_and_what_is_predicted(capsys):
    text = output(capsys, "--params", "70e9", "--ranks", "1024", "--tokens", "8192", "--device", "h100", "--json")
    (found,) = json.loads(text)
    setup = plan.Setup(plan.Parameters.of("70e9"), plan.DEVICES["h100"], ranks=1024, tokens=8192)
    expected = plan.make_plan(setup)
    assert found["plan"] == json.loads(json.dumps(vars(expected)))
    assert found["setup"]["parameters"] == "70e9"
    assert found["setup"]["device"]["bandwidth"] == 3.35e12
    assert found["setup"]["noise"]["rank"] == plan.Noise().rank


def test_every_option_reaches_the_plan(capsys):
    arguments = [
        "--params", "8B", "--trainable", "40e6", "--ranks", "8", "--sharding", "fsdp", "--tokens", "4096",
        "--micro-batches", "2", "--interval", "10", "--dtype", "fp32", "--device", "a100", "--estimator", "sketch",
        "--metric", "optimizer", "--alpha", "0.3", "--half-life", "20", "--noise-rank", "50", "--noise-excess", "0.5",
        "--disagreement", "0.1", "--noise-ratio", "2", "--bandwidth", "1e12", "--flops", "2e14",
        "--link-bandwidth", "3e10", "--momentum", "0.8", "--length", "512", "--sketch-size", "16",
    ]  # fmt: skip
    (found,) = json.loads(output(capsys, *arguments, "--json"))
    asked, device = found["setup"], found["setup"]["device"]
    assert {k: v for k, v in asked.items() if k not in ("device", "noise")} == {
        "parameters": "8B", "trainable": 40_000_000, "ranks": 8, "sharding": "fsdp", "tokens": 4096,
        "micro_batches": 2, "interval": 10, "dtype": "fp32", "estimator": "sketch", "metric": "optimizer",
        "alpha": 0.3, "half_life": 20.0, "momentum": 0.8, "length": 512, "sketch_size": 16,
    }  # fmt: skip
    assert asked["noise"] == {"rank": 50.0, "excess": 0.5, "disagreement": 0.1, "ratio": 2.0}
    assert (device["name"], device["bandwidth"], device["flops"]) == ("a100, changed", 1e12, 2e14)
    assert (device["link"], device["network"]) == (3e10, 3e10)


def test_the_table_names_every_prediction(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    text = output(capsys, "--params", "1.2e9", "--ranks", "64", "--interval", "10")
    for line in (
        "estimator", "bytes read in a backward pass", "bytes read in a step", "kernel launches in a backward pass",
        "host time in a step", "sketch memory", "all-reduced in a step", "time to read", "time to all-reduce",
        "time of the model's step", "overhead, measuring every 10 steps", "contributions of a branch in a step",
        "standard error of mu, averaged", "note: the parameter list is that of the published model nearest in size",
    ):  # fmt: skip
        assert line in text


def test_the_documented_tables_are_the_commands(capsys):
    """docs/scaling.md shows commands with what they print: run again, they print the same."""
    text = SCALING.read_text()
    commands = [line.strip() for line in text.splitlines() if line.startswith("    gac plan") and "--markdown" in line]
    assert len(commands) >= 3
    for line in commands:
        assert output(capsys, *line.split()[2:]).strip() in text, line


def test_choices_are_those_of_the_plan():
    assert tuple(plan.DEVICES) == command._DEVICES
    assert plan.SHARDINGS == command._SHARDINGS
    assert plan.ESTIMATORS == command._ESTIMATORS
    assert plan.METRICS == command._METRICS
    assert tuple(plan.DTYPES) == command._DTYPES


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: --params"),
        (["--params", "many"], "params must be a number (70e9), one of 10M"),
        (["--params", "-3"], "params must be at least 1 and at most 1e15, got -3"),
        (["--params", "0"], "params must be at least 1"),
        (["--params", "1B", "--ranks", "0"], "'0' is no whole number from 1"),
        (["--params", "1B", "--ranks", "1.5"], "'1.5' is no whole number from 1"),
        (["--params", "1B", "--device", "tpu"], "invalid choice: 'tpu'"),
        (["--params", "1B", "--bandwidth", "0"], "'0' is no number above 0"),
        (["--params", "1B", "--trainable", "9e9"], "trainable must be from 1 to"),
        (["--params", "1B", "--alpha", "2"], "alpha must be in [0, 1], got 2.0"),
        (["--params", "1B", "--json", "--markdown"], "not allowed with"),
    ],
)
def test_mistakes_exit_with_2_and_one_line(arguments, message, capsys):
    assert main(["plan", *arguments]) == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0 B"), (999, "999 B"), (999.6, "1 kB"), (1.234e9, "1.23 GB"), (5e15, "5e+03 TB")]
)
def test_bytes_in_words(value, text):
    assert command._bytes(value) == text

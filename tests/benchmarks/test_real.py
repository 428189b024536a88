"""The recipe of a pretrained model: options of gac train, rows that exist are kept, the table is right."""

import json

import pytest

from benchmarks import real
from gac.cli import build_parser
from gac.cli._options import config_from
from gac.runs.comparison import run_directory
from gac.runs.config import check


def row(arm, seed, accuracy):
    kept = {
        "warm_start_accuracy": 0.25,
        "final_accuracy": accuracy[-1][1],
        "last_four_accuracy": 0.3,
        "mean_mu": 0.5,
        "gac_share": 0.001,
    }
    return {"arm": arm, "seed": seed, **kept, "accuracy": accuracy, "mu": [0.5, 0.5]}


@pytest.mark.parametrize("recipe", real.RECIPES)
def test_recipes_are_options_of_gac_train(recipe, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    for arm in real.ARMS:
        law = real.law_of(arm, int(real.RECIPES[recipe]["--steps"]))
        words = [*real.options(recipe, real.MODEL), "--law", law]
        config = config_from(build_parser("train").parse_args(["train", *words])).with_model_defaults()
        check(config)
        assert config.gradient_checkpointing is False
        assert config.steps % config.eval_every == 0
    assert real.law_of("SFT then RL", 40) == "sequential:split=20"


def test_missing_rows_alone_are_made_and_written_one_by_one(tmp_path, monkeypatch, capsys):
    made = []

    def make_row(arm, seed, *_):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append((arm, seed))
        return row(arm, seed, [[1, 0.25], [2, 0.5 + 0.25 * seed]])

    monkeypatch.setattr(real, "make_row", make_row)
    command = ["rows", "--results", str(tmp_path), "--out", str(tmp_path / "runs")]
    assert real.main([*command, "--arms", "gac", "--seeds", "0"]) == 0
    with pytest.raises(KeyboardInterrupt):
        real.main([*command, "--arms", "gac", "RL alone", "--seeds", "0", "1"])
    assert made == [("gac", 0), ("RL alone", 0)]
    made.clear()
    assert real.main([*command, "--arms", "gac", "RL alone", "--seeds", "0", "1"]) == 0
    assert made == [("gac", 1), ("RL alone", 1)]
    assert len(json.loads((tmp_path / "cpu.json").read_text())["rows"]) == 4
    assert (tmp_path / "cpu.png").read_bytes()[1:4] == b"PNG"
    lines = (tmp_path / "cpu.md").read_text().splitlines()
    cells = [cell.strip() for cell in lines[2].strip("|").split("|")]
    assert cells == ["gac", "0, 1", "0.250", "0.625", "0.438", "0.375", "0.500", "0.500", "0.10%"]


def test_a_run_that_is_there_is_gone_on_with(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(real.subprocess, "run", lambda words, **_: asked.append(words))
    monkeypatch.setattr(real, "row_of", lambda arm, seed, out: out)
    run = run_directory(tmp_path, "fixed:0.5", 3)
    assert real.make_row("constant .5", 3, "cpu", "m", tmp_path, ["--threads", "1"]) == run
    (run / "config.json").parent.mkdir(parents=True)
    (run / "config.json").touch()
    real.make_row("constant .5", 3, "cpu", "m", tmp_path, [])
    (run / "summary.json").touch()
    real.make_row("constant .5", 3, "cpu", "m", tmp_path, [])
    assert len(asked) == 2
    assert asked[0][-2:] == ["--threads", "1"]
    assert asked[0][asked[0].index("--seed") + 1] == "3"
    assert asked[1][-1] == "--resume"


def test_a_report_needs_rows(tmp_path, capsys):
    assert real.main(["report", "--results", str(tmp_path)]) == 1
    assert "make rows first" in capsys.readouterr().err

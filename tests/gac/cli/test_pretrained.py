"""``gac train --model``: a pretrained model with its chat format, all weights and adapters, from a folder and GGUF."""

import json
import shutil

import pytest
import torch
from peft import load_peft_weights

from gac.cli import main
from gac.cli.compare import _options
from gac.runs import training
from gac.runs.config import TrainConfig
from gac.runs.folder import read_metrics
from gac.tasks import warm_start
from tests.gac.cli.test_cli import TINY, metrics_of
from tests.gac.tasks.tiny import save_chat_model, split, write_gguf

SMALL = ("--hidden-size", "--layers")
CHAT = [word for at, word in enumerate(TINY) if word not in SMALL and TINY[at - 1] not in SMALL]
CHAT += ["--lr", "1e-3", "--save-every", "1", "--max-completion-length", "6"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_chat_model(tmp_path_factory.mktemp("chat"))


def test_adapters_are_trained_saved_and_gone_on_with(folder, tmp_path):
    out = tmp_path / "run"
    options = [*CHAT, "--model", str(folder), "--lora", "2", "--steps", "2"]
    assert main(["train", *options, "--out", str(out)]) == 0
    summary = json.loads((out / "summary.json").read_text())
    assert 0 < summary["trained_parameters"] < summary["parameters"]
    assert summary["estimator"] == "exact"
    first, last = (load_peft_weights(str(out / name), device="cpu") for name in ("warm_start", "model"))
    assert all(name.endswith((".lora_A.weight", ".lora_B.weight")) for name in last)
    assert all(not torch.equal(first[name], last[name]) for name in last)
    records = read_metrics(out / "metrics.jsonl")
    assert all(record["gac/mu"] >= 0 and record["completions/max_length"] <= 6 for record in records)

    shutil.copytree(out, tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "checkpoint-2")
    (tmp_path / "cut" / "summary.json").unlink()
    assert main(["train", "--out", str(tmp_path / "cut"), "--resume"]) == 0
    assert metrics_of(tmp_path / "cut") == metrics_of(out)
    again = load_peft_weights(str(tmp_path / "cut" / "model"), device="cpu")
    assert all(torch.equal(again[name], last[name]) for name in last)

    (tmp_path / "cut" / "summary.json").unlink()  # killed after the last checkpoint
    assert main(["train", "--out", str(tmp_path / "cut"), "--resume"]) == 0
    again = load_peft_weights(str(tmp_path / "cut" / "model"), device="cpu")
    assert all(torch.equal(again[name], last[name]) for name in last)


def test_all_weights_of_a_gguf_file_in_parts(tmp_path):
    write_gguf(tmp_path / "tiny.gguf")
    split(tmp_path / "tiny.gguf", 2)
    out = tmp_path / "run"
    options = [*CHAT, "--model", str(tmp_path / "tiny.gguf.part*"), "--model-cache", str(tmp_path / "cache")]
    assert main(["train", *options, "--no-gradient-checkpointing", "--steps", "1", "--out", str(out)]) == 0
    summary = json.loads((out / "summary.json").read_text())
    assert summary["trained_parameters"] == summary["parameters"]
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] != []
    template = (out / "model" / "chat_template.jinja").read_text()
    assert template == next((tmp_path / "cache").iterdir()).joinpath("chat_template.jinja").read_text()


def test_what_the_model_is_asked_and_shown(folder):
    config = TrainConfig(model=str(folder), task=["chain_sum:terms=2,digits=1"], heldout=4, demonstrations=4, prompts=8)
    setup = training.prepare(config.with_model_defaults())
    (message,) = setup.prompts[0]["prompt"]
    assert message["role"] == "user"
    assert "arithmetic problem" in message["content"]
    assert (
        setup.demonstrations[0]["completion"][0]["content"] == f"<answer>{setup.demonstrations[0]['answer']}</answer>"
    )
    assert setup.max_completion_length >= len("<answer>12</answer>") + 16
    config.chat_template = "none"
    assert isinstance(training.prepare(config.with_model_defaults()).prompts[0]["prompt"], str)


def test_gradient_checkpointing_changes_no_number(folder, tmp_path, monkeypatch):
    found, on, real = [], [], warm_start.warm_start
    spy = lambda model, *args, **options: on.append(model.is_gradient_checkpointing) or real(model, *args, **options)
    monkeypatch.setattr(warm_start, "warm_start", spy)
    for flag in ("--gradient-checkpointing", "--no-gradient-checkpointing"):
        out = tmp_path / flag
        options = [*CHAT, "--model", str(folder), "--lora", "--warm-start-only"]
        assert main(["train", *options, flag, "--out", str(out)]) == 0
        config = json.loads((out / "config.json").read_text())["options"]
        assert (config["gradient_checkpointing"], config["lora"]) == (flag.startswith("--grad"), 16)
        found.append(load_peft_weights(str(out / "warm_start"), device="cpu"))
    assert on == [True, False]
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


def test_compare_hands_every_option_on():
    config = TrainConfig(model="m", lora=4, gradient_checkpointing=False, chat_template="none").with_model_defaults()
    words = [str(word) for word in _options(config, "gac", 0)]
    assert "--no-gradient-checkpointing" in words
    assert words[words.index("--lora") + 1] == "4"
    assert "--hidden-size" not in words
    from gac.cli import build_parser
    from gac.cli._options import config_from

    args = build_parser("train").parse_args(["train", *words])
    assert vars(config_from(args)) == vars(config) | {"threads": None}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "./absent"], "--model ./absent: there is no such file or folder"),
        (["--model", ""], "--model is empty"),
        (["--model", "x", "--hidden-size", "96"], "--hidden-size 96 with --model: it is the small model's alone"),
        (["--model", "x", "--layers", "3"], "--layers 3 with --model"),
        (["--lora"], "--lora 16 with no --model: it is a pretrained model's; leave it out, or give --model"),
        (["--lora", "0"], "'0' is not a whole number from 1 on"),
        (["--chat-template", "none"], "--chat-template none with no --model"),
        (["--model-cache", "x"], "--model-cache x with no --model"),
        (["--model", "x", "--chat-template", "absent"], "--chat-template absent: there is no such file"),
        (["--model", "package:gac_no_such"], "no package 'gac_no_such' is installed"),
    ],
)
def test_mistakes_name_the_option(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["train", *arguments]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert message in error[-1]
    assert list(tmp_path.iterdir()) == []


def test_adapters_need_peft(capsys, monkeypatch, folder, tmp_path):
    from gac.tasks import adapters

    monkeypatch.setattr(adapters, "find_spec", lambda _: None)
    assert main(["train", "--model", str(folder), "--lora", "--out", str(tmp_path / "run")]) == 2
    assert "--lora 16 needs the package peft: pip install 'peft" in capsys.readouterr().err
    (tmp_path / "adapter_config.json").touch()
    assert main(["train", "--model", str(tmp_path), "--out", str(tmp_path / "run")]) == 2
    assert "(LoRA adapters) needs the package peft" in capsys.readouterr().err


def test_runs_of_before_with_a_model_can_be_gone_on_with():
    stored = vars(TrainConfig(model="x")) | {"hidden_size": 96, "layers": 3}
    for name in ("lora", "chat_template", "gradient_checkpointing", "model_cache"):
        del stored[name]
    config = TrainConfig.from_stored(stored)
    assert (config.hidden_size, config.layers) == (None, None)
    assert TrainConfig.from_stored(vars(TrainConfig(hidden_size=8))).hidden_size == 8

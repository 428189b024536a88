import json
import os
import signal
import subprocess
import sys
import time
from importlib import metadata

import pytest

import gac
from gac.cli import build_parser, command_names, main
from gac.cli.compare import split_laws
from gac.cli.train import show
from gac.runs.comparison import run_directory, warm_start_directory
from gac.runs.console import Reporter
from gac.runs.folder import SUMMARY, TIMING_KEYS, read_json, read_metrics

TINY = [
    "--task", "chain_sum:terms=2,digits=1", "--heldout", "20", "--demonstrations", "20", "--prompts", "40",
    "--hidden-size", "16", "--layers", "1", "--warm-start-steps", "4", "--micro-batches", "2", "--batch-size", "4",
    "--sft-batch-size", "4", "--generations", "4", "--threads", "1", "--device", "cpu", "--eval-every", "3",
]  # fmt: skip


def metrics_of(folder):
    records = read_metrics(folder / "metrics.jsonl")
    return [{k: v for k, v in record.items() if k not in TIMING_KEYS} for record in records]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """An uninterrupted run of nine steps."""
    out = tmp_path_factory.mktemp("run") / "whole"
    assert main(["train", *TINY, "--steps", "9", "--save-every", "2", "--out", str(out)]) == 0
    return out


@pytest.mark.parametrize(("budget", "told"), [(..., " of a budget of 1%"), (0.005, " of a budget of 0.5%"), (None, "")])
def test_the_table_shows_the_share_beside_the_budget(finished, budget, told, capsys):
    summary = read_json(finished / SUMMARY)  # of a run with the default budget
    if budget is not ...:
        summary["gac_budget"] = budget
    summary["gac_share"] = 0.01234
    show(Reporter(), summary, finished)
    (row,) = (line for line in capsys.readouterr().out.splitlines() if "share of it spent in GAC" in line)
    assert row.strip(" │|").endswith(f" 1.23%{told}")


def test_help_lists_commands_and_examples(capsys):
    assert main([]) == 0
    text = capsys.readouterr().out
    assert {"train", "compare", "env"} <= set(command_names())
    assert all(name in text for name in command_names())
    for name in ("train", "compare", "env"):
        assert main([name, "--help"]) == 0
        text = capsys.readouterr().out
        assert f"usage: gac {name}" in text
    assert build_parser("train").parse_args(["train", "--steps", "3"]).steps == 3


def test_help_is_quick_to_load():
    code = (
        "import sys; from gac.cli import main; main(['train', '--help']);"
        "assert not {'transformers', 'trl', 'matplotlib', 'reasoning_gym', 'rich'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--law", "nonsense"], f"unknown law 'nonsense'; known: {', '.join(gac.laws.available())}"),
        (["train", "--task", "nonsense"], "unknown task 'nonsense'; known tasks: "),
        (["train", "--task", "chain_sum:nonsense=1"], "no parameter 'nonsense'"),
        (["train", "--estimator", "nonsense"], "unknown estimator 'nonsense'; known: auto, sketch, exact"),
        (["train", "--mu", "1.5"], "mu must be in [0, 1], got 1.5"),
        (["train", "--mu", "0.5", "--law", "chord"], "cannot be combined"),
        (["train", "--law", "gac:nonsense=1"], "no option nonsense"),
        (["train", "--prior", "1,2"], "warmup,decay,peak,valley"),
        (["train", "--law", "kl-ctrl"], "--law kl-ctrl follows the KL divergence from the starting model, which"),
        (["train", "--law", "gac:alpha=kl", "--beta", "0"], "--beta 1e-6 measures it"),
        (["train", "--beta", "-1"], "'-1' is not a number from 0 on"),
        (["compare", "--laws", "gac,kl-ctrl"], "--law kl-ctrl follows"),
        (["train", "--generations", "7"], "not a multiple of --generations 7"),
        (["train", "--resume"], "--resume needs --out"),
        (["train", "--resume", "--out", "absent"], "nothing to resume"),
        (["train", "--steps", "0"], "not a whole number from 1 on"),
        (["compare", "--laws", "gac,nonsense"], "unknown law 'nonsense'"),
        (["compare", "--laws", "gac,gac"], "more than once"),
        (["nonsense"], "invalid choice"),
    ],
)
def test_mistakes_exit_with_2_and_one_line(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert message in error[-1]
    assert list(tmp_path.iterdir()) == []


def test_laws_are_split_at_commas_between_them():
    assert split_laws("gac:cap=0.1,half_life=5,fixed:0.1 chord") == ["gac:cap=0.1,half_life=5", "fixed:0.1", "chord"]


def test_a_run_leaves_everything_behind(finished, capsys):
    names = {path.name for path in finished.iterdir()}
    assert {"config.json", "metrics.jsonl", "summary.json", "run.png", "checkpoints", "model", "warm_start"} <= names
    assert list((finished / "tensorboard").glob("events.*"))
    config = json.loads((finished / "config.json").read_text())
    assert config["options"]["steps"] == 9
    assert config["versions"]["torch"]
    summary = json.loads((finished / "summary.json").read_text())
    assert 0 <= summary["gac_share"] < 1
    assert summary["peak_memory_bytes"] > 2**20
    records = read_metrics(finished / "metrics.jsonl")
    assert [record["step"] for record in records] == list(range(1, 10))
    assert [record["step"] for record in records if "accuracy" in record] == [3, 6, 9]
    assert all(key in records[-1] for key in ("reward", "gac/mu", "gac/sigma_s2", "gac/sft_loss", "seconds"))
    assert (finished / "run.png").read_bytes()[:4] == b"\x89PNG"

    assert main(["train", *TINY, "--out", str(finished)]) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert main(["train", "--out", str(finished), "--resume"]) == 0
    assert "is finished" in capsys.readouterr().out
    assert main(["train", "--out", str(finished), "--resume", "--lr", "0.5"]) == 2
    assert "--lr differ" in capsys.readouterr().err


@pytest.mark.parametrize("law", ["kl-ctrl:target=1e-9", "gac:alpha=kl"])
def test_laws_that_follow_kl_run_with_a_coefficient(tmp_path, law):
    out = tmp_path / "kl"
    options = ["--law", law, "--beta", "1e-6", "--lr", "0.01", "--steps", "4", "--sft-weights", "reward"]
    assert main(["train", *TINY, *options, "--out", str(out)]) == 0
    records = read_metrics(out / "metrics.jsonl")
    assert records[-1]["kl"] > 0
    assert all(record["gac/sft_reward"] == 1 for record in records), "demonstrations are right"
    assert all(0 < record["gac/sft_weight"] <= 1 for record in records)
    if law.startswith("kl-ctrl"):  # above its target from the first step that drifts
        assert records[-1]["gac/mu"] > records[0]["gac/mu"]


def test_the_trained_model_can_be_trained_again(finished, tmp_path):
    options = [o if o != "4" or TINY[i - 1] != "--warm-start-steps" else "0" for i, o in enumerate(TINY)]
    at = options.index("--hidden-size")
    del options[at : at + 4]  # with --layers: the model has its own
    out = tmp_path / "again"
    assert main(["train", *options, "--model", str(finished / "model"), "--steps", "1", "--out", str(out)]) == 0
    first = json.loads((finished / "summary.json").read_text())
    assert json.loads((out / "summary.json").read_text())["warm_start_accuracy"] == first["final_accuracy"]


@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
@pytest.mark.parametrize("killed_at", [5])
def test_resume_after_a_kill_equals_the_uninterrupted_run(finished, tmp_path, killed_at):
    out = tmp_path / "killed"
    command = [sys.executable, "-m", "gac.cli", "train", *TINY, "--steps", "9", "--save-every", "2", "--out", str(out)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 200
    while len(read_metrics(out / "metrics.jsonl")) < killed_at:
        assert process.poll() is None, process.stderr.read().decode()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stderr.close()
    assert not (out / "summary.json").exists()
    assert main(["train", "--out", str(out), "--resume"]) == 0
    assert metrics_of(out) == metrics_of(finished)
    shared = ("final_accuracy", "final_mu", "warm_start_accuracy", "mean_mu", "final_reward")
    left, right = (json.loads((folder / "summary.json").read_text()) for folder in (out, finished))
    assert {key: left[key] for key in shared} == {key: right[key] for key in shared}


def test_resume_from_every_kind_of_interruption(finished, tmp_path):
    """Half-written files as a kill would leave them: a torn checkpoint, a torn line, a torn warm start, no summary."""
    import shutil

    for name, damage in {
        "checkpoint": lambda out: (out / "checkpoints" / "checkpoint-9" / "gac_state.pt").unlink(),
        "summary": lambda out: None,
        "everything": lambda out: (shutil.rmtree(out / "checkpoints"), shutil.rmtree(out / "warm_start")),
    }.items():
        out = tmp_path / name
        shutil.copytree(finished, out)
        (out / "summary.json").unlink()
        with (out / "metrics.jsonl").open("a") as file:
            file.write('{"step": 10, "re')
        damage(out)
        assert main(["train", "--out", str(out), "--resume"]) == 0
        assert metrics_of(out) == metrics_of(finished), name


def test_compare_fills_in_what_is_missing_and_draws_all(tmp_path, capsys):
    out = tmp_path / "compare"
    command = ["compare", "--laws", "gac,fixed:0.5", "--seeds", "1", "--jobs", "2", "--out", str(out)]
    options = [o for i, o in enumerate(TINY) if o != "--threads" and TINY[i - 1] != "--threads"] + ["--steps", "3"]
    here = ["--out", str(run_directory(out, "gac", 0)), "--warm-start", str(warm_start_directory(out, 0))]
    assert main(["train", *options, *here, "--threads", "1"]) == 0
    made = run_directory(out, "gac", 0) / "summary.json"
    time_made = made.stat().st_mtime_ns

    assert main([*command, *options]) == 0
    assert "accuracy, mean over seeds" in capsys.readouterr().out
    result = json.loads((out / "compare.json").read_text())
    assert list(result["laws"]) == ["gac", "fixed:0.5"]
    runs = [runs[0]["summary"] for runs in result["laws"].values()]
    assert runs[0]["warm_start_accuracy"] == runs[1]["warm_start_accuracy"]
    assert result["laws"]["fixed:0.5"][0]["mu"] == [0.5] * 3
    assert (out / "compare.md").read_text().count("\n") == 4
    assert (out / "compare.png").read_bytes()[:4] == b"\x89PNG"
    assert made.stat().st_mtime_ns == time_made  # finished runs are kept

    assert main([*command, *options, "--lr", "0.5"]) == 2
    assert "other options (--lr" in capsys.readouterr().err


def test_env_prints_versions_and_devices(capsys):
    assert main(["env"]) == 0
    text = capsys.readouterr().out
    assert all(word in text for word in ("torch", "gac_kernels", "instruction set", "GPU"))
    assert main(["env", "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)) >= {"versions", "processor", "devices", "gac_kernels"}


@pytest.mark.parametrize("installed", [True, False])
def test_env_gives_the_version_of_the_code(installed, monkeypatch, capsys):
    """A checkout may not be installed, or beside a wheel of another version: gac --version and gac env agree."""

    def version(name):
        if installed:
            return "0.0.1"
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", version)
    assert main(["env", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["versions"]
    assert found["gac-kernels"] == gac.__version__
    assert found["torch"] == ("0.0.1" if installed else "not installed")
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.split() == ["gac", gac.__version__]

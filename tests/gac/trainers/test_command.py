"""``gac train`` with rules and with the coefficient estimator."""

import json

import pytest

from gac.cli import main
from gac.runs.folder import read_metrics

TINY = [
    "--task", "chain_sum:terms=2,digits=1", "--heldout", "8", "--demonstrations", "10", "--prompts", "40",
    "--hidden-size", "16", "--layers", "1", "--warm-start-steps", "2", "--micro-batches", "2", "--batch-size", "8",
    "--sft-batch-size", "4", "--generations", "4", "--threads", "1", "--device", "cpu", "--eval-every", "3",
]  # fmt: skip


def train(out, *options, steps=3):
    assert main(["train", *TINY, *options, "--steps", str(steps), "--out", str(out)]) == 0
    return read_metrics(out / "metrics.jsonl")


def test_every_prompt_has_its_answer_as_a_demonstration(tmp_path):
    """The untrained model solves next to nothing, so that nearly all prompts are gated, or queued."""
    records = train(tmp_path / "hpt", "--law", "hpt:gate=1")
    assert all(record["gac/demonstrated"] > 0.5 for record in records)
    assert all(record["gac/sft_loss"] > 1 for record in records)
    records = train(tmp_path / "relift", "--law", "relift:queue=3")
    assert [record["gac/mu"] for record in records] == [1, 0, 1]
    assert json.loads((tmp_path / "relift" / "summary.json").read_text())["steps"] == 3


def test_the_coefficient_estimator(tmp_path):
    records = train(tmp_path / "run", "--estimator", "coefficient", steps=2)
    assert {record["estimator"] for record in records} == {"coefficient"}
    assert all(record["gac/sigma_s2"] > 0 for record in records)


def test_the_sequence_estimator(tmp_path):
    records = train(tmp_path / "run", "--estimator", "sequence", "--interval", "1", steps=2)
    assert {record["estimator"] for record in records} == {"sequence"}
    assert all(record["gac/sigma_s2"] > 0 for record in records)


@pytest.mark.parametrize(
    ("law", "message"), [("hpt:gate=4", "gate=4 with num_generations=4"), ("relift:queue=0", "queue must be")]
)
def test_options_that_a_rule_cannot_have(law, message, tmp_path, capsys):
    assert main(["train", *TINY, "--law", law, "--out", str(tmp_path / "run")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()

"""Numbers of the mix in the trainer's own history and in TensorBoard."""

import itertools
import math

import pytest

from gac.report import Report

NAMES = ("mu", "mu_raw", "mu_se", "sigma_s2", "sigma_r2", "delta_g2", "distance2", "cosine", "sft_loss", "skipped")
ERRORS = ("sigma_s2_se", "sigma_r2_se", "distance2_se", "delta_g2_se")


@pytest.fixture
def run(trainer, tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    run = trainer(law="gac", max_steps=4, report_to=["tensorboard"])
    run.train()
    return run


def test_history_has_the_mixers_numbers_with_standard_errors(run):
    first, *_, last = (entry for entry in run.state.log_history if "gac/mu" in entry)
    assert not {f"gac/{name}" for name in ERRORS} & set(first), "one step has no standard errors: absent, not NaN"
    found = run.mixer.metrics()
    for name in {*NAMES, *ERRORS} - {"sft_loss"}:
        assert math.isfinite(found[name]), name
        assert last[f"gac/{name}"] == pytest.approx(found[name]), name
    assert last["gac/step"] == 3


@pytest.mark.parametrize("constant", [True, False])
def test_reports_know_the_groups_that_say_nothing(trainer, constant, tmp_path):
    """Of each step the share that was logged for it, in the mixer's report and in the history on the disk."""
    rewards = itertools.cycle([1.0] if constant else [0.0, 1.0])
    run = trainer(
        reward=lambda completions, **_: [next(rewards) for _ in completions],
        max_steps=3,
        gac_report_interval=1,
        logging_steps=1,
    )
    run.train()
    logged = [e["gac/informative_groups"] for e in run.state.log_history if "gac/informative_groups" in e]
    assert logged == [0.0 if constant else 1.0] * 3
    for report in (run.mixer.report(), Report.from_run(run.args.output_dir)):
        assert [step.informative_groups for step in report.history] == logged
        assert any("groups of rollouts say nothing" in s for s in report.reading()) == constant


def test_tensorboard_has_what_the_history_has(run, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(tmp_path / "board")).Reload()
    tags = set(board.Tags()["scalars"])
    for name in (*NAMES, *ERRORS):
        # transformers puts what is not of an evaluation under train/
        events = {event.step: event.value for event in board.Scalars(f"train/gac/{name}")}
        history = {e["step"]: e[f"gac/{name}"] for e in run.state.log_history if f"gac/{name}" in e}
        assert events == pytest.approx(history), name
    assert "train/gac/prior" not in tags

"""Numbers of the mix in the trainer's own history and in TensorBoard."""

import math

import pytest

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

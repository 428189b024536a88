"""Numbers of the mix in the trainer's own history and in what it reports to."""

import importlib.machinery
import itertools
import math
import sys
import types

import pytest
from datasets import Dataset

from gac.report import Report
from tests.gac.trainers.conftest import PROMPTS, first_digit_reward, with_demonstrations

NAMES = ("mu", "mu_raw", "mu_se", "sigma_s2", "sigma_r2", "delta_g2", "distance2", "cosine", "sft_loss", "skipped")
ERRORS = ("sigma_s2_se", "sigma_r2_se", "distance2_se", "delta_g2_se")


class Config(dict):
    """Of a run, as Weights & Biases and trackio have it."""

    def update(self, values, allow_val_change=False):
        super().update(values)


def module(monkeypatch, name, **contents):
    """A package of which transformers needs no more than `contents`."""
    made = types.ModuleType(name)
    made.__spec__ = importlib.machinery.ModuleSpec(name, None)
    made.__dict__.update(contents)
    monkeypatch.setitem(sys.modules, name, made)
    return made


@pytest.fixture
def reported(monkeypatch):
    """What two back ends that are not installed get, in their packages' place."""
    got = {"wandb": [], "trackio": []}
    keep = lambda name: lambda values, step=None: got[name].append(values)
    of_run = types.SimpleNamespace(_label=lambda **_: None, summary={}, id="1", name="run")
    wandb = module(
        monkeypatch, "wandb", run=of_run, config=Config(), log=keep("wandb"), termwarn=lambda *_, **__: None,
        define_metric=lambda *_, **__: None,
    )  # fmt: skip
    module(monkeypatch, "wandb.sdk")
    module(monkeypatch, "wandb.sdk.lib")
    module(monkeypatch, "wandb.sdk.lib.config_util", ConfigError=KeyError)
    here = types.SimpleNamespace(get=lambda: None)
    places = types.SimpleNamespace(current_space_id=here, current_project=here)
    trackio = module(
        monkeypatch, "trackio", config=Config(), log=keep("trackio"), init=lambda **_: None, finish=lambda: None,
        context_vars=places, __version__="0.43.0",
    )  # fmt: skip
    for made in (wandb, trackio):  # TRL imports them once, and reports what its parts take
        monkeypatch.setattr(f"trl.extras.profiling.{made.__name__}", made, raising=False)
    return got


@pytest.fixture
def run(trainer, tmp_path, monkeypatch, reported):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    run = trainer(law="gac", max_steps=4, report_to=["tensorboard", "wandb", "trackio"])
    run.train()
    return run


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_every_back_end_gets_what_the_history_has(run, reported, name):
    steps = [entry for entry in run.state.log_history if "gac/mu" in entry]
    assert len(steps) == 4
    given = [entry for entry in reported[name] if "train/gac/mu" in entry]
    for entry, sent in zip(steps, given, strict=True):
        own = {key: value for key, value in entry.items() if key.startswith("gac/")}
        assert {key.removeprefix("train/"): value for key, value in sent.items() if "/gac/" in key} == own
    assert {f"gac/{each}" for each in (*NAMES, *ERRORS)} <= set(own)


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


def test_a_step_of_supervision_after_an_evaluation_trains_and_is_logged(trainer, monkeypatch):
    """Evaluation leaves the model without dropout, and nothing else would bring it back before such a step."""
    run = trainer(
        law="relift", law_options={"queue": 2}, reward=first_digit_reward, prompts=with_demonstrations(),
        sft_dataset=None, max_steps=4, eval_dataset=Dataset.from_list(PROMPTS[:2]), eval_strategy="steps", eval_steps=1,
        per_device_eval_batch_size=4,
    )  # fmt: skip
    supervise, modes = type(run)._supervise, []
    monkeypatch.setattr(
        type(run), "_supervise", lambda self, *a: modes.append(self.model.training) or supervise(self, *a)
    )
    run.train()
    assert modes
    assert all(modes)
    steps = [entry for entry in run.state.log_history if "loss" in entry]
    assert len(steps) == 4
    assert all("gac/mu" in entry for entry in steps)
    assert sum("eval_loss" in entry for entry in run.state.log_history) == 4

"""Damaged, foreign and malicious checkpoints are refused before anything changes; without room, none is lost."""

import errno
import fnmatch
import os
import shutil
import types

import pytest
import torch

import gac.trainers.checkpoints as checkpoints
from gac.files import DamagedFile
from gac.trainers.hybrid_grpo import complete_checkpoints
from tests.gac.test_files import Malicious
from tests.gac.trainers.conftest import first_digit_reward, tiny_model, with_demonstrations

SAVING = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "steps_per_generation": 4}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folder of a run that lies within a generation, so that rollouts are saved, and what continues it."""
    return tmp_path_factory.mktemp("saved")


@pytest.fixture
def checkpoint(saved, trainer, tmp_path):
    """A copy of a checkpoint after one step."""
    if not list(saved.iterdir()):
        trainer(output_dir=str(saved), **SAVING).train()
    return shutil.copytree(complete_checkpoints(str(saved))[0], tmp_path / "checkpoint-1")


def refuses(run, checkpoint, *words, error=DamagedFile, resume=None):
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    with pytest.raises(error) as raised:
        run.train(resume_from_checkpoint=resume or str(checkpoint))
    for word in (str(checkpoint), *words):
        assert word in str(raised.value)
    assert all(torch.equal(value, before[name]) for name, value in run.model.state_dict().items())
    assert run.state.global_step == 0
    assert run.mixer is None, "the state was read after the model was patched"


def change(path, *place, value):
    """Puts something else into a saved state; ``...`` takes it out."""
    state = torch.load(path, weights_only=True)
    part = state
    for key in place[:-1]:
        part = part[key]
    if value is ...:
        del part[place[-1]]
    else:
        part[place[-1]] = value
    torch.save(state, path)


MU = ("mixer", "controller", "state", "mu")


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        (MU, torch.tensor(7.0, dtype=torch.float64), '["controller"]["state"]["mu"] must be a number in [0, 1], got 7'),
        (MU, torch.tensor(float("nan"), dtype=torch.float64), "got nan"),
        (("mixer", "controller", "steps"), -5, '["steps"] must be a whole number from 0 on'),
        (("mixer", "controller", "law"), "paper", "the state is of law 'paper', this controller has 'gac'"),
        (("mixer", "version"), 99, "a newer gac wrote it"),
        (("mixer", "uncertainty"), {}, "lacks average, count, last, level"),
        (("mixer",), None, '["mixer"] must be a dictionary'),
        (("sft_position",), -1, '["sft_position"]'),
        (("sft_size",), 3.5, '["sft_size"] must be an int'),
        (("global_step",), True, '["global_step"]'),
        (("position", "trained"), -4, '["position"]["trained"]'),
        (("position",), {}, "lacks epoch, taken, trained"),
        (("batching", "rows"), 0, '["batching"]["rows"] must be a whole number from 1 on'),
        (("batching",), ..., "lacks batching"),
        (("rule",), {"queue": []}, '["rule"] has no place for queue'),
        (("more",), 1, "has no place for more"),
    ],
)
def test_a_state_of_nonsense(trainer, checkpoint, place, value, words):
    change(checkpoint / checkpoints.STATE_FILE, *place, value=value)
    refuses(trainer(**SAVING), checkpoint, checkpoints.STATE_FILE, words, "resume from another")


@pytest.mark.parametrize("name", [checkpoints.STATE_FILE, checkpoints.ROLLOUT_FILE.format(rank=0)])
@pytest.mark.parametrize("damage", ["cut short", "empty", "text", "malicious", "another kind"])
def test_a_damaged_file(trainer, checkpoint, tmp_path, name, damage):
    path, mark = checkpoint / name, tmp_path / "ran"
    assert path.exists()
    if damage == "cut short":
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "malicious":
        torch.save({"mixer": Malicious(mark)}, path)
    elif damage == "another kind":
        torch.save(torch.zeros(3), path)
    else:
        path.write_text(damage.replace("empty", ""))
    refuses(trainer(**SAVING), checkpoint, name, "resume from another")
    assert not mark.exists()


def test_true_stands_for_the_last_complete_checkpoint(trainer, saved, checkpoint, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "out")
    os.remove(folder / "checkpoint-2" / checkpoints.STATE_FILE)  # killed while it was written
    run = trainer(output_dir=str(folder), **SAVING)
    started = []
    run._load_gac_state = lambda state: started.append(state["global_step"]) or type(run)._load_gac_state(run, state)
    run.train(resume_from_checkpoint=True)
    assert started == [1]
    assert run.state.global_step == 2
    os.remove(folder / "checkpoint-1" / checkpoints.STATE_FILE)
    os.remove(folder / "checkpoint-2" / checkpoints.STATE_FILE)
    refuses(trainer(output_dir=str(folder), **SAVING), folder, "no complete checkpoint", error=ValueError, resume=True)


def test_rollouts_of_another_number_of_micro_steps(trainer, checkpoint):
    path = checkpoint / checkpoints.ROLLOUT_FILE.format(rank=0)
    torch.save(torch.load(path, weights_only=True)[:-1], path)
    refuses(trainer(**SAVING), checkpoint, path.name, "must have 4 items, got 3")


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        (("rule", "full"), 1, '["rule"]["full"] must be True or False'),
        (("rule", "queue"), [([1, 2], [3])], "as many labels as token ids, got 1 and 2"),
        (("rule", "queue"), [([-3], [3])], '["queue"][0][0][0] must be a whole number from 0 on, got -3'),
        (("rule", "queue"), [([1], ["x"])], '["queue"][0][1][0] must be an int'),
        (("rule", "queue"), [([1],)], "must have 2 items"),
        (("rule",), {}, "lacks full, queue"),
    ],
)
def test_a_queue_of_nonsense(trainer, tmp_path, place, value, words):
    options = {
        "law": "relift", "law_options": {"queue": 3}, "reward": first_digit_reward, "sft_dataset": None,
        "prompts": with_demonstrations(),
    }  # fmt: skip
    folder = tmp_path / "first"
    trainer(output_dir=str(folder), max_steps=1, save_strategy="steps", save_steps=1, **options).train()
    change(folder / "checkpoint-1" / checkpoints.STATE_FILE, *place, value=value)
    refuses(trainer(max_steps=2, **options), folder / "checkpoint-1", words)


def test_written_over_an_earlier_one_it_is_incomplete_until_its_end(trainer, tmp_path, monkeypatch):
    """A kill in the middle must not leave the old marker beside new files."""
    folder = str(tmp_path / "out")
    trainer(output_dir=folder, max_steps=1, save_strategy="steps", save_steps=1).train()
    assert len(complete_checkpoints(folder)) == 1
    seen = []
    again = trainer(output_dir=folder, max_steps=1, save_strategy="steps", save_steps=1)
    save = again.save_model
    monkeypatch.setattr(again, "save_model", lambda *a, **k: seen.append(complete_checkpoints(folder)) or save(*a, **k))
    again.train()
    assert seen == [[]]
    assert len(complete_checkpoints(folder)) == 1


@pytest.mark.parametrize("name", [checkpoints.STATE_FILE, checkpoints.ROLLOUT_FILE.format(rank=0)])
def test_without_room_the_last_checkpoint_stays(trainer, tmp_path, monkeypatch, name):
    """The second checkpoint finds the disk full; training goes on from the first as if nothing had happened."""
    options = SAVING | {"steps_per_generation": 6, "max_steps": 3}
    whole, folder = trainer(output_dir=str(tmp_path / "whole"), **options), str(tmp_path / "out")
    whole.train()
    real = checkpoints.save_whole

    def full(value, path):
        if path.endswith(os.path.join("checkpoint-2", name)):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
        real(value, path)

    monkeypatch.setattr(checkpoints, "save_whole", full)
    with pytest.raises(OSError, match="No space left"):
        trainer(output_dir=folder, **options).train()
    monkeypatch.undo()
    complete = complete_checkpoints(folder)
    assert [os.path.basename(path) for path in complete] == ["checkpoint-1"]
    resumed = trainer(output_dir=folder, model=tiny_model(seed=9), **options)
    resumed.train(resume_from_checkpoint=complete[-1])
    assert resumed.state.global_step == 3
    for parameter, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[parameter])


@pytest.mark.parametrize(
    ("strategy", "place"), [("checkpoint", "last-checkpoint"), ("all_checkpoints", "checkpoint-{step}")]
)
def test_what_is_pushed_is_complete(trainer, tmp_path, monkeypatch, strategy, place):
    """The folder that goes to the hub goes on there: the push waits for the mixer's state and the rollouts."""
    pushed = []

    def upload(*, folder_path, path_in_repo="", ignore_patterns=(), **_):
        names = [n for n in os.listdir(folder_path) if not any(fnmatch.fnmatch(n, p) for p in ignore_patterns)]
        pushed.append((path_in_repo, names))
        if path_in_repo:
            shutil.copytree(folder_path, tmp_path / "hub" / path_in_repo, dirs_exist_ok=True)
        return types.SimpleNamespace(done=lambda: True, result=lambda: None)

    hub = types.SimpleNamespace(
        upload_folder=upload, create_repo=lambda *_, **__: types.SimpleNamespace(repo_id="someone/model")
    )
    monkeypatch.setattr("transformers.trainer.hf_api", lambda: hub)
    options = {"push_to_hub": True, "hub_model_id": "someone/model", "hub_strategy": strategy, **SAVING}
    whole = trainer(output_dir=str(tmp_path / "whole"), **options | {"max_steps": 3})
    whole.train()
    folders = [(name, names) for name, names in pushed if name]
    assert [name for name, _ in folders] == [place.format(step=step) for step in (1, 2, 3)]
    for step, (_, names) in enumerate(folders, 1):
        assert checkpoints.STATE_FILE in names
        assert (checkpoints.ROLLOUT_FILE.format(rank=0) in names) == (step % 2 == 1)
    assert [names for name, names in pushed if not name and "model.safetensors" in names]
    if strategy == "all_checkpoints":
        resumed = trainer(output_dir=str(tmp_path / "resumed"), model=tiny_model(seed=9), **SAVING | {"max_steps": 3})
        resumed.train(resume_from_checkpoint=str(tmp_path / "hub" / "checkpoint-1"))
        for parameter, value in whole.model.state_dict().items():
            assert torch.equal(value, resumed.model.state_dict()[parameter])

"""``gac train`` where its folder, its model, its files or the disk fail: one line, and nothing lost or left behind."""

import errno
import json
import os
import resource
import shutil
import subprocess
import sys

import pytest
import torch

import gac.trainers.checkpoints as checkpoints
from gac.cli import main
from gac.files import write_whole
from gac.runs import folder as run_folder
from gac.runs import room
from gac.trainers.hybrid_grpo import complete_checkpoints
from tests.gac.cli.test_cli import TINY, metrics_of
from tests.gac.test_files import Malicious

RUN = ["train", *TINY, "--steps", "4", "--save-every", "2"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing disturbed."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert main([*RUN, "--out", str(out)]) == 0
    return out


@pytest.fixture
def copy(whole, tmp_path):
    """The same, two steps earlier: as a kill before the second checkpoint leaves it."""
    out = shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(out / "checkpoints" / "checkpoint-4")
    (out / "summary.json").unlink()
    return out


def one_line(capsys, arguments, *words, code=2):
    capsys.readouterr()
    assert main([str(word) for word in arguments]) == code
    printed = capsys.readouterr()
    lines = printed.err.strip().splitlines()
    assert "Traceback" not in printed.err
    assert lines[-1].startswith("gac ")
    for word in words:
        assert word in lines[-1]


def everything(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize("command", ["train", "audit", "compare"])
@pytest.mark.parametrize("way", ["a file", "under a file", "no such place", "read-only", "a name too long"])
def test_an_out_that_cannot_be_written(capsys, tmp_path, monkeypatch, way, command):
    (tmp_path / "file").write_text("mine")
    places = {"a file": tmp_path / "file", "under a file": tmp_path / "file" / "run", "no such place": "/proc/gac/run",
              "read-only": tmp_path / "run", "a name too long": tmp_path / ("x" * 300)}  # fmt: skip
    if way == "read-only":  # root may write everywhere: as the system says it

        def refuse(*_, **__):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))

        monkeypatch.setattr(run_folder.tempfile, "TemporaryFile", refuse)
    before = everything(tmp_path)
    options = TINY[: TINY.index("--threads")] if command == "compare" else TINY
    one_line(capsys, [command, *options, "--out", places[way]], f"--out {places[way]} cannot be written")
    assert everything(tmp_path) == before
    assert (tmp_path / "file").read_text() == "mine"


def test_a_warm_start_that_cannot_be_written(capsys, tmp_path):
    arguments = [*RUN, "--out", tmp_path / "run", "--warm-start", "/proc/gac/warm"]
    one_line(capsys, arguments, "--warm-start /proc/gac/warm cannot be written")
    assert everything(tmp_path) == []


def broken_models(folder, whole):
    """Folders that are no model, each in another way."""
    empty, cut, foreign = folder / "empty", folder / "cut", folder / "foreign"
    empty.mkdir()
    shutil.copytree(whole / "model", cut)
    weights = cut / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    shutil.copytree(whole / "model", foreign)
    (foreign / "config.json").write_text("[]")
    return {"absent": folder / "absent", "empty": empty, "cut short": cut, "foreign": foreign}


@pytest.mark.parametrize("command", ["train", "audit"])
@pytest.mark.parametrize("way", ["absent", "empty", "cut short", "foreign"])
def test_a_model_that_does_not_load_leaves_nothing(capsys, tmp_path, whole, way, command):
    model, out = broken_models(tmp_path, whole)[way], tmp_path / "new" / "run"
    more = ["--every", "2"] if command == "audit" else ["--save-every", "2"]
    own = TINY.index("--hidden-size")  # and --layers: the small model's alone
    tiny = TINY[:own] + TINY[own + 4 :]
    one_line(capsys, [command, *tiny, "--steps", "4", *more, "--model", model, "--out", out], "--model", str(model))
    assert not out.parent.exists()
    if command == "train":  # and the next attempt is the first
        assert main([*RUN, "--out", str(out), "--warm-start-only"]) == 0


def test_a_mistake_that_is_found_late_does_not_hold_the_folder(capsys, tmp_path, monkeypatch):
    from gac.runs import training

    real = training.run_hybrid

    def late(*_, **__):
        raise training.UsageError("found late")

    monkeypatch.setattr(training, "run_hybrid", late)
    one_line(capsys, [*RUN, "--out", tmp_path / "run"], "found late")
    assert not (tmp_path / "run" / "config.json").exists()
    monkeypatch.setattr(training, "run_hybrid", real)
    assert main([*RUN, "--out", str(tmp_path / "run")]) == 0


def test_what_is_left_of_a_run_is_not_taken_for_a_new_one(capsys, copy):
    (copy / "config.json").unlink()
    before = everything(copy)
    one_line(capsys, [*RUN, "--out", copy], "metrics.jsonl without config.json")
    assert everything(copy) == before


@pytest.mark.parametrize("where", ["metrics", "a checkpoint", "the model of a checkpoint"])
def test_a_full_disk_loses_nothing(capsys, tmp_path, whole, monkeypatch, where):
    """The third step's record, or the second checkpoint, finds no room; with room again, the run ends as it would."""
    out, full = tmp_path / "run", OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if where == "metrics":
        append = run_folder.MetricsFile.append

        def write(self, record):
            if record["step"] == 3:
                self._file.write('{"step": 3, "lo')  # what still had room
                self._file.flush()
                raise full
            append(self, record)

        monkeypatch.setattr(run_folder.MetricsFile, "append", write)
    elif where == "a checkpoint":
        save = checkpoints.save_whole

        def write(value, path):
            if "checkpoint-4" in path:
                raise full
            save(value, path)

        monkeypatch.setattr(checkpoints, "save_whole", write)
    else:
        real = checkpoints.CheckpointedGRPOTrainer.save_model

        def write(self, output_dir=None, *args, **kwargs):
            real(self, output_dir, *args, **kwargs)
            if "checkpoint-4" in (output_dir or ""):
                raise full

        monkeypatch.setattr(checkpoints.CheckpointedGRPOTrainer, "save_model", write, raising=False)
    one_line(capsys, [*RUN, "--out", out], "no room left to write", f"gac train --out {out} --resume", code=1)
    monkeypatch.undo()
    assert [path[-1] for path in complete_checkpoints(str(out / "checkpoints"))] == ["2"]
    assert main(["train", "--out", str(out), "--resume"]) == 0
    assert metrics_of(out) == metrics_of(whole)
    assert (out / "model" / "model.safetensors").read_bytes() == (whole / "model" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("limit", [10_000, 30_000], ids=["model.safetensors", "optimizer.pt"])
def test_what_libraries_say_of_a_full_disk(capsys, tmp_path, whole, monkeypatch, limit):
    """safetensors and torch have errors of their own; a file of the second checkpoint may not grow so far."""
    out, limits = tmp_path / "run", resource.getrlimit(resource.RLIMIT_FSIZE)
    real = checkpoints.CheckpointedGRPOTrainer._save_checkpoint

    def save(self, *arguments):
        if self.state.global_step == 4:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
        real(self, *arguments)

    monkeypatch.setattr(checkpoints.CheckpointedGRPOTrainer, "_save_checkpoint", save)
    try:
        words = ("no room left to write", "checkpoint-4 (File too large)", f"gac train --out {out} --resume")
        one_line(capsys, [*RUN, "--out", out], *words, code=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    monkeypatch.undo()
    assert [path[-1] for path in complete_checkpoints(str(out / "checkpoints"))] == ["2"]
    assert main(["train", "--out", str(out), "--resume"]) == 0
    assert metrics_of(out) == metrics_of(whole)


def test_a_picture_that_had_no_room_is_drawn_later(capsys, tmp_path, whole, monkeypatch):
    import gac.plots

    out = shutil.copytree(whole, tmp_path / "run")
    (out / "run.png").unlink()

    def full(records, summary, path, **_):
        path.write_bytes(b"cut")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(gac.plots, "draw_run", full)
    one_line(capsys, ["train", "--out", out, "--resume"], "run.png", "no room left", code=1)
    assert not list(out.glob("*run.png"))
    monkeypatch.undo()
    assert main(["train", "--out", str(out), "--resume"]) == 0
    assert (out / "run.png").read_bytes()[1:4] == b"PNG"


@pytest.mark.parametrize(
    ("error", "full", "found"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "a/b"), False, "a/b (No space left on device)"),
        (Exception("No space left on device (os error 28)"), False, "a file in FOLDER (No space left on device)"),
        (
            RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"),
            True,
            "a file in FOLDER (No space",
        ),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"), False, None),
        (Exception("Input/output error (os error 5)"), False, None),
        (RuntimeError("expected scalar type Float"), True, None),
        (OSError(errno.EIO, "Input/output error"), True, None),
    ],
)
def test_errors_that_say_that_there_is_no_room(tmp_path, monkeypatch, error, full, found):
    for name, time in (("old/file", 1), ("new/file", 2)):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("x")
        os.utime(tmp_path / name, (time, time))

    def temporary(**_):
        if full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return (tmp_path / "probe").open("wb")

    monkeypatch.setattr(room.tempfile, "TemporaryFile", temporary)
    for raised in (error, _caused_by(error)):
        (tmp_path / "probe").unlink(missing_ok=True)
        what = room.no_room(raised, [tmp_path])
        assert (what is None) if found is None else (found.replace("FOLDER", str(tmp_path / "new")) in what)


def _caused_by(error):
    outer = ValueError("while saving")
    outer.__cause__ = error
    return outer


def test_other_errors_of_the_system_are_not_taken_for_a_full_disk(tmp_path, monkeypatch):
    from gac.runs import training

    def broken(*_, **__):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(training, "run_warm_start", broken)
    with pytest.raises(OSError, match="Input/output error"):
        main([*RUN, "--out", str(tmp_path / "run")])


@pytest.mark.parametrize("damage", ["cut short", "malicious", "nonsense"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_goes_on(capsys, tmp_path, whole, damage):
    out, mark = shutil.copytree(whole, tmp_path / "run"), tmp_path / "ran"
    (out / "summary.json").unlink()
    folder = out / "checkpoints" / "checkpoint-4"
    state = folder / "gac_state.pt"
    if damage == "cut short":
        state.write_bytes(state.read_bytes()[:-50])
    elif damage == "malicious":
        torch.save({"mixer": Malicious(mark)}, state)
    else:
        value = torch.load(state, weights_only=True)
        value["mixer"]["controller"]["state"]["mu"].fill_(7.0)
        torch.save(value, state)
    before = everything(out)
    # more steps, so that the checkpoint is needed
    one_line(capsys, ["train", "--out", out, "--resume", "--steps", "5"], str(state), "resume from another")
    assert not mark.exists()
    assert everything(out) == before
    shutil.rmtree(folder)
    assert main(["train", "--out", str(out), "--resume"]) == 0
    assert len(metrics_of(out)) == 5


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("config.json", '{"options"', "is no JSON file"),
        ("config.json", '{"options": {"nonsense": 1}, "warm_start": null}', "not of a run that this gac knows"),
        ("config.json", "[]", "not of a run that this gac knows"),
        ("metrics.jsonl", "17\n", "no file of metrics"),
        ("warm_start/result.json", "{", "is no JSON file"),
    ],
)
def test_a_damaged_file_of_a_run(capsys, copy, name, text, words):
    (copy / name).write_text(text)
    one_line(capsys, ["train", "--out", copy, "--resume"], name, words)
    assert (copy / name).read_text() == text


def test_metrics_that_lack_steps_are_told(capsys, copy):
    lines = (copy / "metrics.jsonl").read_text().splitlines(keepends=True)
    (copy / "metrics.jsonl").write_text(lines[0])
    capsys.readouterr()
    assert main(["train", "--out", str(copy), "--resume"]) == 0
    assert "metrics.jsonl lacks 1 steps that the checkpoint holds, the first 2" in capsys.readouterr().out


def test_metrics_are_on_the_disk_before_their_checkpoint(tmp_path, monkeypatch):
    happened = []
    sync = run_folder.MetricsFile.sync
    monkeypatch.setattr(run_folder.MetricsFile, "sync", lambda self: happened.append(len(self.records)) or sync(self))
    save = checkpoints.save_whole
    monkeypatch.setattr(checkpoints, "save_whole", lambda value, path: happened.append("saved") or save(value, path))
    assert main([*RUN, "--out", str(tmp_path / "run")]) == 0
    assert happened == [2, "saved", 4, "saved"]


@pytest.mark.skipif(os.name != "posix", reason="forks and kills")
def test_kills_at_random_moments_change_nothing(tmp_path):
    """Three, the first within the second checkpoint; ``benchmarks/results/kill_and_resume.json`` has fifty."""
    command = [sys.executable, "-m", "benchmarks.kill_and_resume", "--kills", "3", "--seed", "29"]
    done = subprocess.run(
        [*command, "--json", str(tmp_path / "found.json")], capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["by_time"] + found["in_checkpoints"] == found["kills"] == 3
    assert found["in_checkpoints"] > 0
    assert any(0 < last < 8 for last in found["last_checkpoints"]), "nothing was gone on with"
    assert found["wrong"] == []


def test_the_comparison_of_runs_finds_what_differs(tmp_path, whole):
    from benchmarks.kill_and_resume import differences

    other = shutil.copytree(whole, tmp_path / "other")
    assert differences(whole, other) == []
    lines = (other / "metrics.jsonl").read_text().replace('"step": 3', '"step": 3, "more": 1')
    write_whole(other / "metrics.jsonl", lines.encode())
    weights = other / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    (other / "config.json.part").touch()
    found = differences(whole, other)
    assert [line.split(":")[0] for line in found] == ["half-written files", "model/model.safetensors", "step 3 more"]

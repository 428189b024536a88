"""Files are whole or not there; files of a state are plain data that is checked, and no code in them runs."""

import errno
import os
import pickle

import pytest
import torch

from gac.files import DamagedFile, load_state, save_whole, sync_tree, write_whole
from gac.state import Table, Whole

ENTRY = Table({"steps": Whole()})
THEN = "take another"


class Malicious:
    """Runs a command where it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def name_of(file):
    return os.path.realpath(f"/proc/self/fd/{file}")


def damaged(path, *words):
    with pytest.raises(DamagedFile) as raised:
        load_state(path, ENTRY, then=THEN)
    message = str(raised.value)
    assert message.startswith(str(path))
    assert message.endswith(f"; {THEN}")
    assert "weights_only" not in message, "torch's advice to read it all the same"
    for word in words:
        assert word in message


def test_round_trip(tmp_path):
    path = tmp_path / "state.pt"
    save_whole({"steps": 3}, path)
    assert load_state(path, ENTRY, then=THEN) == {"steps": 3}
    assert [found.name for found in tmp_path.iterdir()] == ["state.pt"]


def test_cut_short_anywhere(tmp_path):
    path = tmp_path / "state.pt"
    save_whole({"steps": 3}, path)
    data = path.read_bytes()
    for length in range(0, len(data) - 1, 13):
        path.write_bytes(data[:length])
        damaged(path, "cannot be read")


@pytest.mark.parametrize("data", [b"text\n", b"\x89PNG\r\n\x1a\n" + bytes(100), bytes(1000), b"PK\x03\x04" + bytes(50)])
def test_files_of_something_else(tmp_path, data):
    path = tmp_path / "state.pt"
    path.write_bytes(data)
    damaged(path, "cannot be read")


@pytest.mark.parametrize("write", ["torch.save", "pickle"])
def test_code_in_a_file_does_not_run(tmp_path, write):
    path, mark = tmp_path / "state.pt", tmp_path / "ran"
    value = {"steps": 3, "more": Malicious(mark)}
    path.write_bytes(pickle.dumps(value)) if write == "pickle" else torch.save(value, path)
    damaged(path, "could run code")
    assert not mark.exists()
    torch.load(path, weights_only=False) if write == "torch.save" else pickle.loads(path.read_bytes())
    assert mark.exists(), "the file would not have run anything"


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"steps": -1}, ('["steps"] must be a whole number from 0 on', "got -1")),
        ({"steps": True}, ('["steps"] must be an int',)),
        ({}, ("lacks steps",)),
        ([3], ("must be a dictionary, got list",)),
        ({"steps": 1, "x": 1}, ("has no place for x",)),
    ],
)
def test_contents_that_cannot_be(tmp_path, value, words):
    path = tmp_path / "state.pt"
    torch.save(value, path)
    damaged(path, *words)


def test_what_is_no_file(tmp_path):
    damaged(tmp_path, "cannot be read")
    damaged(tmp_path / "absent", "cannot be read")


@pytest.mark.parametrize("where", ["write", "fsync", "replace"])
def test_without_room_the_old_file_stays(tmp_path, monkeypatch, where):
    path = tmp_path / "file"
    write_whole(path, b"old")

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if where == "write":
        path.with_name("file.part").symlink_to("/dev/full")
    else:
        monkeypatch.setattr(os, where, full)
    with pytest.raises(OSError, match="No space left"):
        write_whole(path, b"new")
    assert path.read_bytes() == b"old"
    assert [found.name for found in tmp_path.iterdir()] == ["file"], "room is given back"


def test_a_file_is_on_the_disk_before_it_takes_its_name(tmp_path, monkeypatch):
    happened = []
    real = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: happened.append(name_of(file)) or real[0](file))
    monkeypatch.setattr(os, "replace", lambda *paths: happened.append("replace") or real[1](*paths))
    write_whole(tmp_path / "file", b"new")
    assert happened == [str(tmp_path / "file.part"), "replace", str(tmp_path)]


def test_a_folder_is_on_the_disk_whole(tmp_path, monkeypatch):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "file").write_text("x")
    (tmp_path / "file").write_text("x")
    synced, real = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(name_of(file)) or real(file))
    sync_tree(tmp_path)
    assert {os.path.relpath(path, tmp_path) for path in synced} == {".", "a", "a/b", "a/b/file", "file"}

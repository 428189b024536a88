"""GGUF files: found under every name, joined, converted to the weights that they stand for, and that once."""

import pytest
import torch

from gac.tasks import gguf_files
from gac.tasks.gguf_files import default_cache, find_gguf, gguf_folder
from gac.tasks.pretrained import load_pretrained
from tests.gac.tasks.tiny import END, split, write_gguf


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A GGUF file and its weights."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.Q8_0.gguf"
    return path, write_gguf(path)


def test_a_file_and_its_parts_are_the_model_they_stand_for(made, tmp_path, monkeypatch):
    path, weights = made
    cache = tmp_path / "cache"
    model, tokenizer = load_pretrained(str(path), cache=cache)
    found = model.state_dict()
    assert all(torch.equal(found[name], value) for name, value in weights.items())
    assert found["lm_head.weight"] is not None
    assert {value.dtype for value in found.values()} == {torch.float32}
    assert tokenizer.eos_token == END
    ids = [ord("b") - 33, tokenizer.convert_tokens_to_ids("ab"), tokenizer.eos_token_id]
    assert tokenizer("bab" + END, add_special_tokens=False)["input_ids"] == ids
    (folder,) = cache.iterdir()

    (tmp_path / "tiny.Q8_0.gguf").write_bytes(path.read_bytes())
    parts = split(tmp_path / "tiny.Q8_0.gguf", 3)
    monkeypatch.setattr(gguf_files, "_read", lambda _: pytest.fail("it was converted before"))
    for name in (str(tmp_path / "tiny.*.part*"), str(parts[1]), str(tmp_path)):
        assert find_gguf(name) == parts
        assert gguf_folder(find_gguf(name), cache) == folder
    assert [each.name for each in cache.iterdir()] == [folder.name]


def test_parts_are_joined_before_they_are_read(made, tmp_path):
    path, weights = made
    (tmp_path / "tiny.Q8_0.gguf").write_bytes(path.read_bytes())
    parts = split(tmp_path / "tiny.Q8_0.gguf", 3)
    model, _ = load_pretrained(str(parts[0]), cache=tmp_path / "cache")
    assert torch.equal(model.model.embed_tokens.weight, weights["model.embed_tokens.weight"])
    (folder,) = (tmp_path / "cache").iterdir()
    assert not list(folder.glob("*.gguf*"))
    parts[1].unlink()
    with pytest.raises(ValueError, match=r"--model .*: transformers cannot read this GGUF file: "):
        load_pretrained(str(parts[0]), cache=tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == [folder]


def test_the_digest_sees_the_whole_through_its_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_files, "_SAMPLE", 8)
    whole = tmp_path / "a.gguf"
    whole.write_bytes(bytes(range(50)))
    digest = gguf_files._digest([whole])
    for change in (0, 7, 42, 49):
        whole.write_bytes(bytes(255 if at == change else at for at in range(50)))
        assert gguf_files._digest([whole]) != digest
    whole.write_bytes(bytes(range(50)))
    for pieces in (2, 7, 25):
        parts = split(whole, pieces)
        assert gguf_files._digest(parts) == digest
        whole.write_bytes(b"".join(part.read_bytes() for part in parts))


def test_parts_are_in_the_order_of_their_numbers(tmp_path):
    for number in (10, 2, 1):
        (tmp_path / f"m.gguf.part{number}").touch()
    assert [path.name for path in find_gguf(str(tmp_path))] == ["m.gguf.part1", "m.gguf.part2", "m.gguf.part10"]


def test_a_package_is_found_without_being_imported(tmp_path, monkeypatch):
    (tmp_path / "shipped").mkdir()
    (tmp_path / "shipped" / "__init__.py").write_text("raise RuntimeError('imported')")
    file = tmp_path / "shipped" / "m.gguf"
    file.touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert find_gguf("package:shipped") == [file]


def test_other_names_are_left_to_others(tmp_path):
    (tmp_path / "config.json").touch()
    (tmp_path / "m.gguf").touch()
    assert find_gguf(str(tmp_path)) == find_gguf("owner/name") == find_gguf("absent.gguf") == []


@pytest.mark.parametrize(
    ("files", "name", "message"),
    [
        ([], "package:gac_no_such", "no package 'gac_no_such' is installed"),
        ([], "package:a b", "no package 'a b' is installed"),
        ([], "{}/*.part*", "no GGUF file and no part of one matches"),
        ([], "{}", "neither a config.json nor a GGUF file"),
        (["a.gguf", "b.gguf"], "{}", "several GGUF files, a.gguf, b.gguf; give one of them"),
        (["weights.bin"], "{}/weights.bin", "this file is no GGUF file"),
    ],
)
def test_what_is_no_model_is_named(tmp_path, files, name, message):
    for file in files:
        (tmp_path / file).touch()
    with pytest.raises(ValueError, match=r"^--model ") as error:
        find_gguf(name.format(tmp_path))
    assert message in str(error.value)


def test_a_gguf_file_needs_its_package(made, tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_files, "find_spec", lambda _: None)
    with pytest.raises(ImportError, match=r"--model .*takes the package gguf: pip install 'gguf"):
        load_pretrained(str(made[0]), cache=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_cache_is_the_users(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache() == tmp_path / "gac"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert default_cache() == tmp_path / "home" / ".cache" / "gac"

"""GGUF files, whole or in parts: found by the name that a user gives, and turned once into a model folder."""

import contextlib
import glob
import hashlib
import os
import re
import shutil
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from gac.files import sync_tree

PACKAGE = "package:"
"""Prefix of the name of an installed Python package that ships a GGUF file."""

_FILE = re.compile(r"(?P<stem>.+\.gguf)(?P<part>[.-]?\w[\w.-]*)?", flags=re.IGNORECASE)
_SAMPLE = 2**22


def default_cache() -> Path:
    """Where converted models live: ``gac`` in ``XDG_CACHE_HOME``, or in ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gac"


def find_gguf(name: str) -> list[Path]:
    """The files that hold the GGUF model `name`, in order; empty where `name` is of another kind.

    Args:
        name: a ``.gguf`` file; a pattern that its parts match, or one of them (``model.gguf.part00``, as ``split``
            leaves them); a folder that holds either and is no model folder; or ``package:NAME`` for such a folder of an
            installed Python package, which is not imported.

    Raises:
        ValueError: no such package, no file that matches, or more than one model.
    """
    if name.startswith(PACKAGE):
        return _of_folder(_package(name.removeprefix(PACKAGE)), name)
    path = Path(name).expanduser()
    if path.is_dir():
        return [] if _is_model(path) else _of_folder(path, name)
    if path.is_file():
        match = _FILE.fullmatch(path.name)
        if match is None:
            raise ValueError(f"--model {name}: this file is no GGUF file; give one, or the folder of a model")
        return _ordered(path.parent.iterdir(), match["stem"]) if match["part"] else [path]
    if glob.has_magic(name):
        found = [Path(text) for text in glob.glob(str(path)) if _FILE.fullmatch(Path(text).name)]
        if not found:
            raise ValueError(f"--model {name}: no GGUF file and no part of one matches")
        return _one_model(found, name)
    return []


def gguf_folder(files: Sequence[Path], cache: Path) -> Path:
    """The model folder of a GGUF file, made from it where `cache` does not have it yet: weights in bf16, tokenizer.

    Args:
        files: the file, or its parts in order.
        cache: folder of converted models, outside of the run. Another process may fill it at the same time.

    Raises:
        ImportError: the package ``gguf`` is missing.
        ValueError: transformers cannot read the file.
    """
    name = _FILE.fullmatch(files[0].name)["stem"]  # type: ignore[index]
    folder = cache / f"{Path(name).stem}-{_digest(files)}"
    if _is_model(folder):
        return folder
    if find_spec("gguf") is None:
        raise ImportError(f"--model {files[0]}: reading GGUF files takes the package gguf: pip install 'gguf>=0.19'")
    part = cache / f".{folder.name}.{os.getpid()}"
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        source = files[0] if len(files) == 1 else _joined(files, part / name)
        model, tokenizer = _read(source)
        if source.parent == part:
            source.unlink()
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)
        sync_tree(part)
        with contextlib.suppress(OSError):  # another process was first, with the same
            part.rename(folder)
        if not _is_model(folder):
            raise OSError(f"{folder} is in the way of a converted model: remove it")
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder


def _read(file: Path) -> tuple[Any, Any]:
    """Model in bf16 and tokenizer of a whole file, as if they had never been quantised."""
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options: dict[str, Any] = {"gguf_file": file.name, "dtype": torch.bfloat16}
    if hasattr(transformers, "GgufConfig"):  # later versions may keep the weights packed, which cannot be trained
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
        model: Any = AutoModelForCausalLM.from_pretrained(str(file.parent), **options)
    except Exception as error:  # of whichever library reads the file
        reason = " ".join([f"{type(error).__name__}:", *str(error).strip().splitlines()[:1]])
        raise ValueError(f"--model {file}: transformers cannot read this GGUF file: {reason}") from error
    # transformers takes the model for a quantised one and would not write it; its weights are plain numbers
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model, tokenizer


def _is_model(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("config.json", "adapter_config.json"))


def _package(name: str) -> Path:
    try:
        spec = find_spec(name) if name.isidentifier() else None
    except (ImportError, ValueError):
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"--model {PACKAGE}{name}: no package {name!r} is installed in this environment")
    return Path(next(iter(spec.submodule_search_locations)))


def _of_folder(folder: Path, name: str) -> list[Path]:
    found = [path for path in folder.iterdir() if _FILE.fullmatch(path.name)]
    if not found:
        raise ValueError(f"--model {name}: the folder holds neither a config.json nor a GGUF file")
    return _one_model(found, name)


def _one_model(found: Sequence[Path], name: str) -> list[Path]:
    """`found` in order, when it is one file or the parts of one."""
    stems = sorted({_FILE.fullmatch(path.name)["stem"] for path in found})  # type: ignore[index]
    if len(stems) > 1:
        raise ValueError(f"--model {name}: there are several GGUF files, {', '.join(stems)}; give one of them")
    whole = [path for path in found if path.name == stems[0]]
    return whole or _ordered(found, stems[0])


def _ordered(paths: Any, stem: str) -> list[Path]:
    """Parts of the file `stem` by their numbers or letters: part2 comes before part10."""
    parts = [path for path in paths if path.name.startswith(stem) and path.name != stem]
    key = lambda path: [int(word) if word.isdigit() else word for word in re.split(r"(\d+)", path.name)]
    return sorted(parts, key=key)


def _joined(parts: Sequence[Path], path: Path) -> Path:
    with path.open("wb") as whole:
        for part in parts:
            with part.open("rb") as piece:
                shutil.copyfileobj(piece, whole, _SAMPLE)
    return path


def _digest(files: Sequence[Path]) -> str:
    """Tells contents apart by their size, their head, which lists all tensors, and their tail; parts as the whole."""
    sizes = [file.stat().st_size for file in files]
    digest = hashlib.sha256(str(sum(sizes)).encode())
    digest.update(_span(files, sizes, 0, _SAMPLE))
    digest.update(_span(files, sizes, max(0, sum(sizes) - _SAMPLE), sum(sizes)))
    return digest.hexdigest()[:12]


def _span(files: Sequence[Path], sizes: Sequence[int], begin: int, end: int) -> bytes:
    """Bytes from `begin` up to `end` of the files one after the other."""
    found, start = b"", 0
    for file, size in zip(files, sizes, strict=True):
        low, high = max(begin, start), min(end, start + size)
        if low < high:
            with file.open("rb") as stream:
                stream.seek(low - start)
                found += stream.read(high - low)
        start += size
    return found

"""The run directory: config.json, metrics.jsonl, summary.json. Every file is either old or new, never half written."""

import contextlib
import json
import math
import os
import platform
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from gac.files import DamagedFile, write_whole
from gac.runs.errors import UsageError

CONFIG, METRICS, SUMMARY = "config.json", "metrics.jsonl", "summary.json"
TIMING_KEYS = frozenset({"seconds", "eval_seconds", "step_time", "gac/seconds", "gac/overhead"})
"""Metrics that hold wall-clock time; every other one is the same after a resume."""


def write_text(path: Path, text: str) -> None:
    """Writes `path`, with the folders above it; after a kill or a full disk the old or the new one is there, whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """`write_text` of indented JSON; NaN and infinities become null."""
    write_text(path, json.dumps(_finite(value), indent=2) + "\n")


def read_json(path: Path) -> Any:
    """The value in a JSON file.

    Raises:
        DamagedFile: it is none.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DamagedFile(f"{path} is no JSON file ({error}): remove it, or choose another folder") from None


def require_writable(folder: Path, option: str) -> None:
    """Checks that files can be made in `folder`, which need not be there; makes nothing.

    Args:
        folder: a run directory.
        option: which names it, for the error.

    Raises:
        UsageError: they cannot; the message says what is in the way.
    """
    there = next(place for place in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(place))
    try:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            os.lstat(folder)  # a name that no file can have, or a folder that may not be looked into
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise cannot_write(folder, option, error) from error


def cannot_write(folder: Path, option: str, error: OSError) -> UsageError:
    """The mistake that a folder which cannot be written is."""
    return UsageError(f"{option} {folder} cannot be written: {error.strerror or error}; choose another folder")


def read_metrics(path: Path, *, last_step: int | None = None) -> list[dict[str, Any]]:
    """Records of a metrics file in order, up to `last_step`. A line cut short by a kill is left out.

    Raises:
        DamagedFile: a line is something else than the record of a step.
    """
    records: list[dict[str, Any]] = []
    if not path.exists():
        return records
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = metrics_record(line, path)
        except json.JSONDecodeError:
            break
        if last_step is None or record["step"] <= last_step:
            records.append(record)
    return records


def metrics_record(line: str, path: Path) -> dict[str, Any]:
    """The record in a line of a metrics file.

    Raises:
        json.JSONDecodeError: it is no JSON, as what a kill left of a line.
        DamagedFile: it is something else than the record of a step; `path` names the file.
    """
    record = json.loads(line)
    if not isinstance(record, dict) or not isinstance(record.get("step"), int):
        raise DamagedFile(f"{path} is no file of metrics: {line:.60} is no step; remove it, or choose another folder")
    return record


class MetricsFile:
    """Appends one JSON line per step and keeps the records in memory. Drops what lies beyond `last_step` first."""

    def __init__(self, path: Path, *, last_step: int):
        self.records = read_metrics(path, last_step=last_step)
        write_text(path, "".join(json.dumps(record) + "\n" for record in self.records))
        self._file = path.open("a", encoding="utf-8")

    def append(self, record: dict[str, Any]) -> None:
        """Adds a record; it has left the process when this returns."""
        record = _finite(record)
        self.records.append(record)
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Waits until all records are on the disk: before a checkpoint that counts on them."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def forget_config(out: Path) -> None:
    """Takes back :func:`write_config`, so that another attempt finds no run here; a folder left empty goes too."""
    (out / CONFIG).unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        out.rmdir()


def write_config(out: Path, options: dict[str, Any], command: Sequence[str], warm_start: Path | None) -> dict[str, Any]:
    """Writes `config.json`, which says what a run is; returns what says where its numbers come from.

    Args:
        out: the run directory.
        options: all options of the run by name.
        command: the words of the command line that started it.
        warm_start: folder of the starting model where it is not the run's own.

    Returns:
        ``options``, ``command`` and ``versions``.

    Raises:
        UsageError: `out` cannot be written.
    """
    provenance = {"options": options, "command": list(command), "versions": versions()}
    try:
        write_json(out / CONFIG, {**provenance, "warm_start": None if warm_start is None else str(warm_start)})
    except OSError as error:
        raise cannot_write(out, "--out", error) from error
    return provenance


def versions() -> dict[str, str]:
    """Versions of Python and of every package that decides a run's numbers; 'not installed' where absent."""
    names = ["gac-kernels", "torch", "triton", "transformers", "trl", "peft", "accelerate", "tokenizers", "datasets"]
    names += ["reasoning-gym", "gguf", "numpy", "matplotlib", "rich", "tensorboard"]
    return {"python": platform.python_version()} | package_versions(names)


def package_versions(names: Iterable[str]) -> dict[str, str]:
    """Versions of distributions by name, 'not installed' where absent.

    That of this one is :data:`gac.__version__`, the code's own: a checkout may not be installed, or beside a wheel of
    another version.
    """
    from importlib import metadata

    from gac.version import __version__

    found = {}
    for name in names:
        try:
            found[name] = __version__ if name == "gac-kernels" else metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def peak_memory_bytes(device_type: str) -> int | None:
    """Most memory held so far: of the device for CUDA, else of the process; None where the system does not tell."""
    if device_type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value

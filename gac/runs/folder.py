"""The run directory: config.json, metrics.jsonl, summary.json. Every file is either old or new, never half written."""

import json
import math
import os
import platform
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

CONFIG, METRICS, SUMMARY = "config.json", "metrics.jsonl", "summary.json"
TIMING_KEYS = frozenset({"seconds", "eval_seconds", "step_time", "gac/seconds"})
"""Metrics that hold wall-clock time; every other one is the same after a resume."""


def write_text(path: Path, text: str) -> None:
    """Writes `path` through a temporary file beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def write_json(path: Path, value: Any) -> None:
    """`write_text` of indented JSON; NaN and infinities become null."""
    write_text(path, json.dumps(_finite(value), indent=2) + "\n")


def read_json(path: Path) -> Any:
    """The value in a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def read_metrics(path: Path, *, last_step: int | None = None) -> list[dict[str, Any]]:
    """Records of a metrics file in order, up to `last_step`. A line cut short by a kill is left out."""
    records: list[dict[str, Any]] = []
    if not path.exists():
        return records
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            break
        if last_step is None or record["step"] <= last_step:
            records.append(record)
    return records


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

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def write_config(out: Path, options: dict[str, Any], command: Sequence[str], warm_start: Path | None) -> dict[str, Any]:
    """Writes `config.json`, which says what a run is; returns what says where its numbers come from.

    Args:
        out: the run directory.
        options: all options of the run by name.
        command: the words of the command line that started it.
        warm_start: folder of the starting model where it is not the run's own.

    Returns:
        ``options``, ``command`` and ``versions``.
    """
    provenance = {"options": options, "command": list(command), "versions": versions()}
    write_json(out / CONFIG, {**provenance, "warm_start": None if warm_start is None else str(warm_start)})
    return provenance


def versions() -> dict[str, str]:
    """Versions of Python and of every package that decides a run's numbers; 'not installed' where absent."""
    names = ["gac-kernels", "torch", "triton", "transformers", "trl", "peft", "accelerate", "tokenizers", "datasets"]
    names += ["reasoning-gym", "numpy", "matplotlib", "rich", "tensorboard"]
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

"""The history of a run: one line for each step that was measured by module."""

from __future__ import annotations

import json
import os
from pathlib import Path

from gac.statistics.by_module import ModuleStatistics

HISTORY = "gac_modules.jsonl"
"""The file of a run directory that holds one line for each step measured by module."""


def append_record(path: str | Path, statistics: ModuleStatistics) -> None:
    """Adds a step to a history. It has left the process when this returns.

    Args:
        path: the file, or the run directory, in which it is called :data:`HISTORY`.
    """
    path = _history_file(Path(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    line = (json.dumps(statistics.to_record(), allow_nan=False, separators=(",", ":")) + "\n").encode()
    with path.open("ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":  # what a kill left of the last line must not swallow this one
                line = b"\n" + line
        file.write(line)


def read_history(path: str | Path) -> list[ModuleStatistics]:
    """The steps of a history in order.

    Lines cut short by a kill are left out. Where steps go back, as after a resume from a checkpoint, the later lines
    count.

    Args:
        path: a run directory, or the file.

    Raises:
        FileNotFoundError: no such run, or no history in it; the message says what to do.
        ValueError: the file holds something else.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no such run: {path} does not exist")
    path = _history_file(path)
    if not path.exists():
        raise FileNotFoundError(
            f"{path.parent} holds no {HISTORY}: no step of the run was measured by module; train with "
            "report_interval=10 (every tenth measured step), and for more steps than that"
        )
    history: list[ModuleStatistics] = []
    unread = 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            unread += 1
            continue
        if not isinstance(record, dict):
            raise ValueError(f"{path} is not a history of module statistics: one of its lines is {line[:40]!r}")
        statistics = ModuleStatistics.from_record(record)
        while history and history[-1].step >= statistics.step:
            history.pop()
        history.append(statistics)
    if not history:
        holds = f"{unread} line(s) that are not JSON" if unread else "nothing"
        raise ValueError(f"{path} holds no measured step but {holds}: train with report_interval=10, say")
    return history


def _history_file(path: Path) -> Path:
    return path if path.suffix == ".jsonl" or path.is_file() else path / HISTORY

"""A run directory as it grows: its records, read as they are written."""

import json
import os
import re
from pathlib import Path
from typing import Any

from gac.files import DamagedFile
from gac.options import OVERHEAD
from gac.runs.errors import UsageError
from gac.runs.folder import CONFIG, METRICS, metrics_record, read_json

STATE = "trainer_state.json"
"""What transformers' trainer leaves in each checkpoint, with all that was logged until then."""


class WatchedRun:
    """The records of a run directory: lines of metrics.jsonl, or what a trainer's newest checkpoint has logged.

    Attributes:
        folder: the run directory.
        records: one for each step, oldest first; where a resumed run repeats steps the later ones count.
        options: of ``gac train`` by name; empty for another trainer's folder.
        total: steps that the run is to have; None where nothing tells.

    Raises:
        UsageError: the folder is no run directory; the message says what to name instead.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.records: list[dict[str, Any]] = []
        self.options: dict[str, Any] = {}
        self.total: int | None = None
        self._seen: dict[Path, tuple[int, int, int]] = {}
        self._place = 0
        if not folder.is_dir():
            what = "is a file" if folder.exists() else "does not exist"
            raise UsageError(f"no such run: {folder} {what}; name the folder that gac train --out wrote")
        if not ((folder / CONFIG).exists() or (folder / METRICS).exists() or checkpoint_states(folder)):
            raise UsageError(_no_run(folder))
        self.poll()

    def poll(self) -> bool:
        """Reads what has come since the last call; says whether anything has.

        Raises:
            DamagedFile: a line or file that is something else.
        """
        changed = False
        if self._changed(self.folder / CONFIG):
            self.options = dict(read_json(self.folder / CONFIG).get("options") or {})
            self.total = self.options.get("steps", self.total)
            changed = True
        if (self.folder / METRICS).exists():
            return self._read_metrics() or changed
        states = checkpoint_states(self.folder)
        if states and self._changed(states[-1]):
            self._read_state(states[-1])
            changed = True
        return changed

    @property
    def step(self) -> int:
        """The newest step; 0 before the first."""
        return self.records[-1]["step"] if self.records else 0

    @property
    def finished(self) -> bool:
        """Whether the last step that the run is to have is there."""
        return self.total is not None and self.step >= self.total

    @property
    def budget(self) -> float | None:
        """Share of a step's time that measuring may take; None where steps are counted or nothing tells."""
        if not self.options or self.options.get("interval") is not None:
            return None
        return self.options.get("overhead") or OVERHEAD

    @property
    def title(self) -> str:
        """What the run is, in a few words."""
        parts = [", ".join(map(str, self.options.get("task") or []))]
        parts += [f"{name} {self.options[name]}" for name in ("law", "seed") if self.options.get(name) is not None]
        return "  ".join(part for part in parts if part)

    def written(self) -> float:
        """When the newest record was written, in seconds since the epoch; 0 before the first."""
        files = [*checkpoint_states(self.folder)[-1:], self.folder / METRICS]
        return max((os.path.getmtime(path) for path in files if path.exists()), default=0.0)

    def _changed(self, path: Path) -> bool:
        """Whether a file is another, or longer, than when this was last asked; not where there is none."""
        try:
            found = os.stat(path)
        except OSError:
            return False
        identity = (found.st_ino, found.st_size, found.st_mtime_ns)
        old, self._seen[path] = self._seen.get(path), identity
        return old != identity

    def _read_metrics(self) -> bool:
        path = self.folder / METRICS
        before = self._seen.get(path)
        if not self._changed(path):
            return False
        inode, size, _ = self._seen[path]
        if before is None or before[0] != inode or size < self._place:  # a resumed run wrote it anew
            self.records, self._place = [], 0
        with path.open("rb") as file:
            file.seek(self._place)
            whole, end, _ = file.read().rpartition(b"\n")  # the rest of a line comes later
        self._place += len(whole) + len(end)
        for line in whole.decode("utf-8", errors="replace").splitlines():
            try:
                self._append(metrics_record(line, path))
            except json.JSONDecodeError:  # what a kill left of a line
                continue
        return True

    def _read_state(self, path: Path) -> None:
        state = read_json(path)
        if not isinstance(state, dict) or not isinstance(state.get("log_history"), list):
            raise DamagedFile(f"{path} is no state of a trainer: remove it, or choose another folder")
        self.records = []
        for record in state["log_history"]:
            if isinstance(record, dict) and isinstance(record.get("step"), int) and "loss" in record:
                self._append(record)
        self.total = state.get("max_steps") or self.total

    def _append(self, record: dict[str, Any]) -> None:
        while self.records and self.records[-1]["step"] >= record["step"]:
            self.records.pop()
        self.records.append(record)


def checkpoint_states(folder: Path) -> list[Path]:
    """States of a trainer's checkpoints in a folder, in the order of their steps."""
    found = []
    for path in folder.glob(f"checkpoint-*/{STATE}"):
        step = re.fullmatch(r"checkpoint-(\d+)", path.parent.name)
        if step:
            found.append((int(step[1]), path))
    return [path for _, path in sorted(found)]


def _no_run(folder: Path) -> str:
    text = f"{folder} is no run directory: it holds neither {METRICS} nor {CONFIG} nor checkpoints of a trainer"
    inside = sorted(path.parent for path in folder.glob(f"*/{METRICS}"))
    inside = inside or sorted(path.parent for path in folder.glob(f"*/*/*/{METRICS}"))  # those of gac compare
    return f"{text}; name a run in it, such as {inside[0]}" if inside else text

"""The study's data: one JSON line a run in PHASE.jsonl, which a kill at any moment leaves readable."""

import json
import math
import os
from pathlib import Path
from typing import Any

from benchmarks.study import UsageError


def read_records(folder: Path) -> list[dict[str, Any]]:
    """Records of every ``*.jsonl`` in `folder` (none where there is no folder), one for each key: the last written.

    A last line without its newline was cut short by a kill and is left out. Any other line that is no record is an
    error, which names file and line.
    """
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob("*.jsonl")):
        for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
            try:
                record = json.loads(line)
                found[record["key"]] = record
            except (ValueError, KeyError, TypeError):
                raise UsageError(
                    f"{path}, line {number}: not a record (JSON with a 'key'); repair or delete it"
                ) from None
    return list(found.values())


def append(path: Path, record: dict[str, Any]) -> None:
    """Adds `record` as one line, which is on the disk when this returns. Only one process may write to `path`.

    A line that an earlier process left without its end is dropped. NaN and infinities become null.
    """
    line = json.dumps(finite(record), allow_nan=False).encode() + b"\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    _drop_torn_line(path)
    with path.open("ab", buffering=0) as file:
        file.write(line)
        os.fsync(file.fileno())


def finite(value: Any) -> Any:
    """`value` as JSON holds it: NaN and infinities become None, tuples lists."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value


def _drop_torn_line(path: Path) -> None:
    if not path.exists():
        return
    with path.open("r+b") as file:
        content = file.read()
        if not content.endswith(b"\n"):
            file.truncate(content.rfind(b"\n") + 1)

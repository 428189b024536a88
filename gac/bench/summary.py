"""Puts the results that a GPU run left in a folder into one ``summary.json``: ``python -m gac.bench.summary FOLDER``.

Every part may be missing or cut short; the summary says which, and takes what is there.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from gac.bench.figures import figures
from gac.bench.kernels import describe
from gac.bench.report import write_json

_PARTS = {
    "kernels": "kernels.json",
    "step": "step.json",
    "sequence": "sequence.json",
    "ending": "ending.json",
    "budget": "budget.json",
    "hybrid": "hybrid.json",
    "compiled": "compiled.json",
    "predicted": "predicted.json",
}
_WHOLE = ("ending", "budget", "hybrid", "compiled", "predicted")
"""What the summary holds as it is."""


def _load(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return None


def pytest_counts(log: str) -> dict[str, int]:
    """``{"passed": 12, "failed": 1, ...}`` from a pytest log's last summary line; without one, of its tests so far."""
    lines = [line for line in log.splitlines() if re.search(r"\bin [\d.]+s\b", line)]
    if not lines:
        told = re.findall(r"\b(PASSED|FAILED|ERROR|SKIPPED)\b", log)
        return {name.lower(): told.count(name) for name in dict.fromkeys(told)}
    return {
        name: int(count) for count, name in re.findall(r"(\d+) (passed|failed|errors?|skipped|deselected)", lines[-1])
    }


def exit_codes(log: str) -> dict[str, int]:
    """Exit code of each part from lines ``part NAME exit CODE``; 124 means that its time was up."""
    return {name: int(code) for name, code in re.findall(r"^part (\S+) exit (\d+)", log, re.MULTILINE)}


def summarize(folder: Path) -> dict:
    """The summary of what ``benchmarks/gpu_suite.sh`` left in ``folder``."""
    parts = {name: _load(folder / file) for name, file in _PARTS.items()}
    log = _text(folder / "suite.log")
    merged = dict(parts["kernels"] or parts["step"] or parts["sequence"] or {})
    steps = [result for name in ("step", "sequence") for result in (parts[name] or {}).get("step", [])]
    merged |= {"step": steps, "host": (parts["step"] or {}).get("host", {})}
    rows = (parts["kernels"] or {}).get("kernels", [])
    told = ("model", "tokens", "estimator", "intervals", "launches", "synchronizations")
    ended = exit_codes(log)
    return {
        "facts": merged.get("facts"),
        "parts": {name: {"found": part is not None, "complete": _is_complete(name, part, ended)}
                  for name, part in parts.items() if name != "predicted"},
        **{name: parts[name] for name in _WHOLE},
        "exit_codes": ended,
        "tests": pytest_counts(_text(folder / "tests.log")),
        "red_gates": [describe(row) for row in rows if not row.get("gate", {"ok": True})["ok"]],
        "cases": sum("variants" in row for row in rows),
        "left_out": [f"{describe(row)}: {row['note']}" for row in rows if "variants" not in row],
        "figures": [vars(figure) for figure in figures(merged)],
        "steps": [
            {key: result.get(key) for key in told} for result in merged["step"]
        ],
    }  # fmt: skip


def _is_complete(name: str, part: dict | list | None, ended: dict[str, int]) -> bool:
    """Whether a part went on to its end: most say so themselves, others by having ended well."""
    return part is not None and ("seconds" in part or (name in _WHOLE and ended.get(name) == 0))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def main(argv: list[str]) -> int:
    """Writes ``summary.json`` and prints the figures."""
    if len(argv) != 1:
        print("usage: python -m gac.bench.summary FOLDER", file=sys.stderr)
        return 2
    folder = Path(argv[0])
    summary = summarize(folder)
    write_json(folder / "summary.json", summary)
    for figure in summary["figures"]:
        print(f"{'ok ' if figure['ok'] else 'NO '} {figure['name']}: {figure['value']} ({figure['target']})")
    print(f"exit codes {summary['exit_codes']}, tests {summary['tests']}, red gates {summary['red_gates'] or 'none'}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

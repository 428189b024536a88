"""What ``gac train`` pays for measuring, and reaches, under the default budget and with every step measured.

    python -m benchmarks.budget_runs --seeds 0 1 2 3 4 --json benchmarks/results/budget_runs.json

Two runs a seed, one after the other, in an order that changes from seed to seed: the default run of ``make train`` and
the same with ``--interval 1``. The share is that of all the time of the steps from the sixth (or eleventh: the first
ten are always measured) on that was spent in GAC's code. Rows are written as soon as a run is done, and those that are
there are not made again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ARMS = {"budget": [], "every step": ["--interval", "1"]}
"""What is compared, as options of ``gac train``."""


def share(records: list[dict[str, Any]], first: int) -> float:
    """Part of the time of the steps from number ``first`` (from 1) on that was spent in GAC's code."""
    late = [record for record in records if record["step"] >= first]
    return sum(record["gac/seconds"] for record in late) / sum(record["seconds"] for record in late)


def one_run(arm: str, seed: int, folder: Path, extra: list[str]) -> dict[str, Any]:
    """The row of one run."""
    from gac.runs.folder import METRICS, SUMMARY, read_json, read_metrics

    out = folder / f"{arm.replace(' ', '-')}-{seed}"
    command = [sys.executable, "-m", "gac.cli", "train", "--seed", str(seed), "--out", str(out), *ARMS[arm], *extra]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    records, summary = read_metrics(out / METRICS), read_json(out / SUMMARY)
    kept = ("warm_start_accuracy", "final_accuracy", "last_four_accuracy", "mean_mu", "seconds", "gac_share")
    return {
        "arm": arm,
        "seed": seed,
        "options": ARMS[arm] + extra,
        "steps": len(records),
        "measured": sum(record["gac/n_s"] > 0 or record["gac/n_r"] > 0 for record in records),
        "share_from_6": share(records, 6),
        "share_from_11": share(records, 11),
        **{name: summary[name] for name in kept},
    }


def differences(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Accuracy, and mean ``mu``, under the budget less those with every step measured, paired by seed, with errors."""
    found: dict[str, Any] = {}
    by = {(row["arm"], row["seed"]): row for row in rows}
    seeds = sorted({seed for _, seed in by if all((arm, seed) in by for arm in ARMS)})
    for name in ("final_accuracy", "last_four_accuracy", "mean_mu"):
        pairs = [by["budget", seed][name] - by["every step", seed][name] for seed in seeds]
        if len(pairs) > 1:
            error = statistics.stdev(pairs) / len(pairs) ** 0.5
            found[name] = {"mean": statistics.mean(pairs), "standard_error": error, "of_each_seed": pairs}
    return found


def main() -> None:
    """Makes the runs that are missing."""
    import torch

    from gac.bench.facts import collect

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--train", nargs=argparse.REMAINDER, default=[], help="further options of gac train, last")
    arguments = parser.parse_args()
    rows = json.loads(arguments.json.read_text())["rows"] if arguments.json.exists() else []
    with tempfile.TemporaryDirectory() as folder:
        for number, seed in enumerate(arguments.seeds):
            for arm in list(ARMS)[:: 1 if number % 2 == 0 else -1]:
                if any(row["arm"] == arm and row["seed"] == seed for row in rows):
                    continue
                rows.append(one_run(arm, seed, Path(folder), arguments.train))
                print(json.dumps(rows[-1]), flush=True)
                found = {
                    "facts": collect(torch.device("cpu")),
                    "rows": rows,
                    "budget_less_every_step": differences(rows),
                }
                arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

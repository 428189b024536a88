"""The share of measuring under the default budget, for models of any size and steps of any length.

    python -m benchmarks.overhead            # about 10 minutes; writes benchmarks/results/overhead.json
    python -m benchmarks.overhead --quick    # the short steps alone

Each case is a plain loop with two micro-batches a branch; where a step is to be longer than its arithmetic, the loop
sleeps, as one does that waits for rollouts. The share is that of the mixer's own account (`metrics()["overhead"]`) over
the steps after the fiftieth, beside the seconds that all of GAC's code took in them by the same clock, and how many of
the steps were measured. In the last two cases steps become ten times shorter or longer half way.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

import gac

RESULTS = Path(__file__).parent / "results" / "overhead.json"
BUDGET = 0.01
FIRST = 50
"""Steps that are not looked at."""

CASES: dict[str, dict[str, Any]] = {
    "10K, 1 ms": {"width": 56, "layers": 3, "rows": 4, "seconds": 0.0, "steps": 3000},
    "10K, 20 ms": {"width": 56, "layers": 3, "rows": 4, "seconds": 0.02, "steps": 1500},
    "100K, 5 ms": {"width": 128, "layers": 6, "rows": 32, "seconds": 0.005, "steps": 2000},
    "1M, 50 ms": {"width": 360, "layers": 8, "rows": 64, "seconds": 0.05, "steps": 500},
    "10M, 300 ms": {"width": 1000, "layers": 10, "rows": 64, "seconds": 0.3, "steps": 200},
    "30M, 2 s": {"width": 1700, "layers": 10, "rows": 128, "seconds": 2.0, "steps": 80},
    "100K, 50 ms, then 5 ms": {"width": 128, "layers": 6, "rows": 8, "seconds": 0.05, "then": 0.005, "steps": 2000},
    "100K, 5 ms, then 50 ms": {"width": 128, "layers": 6, "rows": 8, "seconds": 0.005, "then": 0.05, "steps": 1500},
}
QUICK = ("10K, 1 ms", "10K, 20 ms", "100K, 5 ms", "100K, 50 ms, then 5 ms")


def model_of(width: int, layers: int) -> nn.Module:
    """A perceptron with so many square layers."""
    parts = [part for _ in range(layers) for part in (nn.Linear(width, width), nn.Tanh())]
    return nn.Sequential(*parts)


def run(*, width: int, layers: int, rows: int, seconds: float, steps: int, then: float | None = None) -> dict[str, Any]:
    """One case: steps that take at least ``seconds``, from half way on at least ``then``."""
    torch.manual_seed(0)
    model = model_of(width, layers)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    batches = [torch.randn(rows, width) for _ in range(4)]
    taken, inside, measured = [], [], []
    with gac.patch(model) as mixer:
        for step in range(steps):
            start = time.perf_counter()
            for branch, some in ((mixer.sft, batches[:2]), (mixer.rl, batches[2:])):
                with branch():
                    for batch in some:
                        mixer.backward(model(batch).square().mean())
            wanted = then if then is not None and step >= steps // 2 else seconds
            time.sleep(max(wanted - (time.perf_counter() - start), 0.0))
            optimizer.step()
            mixer.step()
            optimizer.zero_grad()
            taken.append(time.perf_counter() - start)
            account = mixer._measurement.spending.account
            inside.append(account.total)
            measured.append(mixer._measurement.spending.cadence.measurements)
        late = mixer.metrics()["overhead"]
    gac_seconds = inside[-1] - inside[FIRST - 1]
    whole = sum(taken[FIRST:])
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": steps,
        "median_step_seconds": sorted(taken[FIRST:])[(steps - FIRST) // 2],
        "share": gac_seconds / (whole - gac_seconds),
        "share_of_late": late,
        "measured": (measured[-1] - measured[FIRST - 1]) / (steps - FIRST),
        "interval": mixer.interval,
    }


def main(argv: list[str] | None = None) -> int:
    """Runs the cases and writes what they came to; 1 where a share is above the budget."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the cases with short steps alone; writes nothing")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    found = {}
    for name in QUICK if options.quick else CASES:
        found[name] = run(**CASES[name])
        row = found[name]
        print(
            f"{name:24} {row['parameters']:>10,} parameters  step {1e3 * row['median_step_seconds']:8.2f} ms  share "
            f"{100 * row['share']:.2f}%  measured {100 * row['measured']:.1f}% of the steps",
            flush=True,
        )
    if not options.quick:
        about = {"torch": torch.__version__, "python": platform.python_version(), "machine": platform.machine()}
        RESULTS.write_text(json.dumps({"budget": BUDGET, "about": about, "cases": found}, indent=1) + "\n")
    return int(any(row["share"] > BUDGET for row in found.values()))


if __name__ == "__main__":
    raise SystemExit(main())

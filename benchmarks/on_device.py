"""What training pays for GAC on a device, beyond single steps: the budget, a compiled model, the hybrid trainer.

    python -m benchmarks.on_device budget --out FILE     # the default budget, 0.1B and 1B at 1k, 8k and 32k tokens
    python -m benchmarks.on_device compiled --out FILE   # 0.1B through torch.compile, every step measured
    python -m benchmarks.on_device hybrid --out FILE     # a short `gac train` on the device; needs TRL

Each writes what it has after every case, so that a run that is cut short leaves the cases before. ``--device cpu`` goes
through the same with a tiny model and a few tokens. Beside what is measured stands :data:`PREDICTED`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from time import monotonic, perf_counter
from typing import Any

import torch

import gac
from gac.bench.report import write_json
from gac.bench.step import StepOptions, Trainer
from gac.bench.timing import quantile
from gac.plan.shapes import MODELS, LlamaShape

PREDICTED: dict[str, dict[str, float]] = {
    "budget 0.1B 1024": {"share": 0.009, "measured": 0.25},
    "budget 0.1B 8192": {"share": 0.005, "measured": 1.0},
    "budget 1B 1024": {"share": 0.009, "measured": 0.5},
    "budget 1B 8192": {"share": 0.006, "measured": 1.0},
    "budget 0.1B 32768": {"share": 0.004, "measured": 1.0},
    "budget 1B 32768": {"share": 0.002, "measured": 1.0},
    "compiled 0.1B 8192": {"share": 0.009, "measured": 1.0},
    "hybrid": {"share": 0.009},
}
"""Before any GPU ran it: shares of GAC, and of the steps those that are measured.

From the steps of the run in ``results/h100`` and what a measured step takes there now: 0.3 ms of the host for the end
(``gac.bench.ending``), 40 us for each of four passes, and the kernels' device time, 0.09 ms a pass for 0.1B and 0.84 ms
for 1B. A step of 0.1B took 0.1 s of the host at 1,024 tokens, where the budget counts the host; the device's time
counts where that is longer.
"""

CASES = [("0.1B", 1024), ("1B", 1024), ("0.1B", 8192), ("0.1B", 32768), ("1B", 8192), ("1B", 32768)]
"""Models and tokens of a micro-batch, what takes longest last."""

TINY = LlamaShape("tiny", 96, 32, 64, 2, 4, 4, 8, tied=True)
"""What a CPU goes through the same with."""

SETTLED = 12
"""Steps after which a share counts: the first ten are always measured."""


def trainer_of(model: str, tokens: int, device: torch.device, *, compiled: bool = False) -> Trainer:
    """A model, its optimizer and fixed batches, in bf16 on a GPU."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    trainer = Trainer(StepOptions((MODELS | {TINY.name: TINY})[model], device, dtype, tokens))
    if compiled:
        trainer.model.compile()
    return trainer


def shares(trainer: Trainer, seconds: float, fewest: int = 32, **options: Any) -> dict[str, Any]:
    """A run of steps with GAC between two without; what they take and what the mixer says of it.

    Steps without it do not come in between: the budget would take their time for that of the steps it pays for.

    Args:
        seconds: to spend, about. fewest: steps with GAC. options: of :func:`gac.patch`.
    """
    mixed: list[float] = []
    trainer.plain()
    plain = [_block(trainer, trainer.plain) for _ in range(fewest // 4)]
    deadline = monotonic() + seconds
    with gac.patch(trainer.model, **options) as mixer:
        cadence, before = mixer._measurement.spending.cadence, 0
        while len(mixed) < fewest or monotonic() < deadline:
            mixed.append(_block(trainer, lambda: trainer.mixed(mixer)))
            if len(mixed) == SETTLED:
                before = cadence.measurements
        measured = (cadence.measurements - before) / (len(mixed) - SETTLED)
        told = mixer.metrics(wait=True)
        found = {"estimator": mixer.estimator, "interval": mixer.interval, "share": told["overhead"]}
    plain += [_block(trainer, trainer.plain) for _ in range(fewest // 4)]
    usual, late = quantile(plain, 0.5), quantile(mixed[SETTLED:], 0.5)
    return found | {
        "steps": len(mixed),
        "measured": measured,
        "seconds_plain": usual,
        "seconds_mixed": late,
        "whole_step": sum(mixed[SETTLED:]) / len(mixed[SETTLED:]) / usual - 1.0,
        "noise": (quantile(plain, 0.8) - quantile(plain, 0.2)) / usual,
    }


def _block(trainer: Trainer, step: Any) -> float:
    """Seconds of one step, from an idle device to an idle device."""
    trainer.synchronize()
    start = perf_counter()
    step()
    trainer.synchronize()
    return perf_counter() - start


def budget(device: torch.device, seconds: float, fewest: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """The default options of :func:`gac.patch`."""
    for model, tokens in CASES if device.type == "cuda" else [(TINY.name, 16)]:
        yield f"budget {model} {tokens}", shares(trainer_of(model, tokens, device), seconds, fewest)


def compiled(device: torch.device, seconds: float, fewest: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every step of a compiled model is measured."""
    model, tokens = ("0.1B", 8192) if device.type == "cuda" else (TINY.name, 16)
    trainer = trainer_of(model, tokens, device, compiled=True)
    yield f"compiled {model} {tokens}", shares(trainer, seconds, fewest, interval=1)


def hybrid(device: torch.device, seconds: float, fewest: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """A short hybrid GRPO run by ``gac train``, as its own process; where TRL is not installed it says so."""
    if find_spec("trl") is None:
        yield "hybrid", {"left_out": "TRL is not installed"}
        return
    sizes = {"--steps": "60", "--warm-start-steps": "100", "--heldout": "64"}
    if device.type == "cpu":
        sizes = {"--steps": "2", "--warm-start-steps": "1", "--heldout": "4", "--prompts": "32"}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        command = [sys.executable, "-m", "gac.cli", "train", "--device", device.type, "--out", str(out)]
        command += [word for option in sizes.items() for word in option]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=240.0)
        if ended.returncode:
            yield "hybrid", {"failed": ended.stderr[-2000:]}
            return
        summary = json.loads((out / "summary.json").read_text())
    names = ("parameters", "estimator", "seconds_per_step", "gac_share", "final_accuracy", "mean_mu", "seconds")
    yield "hybrid", {name: summary[name] for name in names}


PARTS = {"budget": budget, "compiled": compiled, "hybrid": hybrid}


def main(argv: list[str] | None = None) -> int:
    """Runs a part; 1 where it failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument("--seconds", type=float, default=8.0, help="for each case, about")
    parser.add_argument("--fewest", type=int, default=32, help="steps with GAC of each case, at least")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(argv)
    found: dict[str, Any] = {}
    for name, case in PARTS[options.part](options.device, options.seconds, options.fewest):
        found[name] = case | {"predicted": PREDICTED.get(name)}
        write_json(options.out, found)
        print(name, json.dumps(case), flush=True)
    return int(any("failed" in case for case in found.values()))


if __name__ == "__main__":
    raise SystemExit(main())

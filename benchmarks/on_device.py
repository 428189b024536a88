"""What training pays for GAC on a device, beyond single steps: the budget, a compiled model, the hybrid trainer.

    python -m benchmarks.on_device budget --out FILE     # the default budget, 0.1B and 1B at 1k, 8k and 32k tokens
    python -m benchmarks.on_device compiled --out FILE   # 0.1B and 1B, their layers compiled, every step measured
    python -m benchmarks.on_device hybrid --out FILE     # a short `gac train` on the device; needs TRL

Each writes what it has after every case, so that a run that is cut short leaves the cases before. ``--device cpu`` goes
through the same with a tiny model and a few tokens. What was predicted stands in :mod:`benchmarks.predictions`.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from time import monotonic, perf_counter
from typing import Any, NamedTuple

import torch

import gac
from gac.bench.report import write_json
from gac.bench.step import StepOptions, Trainer
from gac.bench.timing import quantile
from gac.plan.shapes import MODELS, LlamaShape

STARTED = monotonic()


class Case(NamedTuple):
    """A model, tokens of a micro-batch, and what a plain step of it takes on an H100, for planning alone.

    Seconds at 1,024 and 8,192 tokens are those of ``results/h100``; at 32,768 the arithmetic of 1B at the speed that it
    had at 8,192 there, a third more for its checkpoints, and half of that speed for 0.1B.
    """

    model: str
    tokens: int
    seconds: float


BUDGET = (
    Case("0.1B", 8192, 0.40),
    Case("1B", 1024, 0.47),
    Case("1B", 8192, 0.76),
    Case("0.1B", 1024, 0.43),
    Case("0.1B", 32768, 0.70),
    Case("1B", 32768, 4.0),
)
"""What is asked for first, what takes longest last."""

COMPILED = (Case("0.1B", 8192, 0.40), Case("1B", 8192, 0.76))

TINY = LlamaShape("tiny", 96, 32, 64, 2, 4, 4, 8, tied=True)
"""What a CPU goes through the same with."""

ON_A_CPU = (Case(TINY.name, 16, 0.02),)

LOADING, PREPARING, COMPILING = 12.0, 2.5, 10.0
"""Seconds until the first case begins, of each until its first step, and of compiled layers: for planning alone."""

SETTLED = 12
"""Steps after which a share under the budget counts: the first ten are always measured."""

COLD = 3
"""Measured steps that do not count in what one costs: kernels are compiled, tables are made."""

FEWEST, MOST = 14, 20
"""Steps with GAC: the ten, and what tells how far apart the measurements are that follow them."""

LONG, FEW = 1.0, 5
"""Where a step takes more seconds, or none is left out, so few steps do: two count in what a measured step costs, and
three reports have come in of those by which the budget goes. It decides nothing in them."""


def how_many(step: float, seconds: float, fewest: int = FEWEST) -> tuple[int, int]:
    """Steps with GAC, and plain ones before them and again after them, where one takes ``step`` of ``seconds``."""
    mixed = min(max(int(0.8 * seconds / step), FEW if step > LONG else fewest), MOST)
    return mixed, max(mixed // 10, 1)


def planned(case: Case, seconds: float, *, compiled: bool = False) -> float:
    """Seconds that a case takes on an H100, about; :data:`LOADING` comes before the first."""
    mixed, plain = how_many(case.seconds, seconds, FEW if compiled else FEWEST)
    return PREPARING + COMPILING * compiled + (1 + 2 * plain + mixed) * case.seconds


def trainer_of(case: Case, device: torch.device, *, compiled: bool = False) -> Trainer:
    """A model, its optimizer and fixed batches, in bf16 on a GPU.

    Args:
        compiled: layer by layer. They are one graph, so that it takes seconds where the whole model takes minutes.
    """
    gc.collect()  # the model before
    if device.type == "cuda":
        torch.cuda.empty_cache()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    trainer = Trainer(StepOptions((MODELS | {TINY.name: TINY})[case.model], device, dtype, case.tokens))
    if compiled:
        for layer in trainer.model.model.layers:
            layer.compile(backend="inductor" if device.type == "cuda" else "aot_eager")
    return trainer


def shares(trainer: Trainer, seconds: float, fewest: int = FEWEST, **options: Any) -> dict[str, Any]:
    """A run of steps with GAC between two without; what they take and what the mixer says of it.

    Steps without it do not come in between: the budget would take their time for that of the steps it pays for.

    Args:
        seconds: to spend, about, on ``fewest`` steps or more; :func:`how_many`. options: of :func:`gac.patch`.

    Returns:
        ``host``: seconds in GAC of a measured step after the first three; ``host_share``: over a plain step.
        ``measured``: how many of the steps after the first twelve, null where so few were made. ``costs``: seconds of a
        measured step, of one that is not, and of a step outside GAC, by which the budget decides, with the kernels'
        time where that is longer. ``share``: the mixer's own, which counts after ten measurements; before, what the
        costs come to at the present interval.
    """
    trainer.plain()
    step = _block(trainer, trainer.plain)
    steps, around = how_many(step, seconds, fewest)
    plain = [step, *(_block(trainer, trainer.plain) for _ in range(around - 1))]
    mixed: list[float] = []
    host: list[float] = []
    with gac.patch(trainer.model, **options) as mixer:
        cadence, before = mixer._measurement.spending.cadence, 0
        while len(mixed) < steps:
            mixed.append(_block(trainer, lambda: trainer.mixed(mixer)))
            if len(mixed) == SETTLED:
                before = cadence.measurements
            if COLD < len(mixed) == cadence.measurements:  # a look at the numbers in between would cost later ones
                host.append(mixer.metrics(wait=True)["seconds"])
        found = {"estimator": mixer.estimator, "interval": mixer.interval, "steps": len(mixed)}
        told = mixer.metrics(wait=True)["overhead"]
        settled = len(mixed) > SETTLED
        found["measured"] = (cadence.measurements - before) / (len(mixed) - SETTLED) if settled else None
        by_costs = None
        if cadence.counts_costs:
            costs = {name: cadence._usual(name) for name in ("measured", "unmeasured", "rest")}
            inside = (costs["measured"] + (mixer.interval - 1) * costs["unmeasured"]) / mixer.interval
            by_costs = inside / costs["rest"] if costs["rest"] else None
            found["costs"] = costs
        found["share"] = told if settled and not math.isnan(told) else by_costs
    plain += [_block(trainer, trainer.plain) for _ in range(around)]
    usual, late = quantile(plain, 0.5), quantile(mixed[COLD:], 0.5)
    return found | {
        "host": quantile(host, 0.5),
        "host_share": quantile(host, 0.5) / usual,
        "seconds_plain": usual,
        "seconds_mixed": late,
        "whole_step": late / usual - 1.0,
        "noise": (quantile(plain, 0.8) - quantile(plain, 0.2)) / usual,
    }


def _block(trainer: Trainer, step: Any) -> float:
    """Seconds of one step, from an idle device to an idle device."""
    trainer.synchronize()
    start = perf_counter()
    step()
    trainer.synchronize()
    return perf_counter() - start


def _each(
    cases: tuple[Case, ...],
    device: torch.device,
    seconds: float,
    limit: float,
    *,
    compiled: bool = False,
    **options: Any,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name of a case and its :func:`shares`, or why it is left out: no time, or no memory."""
    for case in cases if device.type == "cuda" else ON_A_CPU:
        name, needed = f"{case.model} {case.tokens}", planned(case, seconds, compiled=compiled)
        if LOADING + monotonic() - STARTED + needed > limit:
            yield name, {"left_out": f"some {needed:.0f} s were needed"}
            continue
        try:
            trainer = trainer_of(case, device, compiled=compiled)
            yield name, shares(trainer, seconds, FEW if compiled else FEWEST, **options)
            del trainer
        except torch.OutOfMemoryError as error:
            yield name, {"left_out": str(error).splitlines()[0]}


def budget(device: torch.device, seconds: float, limit: float) -> Iterator[tuple[str, dict[str, Any]]]:
    """The default options of :func:`gac.patch`."""
    yield from _each(BUDGET, device, seconds, limit)


def compiled(device: torch.device, seconds: float, limit: float) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every step of a model of compiled layers is measured."""
    for name, found in _each(COMPILED, device, seconds, limit, compiled=True, interval=1):
        yield name, found | {"graphs": torch._dynamo.utils.counters["stats"]["unique_graphs"]}


def hybrid(device: torch.device, seconds: float, limit: float) -> Iterator[tuple[str, dict[str, Any]]]:
    """A short hybrid GRPO run by ``gac train``, as its own process; where TRL is not installed it says so."""
    missing = [name for name in ("trl", "datasets", "reasoning_gym") if find_spec(name) is None]
    if missing:
        yield "hybrid", {"left_out": f"not installed: {', '.join(missing)}"}
        return
    sizes = {"--steps": "20", "--warm-start-steps": "40", "--heldout": "32"}
    if device.type == "cpu":
        sizes = {"--steps": "2", "--warm-start-steps": "1", "--heldout": "4", "--prompts": "32"}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        command = [sys.executable, "-m", "gac.cli", "train", "--device", device.type, "--out", str(out)]
        command += [word for option in sizes.items() for word in option]
        try:
            ended = subprocess.run(command, capture_output=True, text=True, timeout=limit)
        except subprocess.TimeoutExpired as late:
            output = late.stderr or b""
            text = output if isinstance(output, str) else output.decode(errors="replace")
            yield "hybrid", {"failed": f"not done after {limit:.0f} s", "said": text[-2000:]}
            return
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
    parser.add_argument("--seconds", type=float, default=7.0, help="for each case, about")
    parser.add_argument("--limit", type=float, default=240.0, help="no case begins that would end so many seconds on")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(argv)
    found: dict[str, Any] = {}
    for name, case in PARTS[options.part](options.device, options.seconds, options.limit):
        found[name] = case
        write_json(options.out, found)
        print(name, json.dumps(case), flush=True)
    return int(any("failed" in case for case in found.values()))


if __name__ == "__main__":
    raise SystemExit(main())

"""What a GPU should show of the present design, written down before one ran it, and beside it what came out.

    python -m benchmarks.predictions          # writes results/next_prediction.json
    python -m benchmarks.predictions FOLDER   # FOLDER: of gpu_suite.sh; writes FOLDER/predicted.json, and prints it

They are of the machine that ``results/h100`` is of. ``results/h100_prediction.json`` belongs to that run, and
``sequence_prediction.json`` to ``estimator="sequence"``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gac.files import write_whole

RESULTS = Path(__file__).parent / "results"
STEPS = {("0.1B", 1024): 0.43192, ("0.1B", 8192): 0.39922, ("1B", 1024): 0.47499, ("1B", 8192): 0.76141}
"""Seconds of a plain step of four micro-batches by eager transformers in ``results/h100``."""

LONG_STEPS = {("0.1B", 32768): 0.70, ("1B", 32768): 4.0}
"""Nobody measured these; see :class:`benchmarks.on_device.Case`."""

COMPILED_STEPS = {"0.1B": (0.12, 0.25), "1B": (0.60, 0.76)}
"""Of compiled layers at 8,192 tokens: between the arithmetic's time with what the rest costs, and the eager step's."""

TENSORS = {"0.1B": 272, "1B": 146}
PASSES = 4
SLOWER = (1.0, 2.0)
"""How much longer Python takes on that host than here: hooks took as long (2.43 and 2.37 us), calls of ``sketch`` on
one tensor 1.6 times (195 and 122 us, launches in the first)."""

END = (0.2e-3, 0.4e-3)
"""Seconds of the host at the end of a measured step there: about the 0.3 ms of :data:`gac.bench.ending.PREDICTED`."""

CALL = {1: 8.9e-6, 38: 12.7e-6, 100: 19.2e-6, 300: 39.9e-6}
"""Seconds of a repeated call of ``sketch`` by tensors, no launch in it: ``docs/kernels.md``, prepared launches."""

LAUNCHES = (10e-6, 25e-6)
"""Seconds of what such a call has besides on a GPU: two launches by the driver, an allocation."""

UPLOAD = (10e-6, 30e-6)
"""And in training, where addresses change: a copy of them."""

A_PASS, A_TENSOR = 70e-6, 2.05e-6
"""Seconds of GAC's Python in a backward pass here besides the call, and more for each tensor: the least of 60 steps of
1, 146 and 272 tensors, none with a hook of its own, on two cores for which ten processes waited."""

BUSY = (0.6, 1.6)
"""What it takes there over what it took here: an idle machine takes some 0.6 of it (the end of a step by sketch, 730 us
by the median and 485 at least: ``docs/overhead.md``)."""

KERNELS = {"0.1B": 4 * 0.102e-3 + 0.05e-3, "1B": 4 * 0.836e-3 + 0.10e-3}
"""Seconds of the device in GAC's kernels of a measured step: four calls over the whole list, as measured in
``results/h100`` for 1B and as predicted for 0.1B, and the end."""


@dataclass(frozen=True)
class Prediction:
    """One figure.

    Attributes:
        figure: what it is of. unit: of its numbers.
        low, high: the range that is expected. What was to be reached may lie outside.
        how: what that follows from.
        file, keys: where the suite leaves it: a key of an object, or what the wanted one of a list has.
        reach: what was asked for, in words; None where nothing was.
    """

    figure: str
    unit: str
    low: float
    high: float
    how: str
    file: str
    keys: tuple[str | Mapping[str, Any], ...]
    reach: str | None = None

    def found(self, folder: Path) -> float | None:
        """The figure in what the suite left in a folder; None where it is missing."""
        try:
            at: Any = json.loads((folder / self.file).read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError):
            return None
        for key in self.keys:
            if isinstance(key, str):
                at = at.get(key) if isinstance(at, dict) else None
            else:
                at = next((row for row in at or () if all(row.get(k) == v for k, v in key.items())), None)
        return float(at) if isinstance(at, int | float) else None

    def row(self) -> dict[str, Any]:
        """As data."""
        return {
            "figure": self.figure,
            "unit": self.unit,
            "to_reach": self.reach,
            "predicted": [float(f"{self.low:.3g}"), float(f"{self.high:.3g}")],
            "how": self.how,
        }


def predictions() -> Iterator[Prediction]:
    """All of them, those that were asked for first."""
    yield share("0.1B", 8192, "under 0.5%")
    yield share("1B", 1024, "under 1.5%")
    yield budget("1B", 1024, STEPS["1B", 1024], "under 1%")
    yield Prediction(
        "sketch, bf16, 0.1B list, of the read limit",
        "%",
        85.0,
        88.0,
        "1.96 waves of programs in place of 2.13 take 11 of the 26 us that a call was above the limit of 85; two "
        "launches, the ramp and the second stage, 8 to 12 us, stay: 90% is not expected",
        "kernels.json",
        ("kernels", {"operation": "sketch", "dtype": "bf16", "label": "0.1B"}, "percent_of_read"),
        "90%",
    )
    yield from ends()
    for tensors, here in CALL.items():
        low, high = (SLOWER[i] * here + LAUNCHES[i] for i in range(2))
        how = f"{1e6 * here:.1f} us here with a driver that launches nothing, times 1 to 2, launches and an allocation"
        reach = "at most 80 us" if tensors == 100 else None
        name = f"a repeated call of sketch, {tensors} tensors, host"
        yield Prediction(name, "s", low, high, how, "ending.json", ("calls", str(tensors)), reach)

    yield share("0.1B", 1024)
    yield share("1B", 8192)
    for (model, tokens), step in (STEPS | LONG_STEPS).items():
        if (model, tokens) != ("1B", 1024):
            yield budget(model, tokens, step)
    for model, (fast, slow) in COMPILED_STEPS.items():
        low, high = host(model)
        how = f"{1e3 * low:.1f} to {1e3 * high:.1f} ms of the host, steps of {1e3 * fast:.0f} to {1e3 * slow:.0f} ms"
        name = f"host time in GAC, {model}, 8192 tokens a micro-batch, compiled layers, interval 1"
        keys = (f"{model} 8192", "host_share")
        yield Prediction(name, "of a step", low / slow, high / fast, how, "compiled.json", keys)
    yield from whole_steps()
    how = "the budget is 1%; half of the twenty steps are the ten that are always measured"
    name = "a short hybrid GRPO run by gac train, its own account"
    yield Prediction(name, "of a step", 0.002, 0.0105, how, "hybrid.json", ("hybrid", "gac_share"))


def python_of(model: str) -> tuple[float, float]:
    """Seconds of Python in a pass of a model, here: bookkeeping, and the call, in a line with those of :data:`CALL`."""
    tensors = TENSORS[model]
    slope = (CALL[300] - CALL[1]) / 299
    return A_PASS + A_TENSOR * tensors, CALL[1] + slope * (tensors - 1)


def host(model: str) -> tuple[float, float]:
    """Seconds of the host in GAC in a measured step, least and most."""
    books, call = python_of(model)
    low, high = (END[i] + PASSES * (BUSY[i] * books + SLOWER[i] * call + LAUNCHES[i] + UPLOAD[i]) for i in range(2))
    return low, high


def share(model: str, tokens: int, reach: str | None = None) -> Prediction:
    """Host time of an eager model's measured steps."""
    step, (low, high), (books, call) = STEPS[model, tokens], host(model), python_of(model)
    how = (
        f"the end of a step, 0.2 to 0.4 ms, and four passes over {TENSORS[model]} tensors, each {1e6 * books:.0f} us "
        f"of bookkeeping on a busy machine here times 0.6 to 1.6, a call of {1e6 * call:.0f} us times 1 to 2, and 20 "
        f"to 55 us of launches, allocation and upload, over {1e3 * step:.0f} ms of a plain step"
    )
    name = f"host time in GAC, {model}, {tokens} tokens a micro-batch, eager, interval 1"
    keys = (f"{model} {tokens}", "host_share")
    return Prediction(name, "of a step", low / step, high / step, how, "budget.json", keys, reach)


def budget(model: str, tokens: int, step: float, reach: str | None = None) -> Prediction:
    """The mixer's own share under the default budget, which counts the kernels where they take longer than the host."""
    low, high = (min(max(seconds, KERNELS[model]) / step, 0.01) for seconds in host(model))
    how = (
        f"the longer of the host's time and the kernels' {1e3 * KERNELS[model]:.2f} ms, over {1e3 * step:.0f} ms, and "
        "a fifth for what these steps may take; every step is measured where that is below 0.9%"
    )
    name = f"GAC's own account, {model}, {tokens} tokens a micro-batch, the default budget"
    keys = (f"{model} {tokens}", "share")
    return Prediction(name, "of a step", 0.8 * low, min(1.2 * high, 0.01), how, "budget.json", keys, reach)


def ends() -> Iterator[Prediction]:
    """The end of a step: launches and host time."""
    counted = "counted in Triton's interpreter: three programs and two fills; one program where nothing is measured"
    timed = "prepared launches here, 8 to 20 us each with their checks, and the Python around them, times 1 to 2"
    for kind, launches, seconds, reach in (
        ("measured", 5, END, "at most 300 us"),
        ("unmeasured", 1, (50e-6, 110e-6), "at most 60 us"),
    ):
        name, keys = f"end of a step, {kind}, sketch, 100 tensors", ("sketch", kind)
        yield Prediction(
            f"{name}, launches", "", launches, launches, counted, "ending.json", (*keys, "kernels"), "at most 5"
        )
        yield Prediction(f"{name}, host", "s", *seconds, timed, "ending.json", (*keys, "host"), reach)


def whole_steps() -> Iterator[Prediction]:
    """What the profiler and whole steps of 1B at 8,192 tokens show."""
    this = ("step", {"model": "1B", "tokens": 8192})
    how = "two launches in each of four passes, pair_moments, gather and finish; 110 before"
    keys = (*this, "launches", "measured", "gac_kernels")
    yield Prediction("GAC's kernels in a measured step, 1B", "", 11, 11, how, "step.json", keys)
    how = "four calls over the whole list took 3.34 ms in results/h100, in buckets 4.28; the end some 0.1 ms"
    keys = (*this, "launches", "measured", "gac_kernel_seconds")
    yield Prediction("the same, seconds of the device", "s", 3.3e-3, 3.7e-3, how, "step.json", keys)
    how = "those seconds over 761 ms, with a noise of 0.15%"
    keys = (*this, "intervals", "1", "whole_step")
    name = "whole step, 1B, 8192 tokens a micro-batch, interval 1"
    yield Prediction(name, "of a step", 0.003, 0.006, how, "step.json", keys, "at most 0.7%")


def compare(folder: Path) -> list[dict[str, Any]]:
    """Each prediction with what a suite ``found``, null where it did not, and whether that is ``within`` its range."""
    rows = []
    for prediction in predictions():
        value = prediction.found(folder)
        within = None if value is None else prediction.low <= value <= prediction.high
        rows.append(prediction.row() | {"found": value, "within": within})
    return rows


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """As JSON, whole or not at all."""
    write_whole(path, (json.dumps(rows, indent=1) + "\n").encode())


def main(argv: list[str]) -> int:
    """Writes what is predicted, or how a run compares."""
    if not argv:
        write(RESULTS / "next_prediction.json", [prediction.row() for prediction in predictions()])
        return 0
    folder = Path(argv[0])
    rows = compare(folder)
    write(folder / "predicted.json", rows)
    for row in rows:
        if row["found"] is not None:
            low, high = row["predicted"]
            verdict = "ok " if row["within"] else "NO "
            print(f"{verdict} {row['figure']}: {row['found']:.3g} ({low:g} to {high:g} {row['unit']})")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

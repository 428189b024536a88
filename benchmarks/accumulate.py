"""What the exact estimator's reading of one contribution costs: ``python -m benchmarks.accumulate [--out FILE]``.

``accumulate_`` beside what stood in its place, a sketch in the lossless layout (with ``absorb_`` where running sums are
read), on the parameters of the default run of ``gac train`` and on those of 10 M: turn by turn in one run on one thread
(waiting for a second one on a shared machine is what would be measured); medians, and the median of the turns' ratios.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter

import torch

import gac_kernels
from gac.plan import Parameters
from gac_kernels import SketchLayout

TURNS = 41
_D, _LAYERS, _TOKENS = 96, 3, 92
_LAYER = (*[_D * _D] * 4, *[_D] * 5, *[8 * _D // 3 * _D] * 3)
LISTS = {"0.3M, 38 tensors": (_TOKENS * _D, *_LAYER * _LAYERS, _D), "10M": Parameters.of("10M").numels}
"""Elements of each tensor."""


def _seconds(call: Callable[[], object]) -> float:
    start = perf_counter()
    call()
    return perf_counter() - start


def contribution(numels: tuple[int, ...]) -> dict:
    """Both ways to read a contribution, before and after."""
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(n, generator=generator) for n in numels]
    layout = SketchLayout.per_tensor(numels)
    total, previous, current = torch.zeros(3, layout.size)
    into, cells = (torch.zeros(n, dtype=torch.float64) for n in (2, -(-layout.size // 1024)))
    options = {"layout": layout, "regions": list(range(len(numels))), "into": into}
    scale = torch.tensor(2.0)

    def differences() -> None:
        gac_kernels.sketch(gradients, current, **options)
        gac_kernels.absorb_(current, previous, total, scale, into=cells)

    ways = {
        "incoming gradients": (
            lambda: gac_kernels.sketch(gradients, total, scale=scale, accumulate=True, **options),
            lambda: gac_kernels.accumulate_(gradients, total, scale=scale, **options),
        ),
        "running sums": (
            differences,
            lambda: gac_kernels.accumulate_(gradients, total, previous=previous, scale=scale, **options),
        ),
    }
    found = {}
    for name, (before, after) in ways.items():
        times = [(_seconds(before), _seconds(after)) for _ in range(TURNS + 2)][2:]
        found[name] = {
            "before_us": 1e6 * median(b for b, _ in times),
            "after_us": 1e6 * median(a for _, a in times),
            "after_over_before": median(a / b for b, a in times),
        }
    return found


def run() -> dict:
    """Measures every list on one thread."""
    torch.set_num_threads(1)
    results = {name: contribution(tuple(numels)) for name, numels in LISTS.items()}
    return {"turns": TURNS, "torch": torch.__version__, "processor": platform.machine(), "results": results}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="where to write the result, as JSON")
    arguments = parser.parse_args()
    text = json.dumps(run(), indent=1)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n")

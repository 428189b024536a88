"""What the operations cost on a CPU without the compiled library: ``python -m benchmarks.fallback [--out FILE]``.

Each is compared with what one would write in torch for the same numbers, turn by turn in one run; medians of the turns'
ratios. The oracle (:mod:`gac_kernels.reference`) is measured on an eighth of the elements.
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
from torch import Tensor

from gac_kernels import SketchLayout, fallback, reference

ELEMENTS = 1 << 26
TURNS = 9


def _pair_norms(a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    return a.norm(), b.norm(), (a * b).sum()


def _fastest_pair(a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    return torch.linalg.vector_norm(a), torch.linalg.vector_norm(b), torch.dot(a, b)


def _three_norms(a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    return a.norm(), b.norm(), a.norm()


def _seconds(call: Callable[[], object]) -> float:
    start = perf_counter()
    call()
    return perf_counter() - start


def _turns(ours: Callable[[], object], peers: dict[str, Callable[[], object]]) -> dict:
    """Median seconds of ours, and its median ratio to each peer."""
    for call in (ours, *peers.values()):
        call()
    times: dict[str, list[float]] = {name: [] for name in ("ours", *peers)}
    for _ in range(TURNS):
        for name, call in (("ours", ours), *peers.items()):
            times[name].append(_seconds(call))
    ratios = {name: median(o / p for o, p in zip(times["ours"], times[name], strict=True)) for name in peers}
    return {"ms": 1e3 * median(times["ours"]), "ratio_to": ratios}


def run(elements: int = ELEMENTS) -> dict:
    """Measures moments, pair moments, mixing and a sketch of two float32 vectors."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(elements, generator=generator) for _ in range(2))
    few = a[: elements // 8], b[: elements // 8]
    layout = SketchLayout((elements,), 64, seed=1)
    out = torch.empty(layout.size)
    scale = torch.rand(elements // 1024, 1024, generator=generator)
    found = {
        "moments": _turns(
            lambda: fallback.moments(a),
            {"norm and isfinite": lambda: (a.norm(), torch.isfinite(a).all())},
        ),
        "pair_moments": _turns(
            lambda: fallback.pair_moments(a, b),
            {
                "norm, norm, (a * b).sum": lambda: _pair_norms(a, b),
                "three norms": lambda: _three_norms(a, b),
                "vector_norm, vector_norm, dot": lambda: _fastest_pair(a, b),
            },
        ),
        "mix_": _turns(lambda: fallback.mix_(a, b, 0.5), {"mul_, add_": lambda: a.mul_(0.5).add_(b, alpha=0.5)}),
        "sketch": _turns(
            lambda: fallback.sketch(a, out, layout=layout),
            {"times given signs, summed": lambda: (a.view(-1, 64, 1024) * scale.view(-1, 64, 1024)).sum(1)},
        ),
        "pair_moments of the oracle, an eighth of the elements": _turns(
            lambda: reference.pair_moments(*few), {"fallback, the same elements": lambda: fallback.pair_moments(*few)}
        ),
    }
    exact = [float((x.double() * y.double()).sum()) for x, y in ((a, a), (b, b), (a, b))]
    got = fallback.pair_moments(a, b).tolist()
    errors = [abs(g - e) / max(exact[:2]) for g, e in zip(got, exact, strict=True)]
    return {
        "elements": elements,
        "turns": TURNS,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "processor": platform.processor() or platform.machine(),
        "operations": found,
        "pair_moments_relative_error": errors,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="where to write the result as JSON")
    parser.add_argument("--elements", type=int, default=ELEMENTS)
    options = parser.parse_args()
    text = json.dumps(run(options.elements), indent=1) + "\n"
    print(text, end="")
    if options.out:
        options.out.write_text(text)

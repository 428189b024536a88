"""What a GPU should show, from byte counts and launch counts alone, to be put beside measurements.

``python -m gac.bench.prediction > benchmarks/results/h100_prediction.json`` writes it for an H100. Assumptions, each to
be checked by the suite: kernels read at ``READ`` bytes a second (90% of 3.35 TB/s); a dependent launch costs ``GAP``
seconds of device time; a training step runs at ``COMPUTE`` operations a second, six for each parameter and token.
Whole steps are those of :mod:`gac.plan`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys

from gac.observe.ledger import sketch_size
from gac.plan import DEVICES, Parameters, Setup, make_plan, workspace_bytes
from gac.plan.shapes import MODELS
from gac_kernels import SketchLayout

READ = 3.0e12
GAP = 3e-6
COMPUTE = 4e14
_BF16 = 2
_DEVICE = dataclasses.replace(
    DEVICES["h100"], bandwidth=READ, flops=COMPUTE, read_efficiency=1.0, compute_efficiency=1.0, gap=GAP
)


def operations(name: str) -> list[dict]:
    """Bytes, launches and seconds of each list operation on a model's bf16 parameter list."""
    numels = [math.prod(shape) for shape in MODELS[name].shapes()]
    total = sum(numels)
    layout = SketchLayout.per_tensor(numels, size=sketch_size(total))
    partials = workspace_bytes(numels, layout)
    counted = {
        "moments": (_BF16 * total, 2),
        "sketch": (_BF16 * total + partials + 4 * layout.size, 2),
        "pair_moments": (2 * _BF16 * total, 2),
        "mix_": (3 * _BF16 * total, 1),
    }
    return [
        {
            "model": name,
            "operation": operation,
            "bytes": moved,
            "launches": launches,
            "seconds": moved / READ + GAP * launches,
        }
        for operation, (moved, launches) in counted.items()
    ]


def step(name: str, tokens: int, micro_batches: int = 4) -> dict:
    """One optimizer step of so many backward passes: the model's time, GAC's, and the share at intervals 1 and 10."""
    setup = Setup(Parameters.of(name), _DEVICE, tokens=tokens, micro_batches=micro_batches // 2, estimator="sketch")
    found = make_plan(setup)
    return {
        "model": name,
        "tokens": tokens,
        "micro_batches": micro_batches,
        "step_seconds": found.step_seconds,
        "gac_seconds": found.gac_seconds,
        "launches_per_backward": found.launches_per_backward,
        "share_interval_1": found.share,
        "share_interval_10": found.share / 10,
        "sketch_bytes_share": found.sketch_share,
    }


def predict() -> dict:
    """All predictions."""
    return {
        "assumptions": {"read_bytes_per_second": READ, "seconds_per_launch": GAP, "operations_per_second": COMPUTE},
        "operations": [row for name in ("0.1B", "1B", "8B") for row in operations(name)],
        "steps": [step(name, tokens) for name in ("0.1B", "1B") for tokens in (1024, 8192, 32768)],
    }


if __name__ == "__main__":
    json.dump(predict(), sys.stdout, indent=1)
    print()

"""What a GPU should show, from byte counts and launch counts alone, to be put beside measurements.

``python -m gac.bench.prediction > benchmarks/results/h100_prediction.json`` writes it for an H100. Assumptions, each to
be checked by the suite: kernels read at ``READ`` bytes a second (90% of 3.35 TB/s); a dependent launch costs ``GAP``
seconds of device time; a training step runs at ``COMPUTE`` operations a second, six for each parameter and token.
Whole steps are those of :mod:`gac.plan`.

``python -m gac.bench.prediction --sequences > benchmarks/results/sequence_prediction.json`` writes it for
``estimator="sequence"`` and its kernel, on an H100 and an H200.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys

from gac.bench.kronecker import SKETCH, TOKENS, sides_of
from gac.observe.ledger import sketch_size
from gac.plan import DEVICES, Device, Parameters, Setup, make_plan, workspace_bytes
from gac.plan.sequences import LAYER_LAUNCHES, NORM_BYTES, TOKENS_OF_A_PROGRAM
from gac.plan.shapes import MODELS
from gac_kernels import SketchLayout

READ = 3.0e12
GAP = 3e-6
COMPUTE = 4e14
_BF16 = 2
_SEQUENCE = 1024
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


def block(name: str, read: float) -> dict:
    """``kronecker_sketch`` on the layers of one block, bf16: what ``gac bench`` times."""
    shape, tokens = MODELS[name], TOKENS["cuda"]
    own = Parameters.of_shapes(name, [side for side in shape.layer() if len(side) == 2])
    activations = _BF16 * tokens * sum(sum(sides) for sides in sides_of(shape))
    launches = LAYER_LAUNCHES * len(own.numels)
    rows = tokens // _SEQUENCE
    sums = len(own.numels) * 4 * SKETCH * SKETCH * (2 * rows + 2 * (tokens // TOKENS_OF_A_PROGRAM + rows))
    seconds = (activations + sums) / read + GAP * launches
    return {
        "model": name,
        "tokens": tokens,
        "bytes": activations,
        "launches": launches,
        "seconds": seconds,
        "of_the_read_limit": activations / read / seconds,
    }


def sequence_step(name: str, device: Device) -> dict:
    """A step of 4 backward passes of 8 sequences of 1,024 tokens, measured by sequence: what ``gpu_suite.sh`` times."""
    setup = Setup(Parameters.of(name), device, tokens=8192, micro_batches=2, estimator="sequence", length=_SEQUENCE)
    found = make_plan(setup)
    norms = NORM_BYTES * setup.tokens * sum(n for n, r in zip(*_lists(setup), strict=True) if n == r)
    return {
        "model": name,
        "step_seconds": found.step_seconds,
        "gac_seconds": found.gac_seconds,
        "read_bytes_per_backward": found.read_bytes_per_backward,
        "norm_bytes_per_backward": norms,
        "launches_per_backward": found.launches_per_backward,
        "share_interval_1": found.share,
        "share_interval_10": found.share / 10,
        "interval_of_the_default_budget": math.ceil(found.share / 0.01),
        "sketch_bytes": found.sketch_bytes,
    }


def _lists(setup: Setup) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return setup.parameters.numels, setup.parameters.rows


def predict_sequences() -> dict:
    """For both devices."""
    found = {}
    for name, read in (("h100", READ), ("h200", 4.3e12)):
        device = dataclasses.replace(_DEVICE, name=name, bandwidth=read)
        found[name] = {
            "assumptions": {"read_bytes_per_second": read, "seconds_per_launch": GAP, "operations_per_second": COMPUTE},
            "kronecker_sketch": [block(model, read) for model in ("0.1B", "1B", "8B")],
            "steps": [sequence_step(model, device) for model in ("0.1B", "1B", "8B")],
        }
    return found


if __name__ == "__main__":
    json.dump(predict_sequences() if "--sequences" in sys.argv else predict(), sys.stdout, indent=1)
    print()

"""What a GPU should show, from byte counts and launch counts alone, to be put beside measurements.

``python -m gac.bench.prediction > benchmarks/results/h100_prediction.json`` writes it for an H100. Assumptions, each to
be checked by the suite: kernels read at ``READ`` bytes a second (90% of 3.35 TB/s); a dependent launch costs ``GAP``
seconds of device time; a training step runs at ``COMPUTE`` operations a second, six for each parameter and token.
"""

from __future__ import annotations

import json
import math
import sys

from gac.bench.shapes import MODELS
from gac.ledger import ELEMENTS_PER_BUCKET, SMALLEST_SKETCH
from gac.observer import BUCKET_BYTES
from gac_kernels import SketchLayout

READ = 3.0e12
GAP = 3e-6
COMPUTE = 4e14
_BF16 = 2


def _sketch_chunk_rows(rows: int) -> int:
    """Rows of one chunk of the sketch's first stage, as :mod:`gac_kernels.triton.config` chooses them."""
    chunk = 64
    while chunk * 2 <= 256 and rows // (chunk * 2) >= 4096:
        chunk *= 2
    return chunk


def operations(name: str) -> list[dict]:
    """Bytes, launches and seconds of each list operation on a model's bf16 parameter list."""
    numels = [math.prod(shape) for shape in MODELS[name].shapes()]
    total = sum(numels)
    layout = SketchLayout.per_tensor(numels, size=max(SMALLEST_SKETCH, total // ELEMENTS_PER_BUCKET))
    rows = sum(-(-n // layout.lanes) for n in numels)
    partials = 2 * 4 * layout.lanes * -(-rows // _sketch_chunk_rows(rows))  # written and read again
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
    """One optimizer step: time of the model, of GAC's reads, and the share at intervals 1 and 10."""
    numels = [math.prod(shape) for shape in MODELS[name].shapes()]
    total = sum(numels)
    layout = SketchLayout.per_tensor(numels, size=max(SMALLEST_SKETCH, total // ELEMENTS_PER_BUCKET))
    buckets = math.ceil(_BF16 * total / BUCKET_BYTES)
    read = operations(name)[1]["bytes"] / READ
    absorb = 5 * 4 * layout.size / READ
    launches = 2 * buckets + 1  # two kernels a bucket, then absorb_
    contribution = read + absorb + GAP * launches
    model = 6 * total * tokens / COMPUTE
    return {
        "model": name,
        "tokens": tokens,
        "micro_batches": micro_batches,
        "step_seconds": micro_batches * model,
        "gac_seconds": micro_batches * contribution,
        "launches_per_backward": launches,
        "share_interval_1": contribution / model,
        "share_interval_10": contribution / model / 10,
        "sketch_bytes_share": 4 * 4 * layout.size / (_BF16 * total),
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

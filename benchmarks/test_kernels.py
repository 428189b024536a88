"""Every operation beside its peers under pytest-benchmark: ``pytest benchmarks/test_kernels.py``.

The inputs, peers and gates are those of ``gac bench``, which also interleaves the variants and measures the read limit;
here each variant has its own statistics, for comparisons from commit to commit (``--benchmark-compare``).
"""

from __future__ import annotations

from itertools import count

import pytest
import torch

from gac.bench.case import Case
from gac.bench.cases import OPERATIONS, applies, drop_failing, prepare
from gac.bench.inputs import Pools

VARIANTS = ("gac", "read", "eager", "foreach", "compile")


@pytest.fixture(scope="module")
def pools(device: torch.device) -> Pools:
    """Input buffers, shared by the cases."""
    return Pools(device, cold=device.type == "cpu")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_kernel(benchmark, pools: Pools, operation: str, dtype: str, elements: int, variant: str) -> None:
    """Times one variant of one case, after the gate."""
    if not applies(operation, dtype, elements):
        pytest.skip("no such case: see gac.bench.cases.applies")
    case = Case(operation, dtype, elements)
    prepared = prepare(case, pools, (variant,) if variant not in ("gac", "read") else ())
    gate = prepared.gate()
    assert gate.ok, f"wrong result: error {gate.error:.3g} times its bound"
    drop_failing(prepared)
    own = {"gac": [prepared.ours], "read": list(prepared.readers.values())}
    calls = own.get(variant, list(prepared.peers.values()))
    if not calls:
        pytest.skip("; ".join(prepared.omitted.values()) or "no such peer")
    benchmark.group = f"{operation} {dtype} {case.label}"
    benchmark.extra_info |= {"bytes": prepared.bytes, "read_bytes": prepared.read_bytes}
    turn = count()

    def call() -> None:
        calls[0](next(turn) % prepared.sets)
        if pools.device.type == "cuda":
            torch.cuda.synchronize(pools.device)

    benchmark.pedantic(call, rounds=20, warmup_rounds=3)

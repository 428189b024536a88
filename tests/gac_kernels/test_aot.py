"""The Triton kernels compiled for sm_80, sm_90 and sm_100 on the installed Triton, without a GPU (see ``aot.py``).

For sm_90 all of them; for the others those that contain the rest.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
HERE = Path(__file__).parent
CAPABILITIES = (80, 90, 100)
SIZES = {"bf16": 2, "fp16": 2, "fp32": 4, "fp64": 8}
UNROLL, PAIR_UNROLL = 4, 2
"""Vectors of 1,024 elements asked for at a time, of one list and of each of two: ``gac_kernels.triton.config``."""

MOST_REGISTERS = 136
"""For inputs of 16 and 32 bits: three programs of 128 threads share the 65,536 registers of an SM."""

MOST_REGISTERS_PRODUCTS = 168
"""Of matrix products on inputs of 16 bits: three programs fill the registers of an SM."""

MOST_REGISTERS_FP64 = 224
"""Where float64 is involved, or float32 is split for tensor cores; 255 is what a thread can have."""


@pytest.fixture(scope="module")
def reports():
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "GAC_BACKEND")}
    runs = [
        subprocess.Popen(
            [sys.executable, str(HERE / "aot.py"), str(capability), *([] if capability == 90 else ["--heaviest"])],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for capability in CAPABILITIES
    ]
    reports = {}
    for run in runs:
        out, error = run.communicate(timeout=280)
        assert run.returncode == 0, error[-4000:]
        reports |= json.loads(out)["reports"]
    return {int(capability): report for capability, report in reports.items()}


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_no_spills_and_bounded_registers(reports, capability):
    for name, usage in reports[capability].items():
        heavy = "fp64" in name or "token" in name or name.startswith("kronecker_kernel/fp32")
        most = MOST_REGISTERS_FP64 if heavy else MOST_REGISTERS_PRODUCTS if "kronecker" in name else MOST_REGISTERS
        assert usage["local"] == 0, name
        assert usage["stack"] == 0, name
        assert usage["registers"] <= most, (name, usage)
        assert usage["shared"] <= 4096, (name, usage)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_eight_bit_floats_are_read_as_they_are(reports, capability):
    """128 threads, 8 elements each: 64 bits at a time, or beside a float32 total 128 bits of two rows."""
    total = PAIR_UNROLL * SIZES["fp32"] // 2
    kernels = {"moments_kernel": (UNROLL, 0), "sketch_kernel": (UNROLL, 0), "accumulate_kernel": (0, 1 + total)}
    expected = {f"{kernel}/{dtype}": loads for kernel, loads in kernels.items() for dtype in ("e4m3", "e5m2")}
    kernels["sketch_kernel"] = (PAIR_UNROLL, 0)
    expected |= {f"{kernel}/e4m3/scales": loads for kernel, loads in kernels.items()}
    expected["sketch_kernel/e5m2/scales"] = kernels["sketch_kernel"]
    found = {name: usage for name, usage in reports[capability].items() if name in expected}
    assert {"sketch_kernel/e4m3", "sketch_kernel/e5m2"} <= found.keys() <= expected.keys()
    assert found.keys() == expected.keys() or capability != 90
    for name, usage in found.items():
        assert (usage["narrow_loads"], usage["wide_loads"]) == expected[name], (name, usage)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_no_atomics(reports, capability):
    assert [name for name, usage in reports[capability].items() if usage["atomics"]] == []


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("dtype", SIZES)
def test_all_loads_of_the_fast_path_are_128_bits_wide(reports, capability, dtype):
    """128 threads read 1,024 elements: 8 each, so half an access for each byte of the element's size."""
    loads = SIZES[dtype] // 2
    expected = {f"{name}/{dtype}": (UNROLL * loads, None) for name in ("moments_kernel", "sketch_kernel")}
    for second in {dtype} if dtype == "fp64" else {dtype, "fp32"}:
        steps = PAIR_UNROLL // 2 if dtype == "fp64" else PAIR_UNROLL
        expected[f"sketch_kernel/{dtype}/{second}"] = (steps * (loads + SIZES[second] // 2), None)
    total = (
        SIZES["fp32"] // 2
    )  # float32 beside every dtype: read and written, twice with a vector of what was there before
    for running in (0, 1):
        expected[f"accumulate_kernel/{dtype}" + "/running" * running] = (
            PAIR_UNROLL * (loads + total * (1 + running)),
            PAIR_UNROLL * total * (1 + running),
        )
        if dtype != "fp16":
            second = "fp64" if dtype == "fp64" else "fp32"
            steps = 1 if running else PAIR_UNROLL
            expected[f"accumulate_kernel/{dtype}/{second}" + "/running" * running] = (
                steps * (loads + SIZES[second] // 2 + total * (1 + running)),
                steps * total * (1 + running),
            )
    for variant in ("", "/mix", "/mix+moments"):
        expected[f"pair_kernel/{dtype}{variant}"] = (2 * PAIR_UNROLL * loads, PAIR_UNROLL * loads if variant else 0)
    compiled = {name: reports[capability][name] for name in expected if name in reports[capability]}
    assert compiled or (capability != 90 and dtype == "fp16")
    assert len(compiled) == len(expected) or capability != 90
    for name, usage in compiled.items():
        wide_loads, wide_stores = expected[name]
        assert usage["wide_loads"] == wide_loads, name
        assert wide_stores is None or usage["wide_stores"] == wide_stores, name


TILE_BYTES = {"fp32": 32 * 128, "16 bits": 64 * 128}
"""Tokens times a line of the cache: ``gac_kernels.triton.kronecker``."""

STAGES = 3
"""Tiles that are asked for at a time, at least."""

MOST_SHARED = 66 * 2**10
"""Three programs of the Kronecker sketch share the 228 KB of an SM."""


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_the_kronecker_sketch_streams_its_sides(reports, capability):
    """Tiles arrive by asynchronous copies of 16 bytes: on their way while the tile before is multiplied."""
    compiled = {name: usage for name, usage in reports[capability].items() if name.startswith("kronecker_kernel/")}
    assert len(compiled) == (9 if capability == 90 else 6)
    for name, usage in compiled.items():
        sides = 1 if "places" in name else 2
        copies = TILE_BYTES["fp32" if "fp32" in name else "16 bits"] // (128 * 16)  # of each of 128 threads
        assert usage["wide_copies"] >= STAGES * copies * sides, (name, usage)
        assert usage["dynamic_shared"] <= MOST_SHARED, (name, usage)

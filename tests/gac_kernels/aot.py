"""Compiles every Triton kernel ahead of time, without a GPU, and prints what came out as JSON.

Run as a program (``python aot.py 80 90 100``), because Triton's interpreter and its compiler need separate processes.
``--heaviest`` leaves out what another kernel of the list contains: lighter forms, second stages, and float16, which
differs from bfloat16 by one conversion.
The kernels' arguments are those of real calls: the operations run on small CPU tensors with the launches recorded.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from gac_kernels import SketchLayout
from gac_kernels import triton as operations
from gac_kernels.step_vector import SIZE, WEIGHTS_SIZE
from gac_kernels.triton import config, ending
from gac_kernels.triton import launch as starting

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.int64: "i64",
    torch.uint8: "u8",
}
GPU = config.for_device(torch.device("cuda"))
_CUOBJDUMP = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")


def recorded_launches() -> dict[str, tuple]:
    """Kernel, signature and constants of every launch, as configured for GPUs."""
    launches: dict[str, tuple] = {}
    seen = set()
    label = ""

    def record(kernel, grid, device, *args, slot=None, **constants):
        signature, constexprs, attributes = {}, dict(constants), {}
        for position, (name, value) in enumerate(zip(kernel.arg_names, args, strict=False)):
            if isinstance(value, torch.Tensor):
                signature[name] = "*" + _TYPES[value.dtype]
                attributes[(position,)] = [["tt.divisibility", 16]]
            elif value is None:
                signature[name], constexprs[name] = "constexpr", None
            else:
                signature[name] = "fp32" if isinstance(value, float) else "i32"
                if name.endswith(("_stride", "_width")) and value % 16 == 0:  # as Triton specialises a launch
                    attributes[(position,)] = [["tt.divisibility", 16]]
        signature |= dict.fromkeys(constants, "constexpr")
        specialization = (kernel.__name__, str(signature), str(constexprs))
        if specialization not in seen:
            seen.add(specialization)
            launches[kernel.__name__ + label] = (kernel, signature, constexprs, attributes)

    starting.launch = record
    starting.check_device = lambda device: None
    config.for_device = lambda device: GPU
    mu = torch.tensor(0.5)
    for dtype in DTYPES:
        name = "/" + _TYPES[dtype]
        a, b = torch.zeros(5000, dtype=dtype), torch.zeros(5000, dtype=dtype)
        out = torch.zeros(2048, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        layout = SketchLayout((5000,), 3)
        label = name
        operations.moments([a])
        operations.sketch([a], out, layout=layout, scale=mu)
        operations.pair_moments([a], [b])
        label = f"{name}/mix"
        operations.mix_([a], [b], mu)
        label = f"{name}/mix+moments"
        operations.mix_([a], [b], 0.25, moments=True)
        label = name
        total = torch.zeros(5000)
        operations.accumulate_([a], total, scale=mu)
        label = f"{name}/running"
        operations.accumulate_([a], total, scale=0.5, previous=total.clone(), into=torch.zeros(2, dtype=torch.float64))
        label = f"{name}/accumulate"
        moments = torch.zeros(2, dtype=torch.float64)
        operations.sketch([a], out, layout=layout, scale=0.5, accumulate=True, into=moments)
        for second in (dtype,) if dtype == torch.float64 else (torch.float32, dtype):
            label = f"{name}/{_TYPES[second]}"
            operations.sketch([a], out, layout=layout, second_moments=[a.to(second)])
            if dtype == torch.float16 or second == torch.bfloat16:
                continue  # as with bfloat16 and float32 but for a conversion
            operations.accumulate_([a], total, second_moments=[a.to(second)])
            label = f"{name}/{_TYPES[second]}/running"
            operations.accumulate_([a], total, previous=total.clone(), second_moments=[a.to(second)])
    for dtype, name in ((torch.float8_e4m3fn, "/e4m3"), (torch.float8_e5m2, "/e5m2")):
        label, x = name, torch.zeros(5000, dtype=dtype)
        operations.moments([x])
        operations.sketch([x], torch.zeros(2048), layout=layout, scale=mu)
        operations.accumulate_([x], total, scale=mu)
        scales, label = torch.zeros(157, dtype=torch.uint8), name + "/scales"
        operations.sketch([x], torch.zeros(2048), layout=layout, scale=mu, block_scales=[scales])
        if dtype == torch.float8_e5m2:
            continue  # as with e4m3 but for the conversion
        operations.moments([x], block_scales=[scales])
        operations.accumulate_([x], total, scale=mu, block_scales=[scales])
        label = name + "/scales/running"
        operations.accumulate_([x], total, previous=total.clone(), block_scales=[scales])
    m = torch.zeros(3000)
    label = ""
    both, x = torch.zeros(2, layout.size), torch.zeros(5000)
    operations.absorb_sketch_([x], *both, mu, layout=layout)
    operations.absorb_(m, m.clone(), m.clone(), mu)
    label = "/no_previous"
    operations.absorb_(m, None, m.clone(), 0.5, into=torch.zeros(3, dtype=torch.float64))
    totals, rows, number = (torch.zeros(3000), torch.zeros(3000)), torch.zeros(8, 6, dtype=torch.float64), mu.double()
    label = "/sketch"
    ending.gather(totals, rows, 3, [0, 0, 1], tokens=torch.zeros(3, dtype=torch.float64), time_noise=rows[0, :2])
    label = "/exact"
    ending.gather(totals, rows, None, [0, 0, 1], scales=(mu, mu))
    state, options = torch.zeros(SIZE, dtype=torch.float64), {"table": rows, "options": rows, "averages": 2}
    told = {"alpha": number, "prior": number, "kl": number, "follows_kl": True}
    weights = torch.zeros(WEIGHTS_SIZE)
    label = "/sums"
    ending.finish(rows, state, weights, **options, **told)
    label = "/statistics"
    ending.finish(rows, state, weights, from_statistics=True, **options)
    label = "/nothing"
    ending.finish(None, state, weights, **options | {"averages": 1})
    label = ""
    mask = torch.ones(3, 9, dtype=torch.bool)
    operations.token_moments(torch.zeros(3, 9), torch.zeros(3), mask, torch.zeros(3, dtype=torch.bool))
    bounds, keys = torch.tensor([0, 40, 100]), torch.arange(4)
    for dtype in DTYPES[:3]:
        x = torch.zeros(100, 256, dtype=dtype)
        for name, left, sizes, options in (
            ("", x, (32, 32), {}),
            ("/64", x, (64, 64), {}),
            ("/places", torch.zeros(100, dtype=torch.int64), (32, 32), {"size": 500, "ones": True}),
        ):
            label = f"/{_TYPES[dtype]}{name}"
            out = torch.zeros(2, *sizes)
            operations.kronecker_sketch(left, x, out, bounds=bounds, keys=keys, longest=60, **options)
    return launches


def _usage(cubin: bytes) -> dict[str, int]:
    """Registers a thread, and bytes of stack and local memory, as ``cuobjdump`` reads them from the binary."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [_CUOBJDUMP, "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", text)}
    return {"registers": found["REG"], "stack": found["STACK"], "local": found["LOCAL"], "shared": found["SHARED"]}


def _wide_accesses(ptx: str, kind: str) -> int:
    """128-bit global accesses: four words of 32 bits or two of 64."""
    return len(re.findall(rf"{kind}\.global[\w.:]*\.(?:v4\.[bfus]32|v2\.[bfus]64)", ptx))


_HEAVIEST = (
    "sketch_kernel/",
    "/running",
    "mix+moments",
    "token_kernel",
    "kronecker_kernel/",
    "gather_kernel/sketch",
    "/sums",
)
_LIGHTER = ("fp16", "bf16/bf16", "fp64/fp64")


def compile_all(capability: int, heaviest: bool) -> dict[str, dict]:
    """Compiles for ``sm_<capability>``; what each kernel uses, by name."""
    report = {}
    for name, (kernel, signature, constants, attributes) in recorded_launches().items():
        if heaviest and (any(part in name for part in _LIGHTER) or not any(part in name for part in _HEAVIEST)):
            continue
        source = ASTSource(
            kernel,
            {n: signature[n] for n in kernel.arg_names},
            constexprs={(kernel.arg_names.index(n),): value for n, value in constants.items()},
            attrs=attributes,
        )
        compiled = triton.compile(
            source,
            target=GPUTarget("cuda", capability, 32),
            options={"num_warps": GPU.warps, "enable_fp_fusion": True},
        )
        ptx = compiled.asm["ptx"]
        report[name] = {
            **_usage(compiled.asm["cubin"]),
            "wide_loads": _wide_accesses(ptx, "ld"),
            "wide_stores": _wide_accesses(ptx, "st"),
            "narrow_loads": len(re.findall(r"ld\.global[\w.:]*\.v2\.[bfus]32", ptx)),
            "wide_copies": len(re.findall(r"cp\.async\.c[ag][\w.:]* \[[^]]*\], \[[^]]*\], 0x10", ptx)),
            "dynamic_shared": compiled.metadata.shared,
            "atomics": len(re.findall(r"\b(?:atom|red)\.", ptx)),
        }
    return report


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("capabilities", type=int, nargs="+", help="80, 90, 100")
    parser.add_argument("--heaviest", action="store_true", help="only the kernels that contain the others")
    options = parser.parse_args()
    reports = {capability: compile_all(capability, options.heaviest) for capability in options.capabilities}
    json.dump({"triton": triton.__version__, "torch": torch.__version__, "reports": reports}, sys.stdout)

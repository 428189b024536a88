"""Prints what a bug report needs: versions, devices, kernel backends, instruction sets, threads, variables."""

import argparse
import json
import os
import platform

HELP = "print versions and devices for a bug report"

_VARIABLES = ("GAC_", "OMP_", "MKL_", "TORCH", "PYTORCH_", "TRITON_", "CUDA_VISIBLE", "NVIDIA_VISIBLE", "NCCL_")
"""Prefixes of the environment variables that change how a run behaves."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``gac env``."""
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Runs ``gac env``."""
    facts = collect()
    if args.json:
        print(json.dumps(facts, indent=2))
        return 0
    width = max(len(name) for section in facts.values() for name in section)
    for section, values in facts.items():
        print(section)
        for name, value in values.items():
            print(f"  {name:<{width}}  {value}")
    return 0


def collect() -> dict[str, dict[str, str]]:
    """All facts, by section; works without any optional package."""
    from gac.runs.folder import versions

    return {
        "versions": versions() | {"platform": platform.platform()},
        "processor": _processor(),
        "devices": _devices(),
        "gac_kernels": _backends(),
        "environment": {k: v for k, v in sorted(os.environ.items()) if k.startswith(_VARIABLES)} or {"(none set)": ""},
    }


def _processor() -> dict[str, str]:
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "machine": platform.machine(),
        "model": _cpu_model(),
        "instruction set (torch)": torch.backends.cpu.get_cpu_capability(),
        "cores available": str(cores),
        "torch threads": f"{torch.get_num_threads()} intra-op, {torch.get_num_interop_threads()} inter-op",
    }


def _cpu_model() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), "unknown")
    except OSError:
        return platform.processor() or "unknown"


def _devices() -> dict[str, str]:
    import torch

    facts = {"torch built for CUDA": str(torch.version.cuda or "no"), "ROCm": str(torch.version.hip or "no")}
    if not torch.cuda.is_available():
        return facts | {"GPU": "none"}
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        facts[f"GPU {index}"] = (
            f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, "
            f"compute capability {properties.major}.{properties.minor}"
        )
    return facts


def _backends() -> dict[str, str]:
    try:
        import gac_kernels

        status = getattr(gac_kernels, "backend_status", None)
        if status is None:
            return {"backends": "this version does not report them"}
        found = status()
    except Exception as error:  # a broken installation is exactly what this command must be able to report
        return {"error": f"{type(error).__name__}: {error}"}
    if isinstance(found, dict):
        return {str(name): str(value) for name, value in found.items()}
    return {"status": str(found)}

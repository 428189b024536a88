"""What numbers depend on: device, driver, processor, instruction set, versions, threads, and the command that ran."""

from __future__ import annotations

import platform
import shlex
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path

import torch

from gac.runs.folder import package_versions

_PACKAGES = ("gac-kernels", "torch", "triton", "transformers", "numpy")


def command_line(argv: list[str] | None = None) -> str:
    """The command as a user types it, absolute paths cut down to their last part."""
    words = ["gac", *argv] if argv is not None else sys.argv
    return shlex.join([Path(word).name if Path(word).is_absolute() else word for word in words])


def collect(device: torch.device, argv: list[str] | None = None) -> dict:
    """The facts as JSON-ready data."""
    found = {
        "command": command_line(argv),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "device": device_name(device),
        "cpu": cpu_model(),
        "threads": torch.get_num_threads(),
        "isa": cpu_isa(),
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "versions": versions(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "driver": driver_version(),
            "cuda": torch.version.cuda,
            "capability": f"{properties.major}.{properties.minor}",
            "memory_bytes": properties.total_memory,
        }
    return found


def versions() -> dict[str, str]:
    """Versions of the packages that decide the numbers."""
    return package_versions(_PACKAGES)


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_model()


def cpu_model() -> str:
    """Name of the processor."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), "unknown")
    except OSError:
        return platform.processor() or "unknown"


def cpu_isa() -> str:
    """Instruction set of the CPU library; ``none`` without one."""
    from gac_kernels import cpu
    from gac_kernels.cpu.library import load

    library = load() if cpu.available() else None
    return "none" if library is None else library.isa


def driver_version() -> str:
    """Version of the GPU driver, as the driver's own tool tells it."""
    try:
        text = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True, text=True, timeout=20, check=True,
        ).stdout  # fmt: skip
        return text.split()[0]
    except (OSError, IndexError, subprocess.SubprocessError):
        return "unknown"

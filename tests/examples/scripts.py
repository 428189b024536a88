"""The folder of examples, and how its scripts are run within a test."""

from __future__ import annotations

import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"


def run(monkeypatch: pytest.MonkeyPatch, name: str, *options: object) -> dict[str, Any]:
    """Runs a script as a command with `options`, in this process; returns its names."""
    path = str(EXAMPLES / name)
    monkeypatch.setattr(sys, "argv", [path, *map(str, options)])
    return runpy.run_path(path, run_name="__main__")


def load(name: str) -> dict[str, Any]:
    """The names of a script that is imported, not run."""
    return runpy.run_path(str(EXAMPLES / name), run_name=Path(name).stem)


def output_of(module: str, *arguments: object, folder: Path, seconds: float) -> str:
    """What ``python -m module`` prints, ended with all it has started after `seconds`; it must succeed."""
    launcher = subprocess.Popen(
        [sys.executable, "-m", module, *map(str, arguments)],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # so that workers end with their launcher
    )
    try:
        output, _ = launcher.communicate(timeout=seconds)
    finally:
        if launcher.poll() is None:
            os.killpg(launcher.pid, signal.SIGKILL)
    assert launcher.returncode == 0, output[-4000:]
    return output


def launched(name: str, folder: Path, *options: str) -> tuple[list[str], dict[str, str]]:
    """What a launch script hands to Python, and the environment, without Python being started.

    Args:
        folder: for what stands in for Python.
    """
    stand_in = folder / "python"
    stand_in.write_text('#!/bin/sh\nfor word in "$@"; do printf "%s\\0" "$word"; done; printf "\\0"; env -0\n')
    stand_in.chmod(0o755)
    environment = os.environ | {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}
    command = ["bash", str(EXAMPLES / name), *options]
    out = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=60).stdout
    words, _, rest = out.partition("\0\0")
    return words.split("\0"), dict(line.split("=", 1) for line in rest.strip("\0").split("\0"))

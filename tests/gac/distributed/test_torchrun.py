"""The torchrun example, as its first lines say to start it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[3] / "examples" / "hybrid_grpo_torchrun.py"
SECONDS = 120


@pytest.mark.timeout(SECONDS + 30)
def test_hybrid_grpo_on_two_processes(tmp_path):
    launcher = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(EXAMPLE)],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # so that workers end with their launcher
    )
    try:
        output, _ = launcher.communicate(timeout=SECONDS)
    finally:
        if launcher.poll() is None:
            os.killpg(launcher.pid, signal.SIGKILL)
    assert launcher.returncode == 0, output[-4000:]
    found = {}
    for rank, step, mu in re.findall(r"rank (\d) of 2: step (\d+), mu ([\d.]+)", output):
        found.setdefault(int(step), {})[int(rank)] = mu
    assert sorted(found) == [1, 2, 3, 4]
    assert all(set(mus) == {0, 1} and mus[0] == mus[1] for mus in found.values()), found
    assert len({mus[0] for mus in found.values()}) > 1, "mu moves"
    assert "gac/mu" in output, "the trainer logs it"

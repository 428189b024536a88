"""Runs ``test_triton*.py`` under Triton's interpreter, in a process of its own (see ``conftest.py``)."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
HERE = Path(__file__).parent


@pytest.mark.parametrize(
    ("chosen", "fewest"),
    [
        ("sketch", 40),
        ("not sketch", 105),
    ],
)
def test_triton_suites_in_the_interpreter(chosen, fewest):
    """In parts, since the interpreter takes minutes for all of them."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "GAC_"))}
    environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    suites = [str(HERE / name) for name in ("test_triton.py", "test_triton_kronecker.py")]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *suites, "-k", chosen]
    done = subprocess.run(command, env=environment, cwd=HERE.parent.parent, capture_output=True, text=True, timeout=280)
    print(done.stdout[-6000:], done.stderr[-2000:])
    assert done.returncode == 0
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed
    assert int(passed[1]) >= fewest

"""What `.ci/run` calls is there: a check whose target is misspelt may be taken for one that cannot run."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TARGETS = sorted(
    set(re.findall(r"\bmake ([\w./-]+)", (ROOT / ".ci" / "run").read_text())) - {"sanitize"}
)  # in a sentence


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
@pytest.mark.parametrize("target", TARGETS)
def test_targets_exist(target):
    done = subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

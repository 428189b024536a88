"""``import gac`` is light: no transformers, no triton, no device."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import sys, torch
before = set(sys.modules)
import gac
new = set(sys.modules) - before
heavy = [m for m in new if m.split(".")[0] in ("transformers", "triton", "trl", "datasets", "matplotlib", "rich")]
assert not heavy, heavy
assert "gac.losses" not in new, "token losses, and what they import, are for those who use them"
assert not torch.cuda.is_initialized()
"""


def test_import_is_light():
    subprocess.run([sys.executable, "-c", PROGRAM], check=True, timeout=120)

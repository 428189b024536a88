"""``gac bench`` and the GPU suite, end to end with tiny sizes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import gac_kernels
from gac.bench.cases import OPERATIONS
from gac.cli import main

TINY = ["bench", "--device", "cpu", "--sizes", "64K", "--models", "none", "--peers", "eager", "--dtype", "fp32",
        "--seconds", "0.01"]  # fmt: skip
SUITE = Path(__file__).parents[3] / "benchmarks" / "gpu_suite.sh"


def test_files_and_exit_code(tmp_path, capsys):
    assert main([*TINY, "--out", str(tmp_path / "mine")]) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine.json", "mine.md", "mine.png"]
    found = json.loads((tmp_path / "mine.json").read_text())
    assert [row["operation"] for row in found["kernels"]] == list(OPERATIONS)
    assert {"device", "cpu", "isa", "threads", "versions", "command"} <= set(found["facts"])
    assert str(tmp_path) not in found["facts"]["command"]
    assert "pair_moments fp32 64K" in capsys.readouterr().out


def test_a_wrong_kernel_fails_the_command(tmp_path, monkeypatch, capsys):
    right = gac_kernels.moments
    monkeypatch.setattr(gac_kernels, "moments", lambda *args, **options: 1.01 * right(*args, **options))
    assert main([*TINY, "--ops", "moments", "--out", str(tmp_path / "red")]) == 1
    shown = capsys.readouterr()
    assert "GATE RED" in shown.out
    assert "wrong results from moments fp32 64K" in shown.err
    assert not (tmp_path / "red.png").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--device", "nowhere"], "--device nowhere"),
        (["--device", "meta"], "kernels run on cpu and cuda"),
        (["--ops", "sort"], "unknown 'sort'"),
        (["--sizes", "4Q"], "'4Q' is no size"),
        (["--seconds", "0"], "no positive number"),
        (["--step", "--all"], "not allowed with"),
    ],
)
def test_mistakes_are_named(options, message, capsys):
    assert main(["bench", *options]) == 2
    assert message in capsys.readouterr().err


def test_suite_dry_run(tmp_path):
    """All parts but compiled layers and a trainer's run, which are tests of their own elsewhere; of kernels two."""
    parts = ("env", "tests", "ending", "budget", "step", "kernels", "sequence")
    command = ["bash", str(SUITE), str(tmp_path), "--dry-run", *parts]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=_environment(), check=False)
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "budget.json", "ending.json", "env.json", "kernels.json", "kernels.md", "kernels.png", "predicted.json",
        "sequence.json", "sequence.md", "step.json", "step.md", "suite.log", "summary.json", "tests.log",
    ]  # fmt: skip
    found = json.loads((tmp_path / "summary.json").read_text())
    log = (tmp_path / "suite.log").read_text()
    assert found["exit_codes"] == dict.fromkeys(parts, 0), log
    assert found["cases"] == 2
    assert all(found["parts"][part]["complete"] for part in ("step", "sequence", "ending", "budget"))
    assert {"sequence"} < {step["estimator"] for step in found["steps"]}
    (budget,) = found["budget"].values()
    assert budget["steps"] >= 14
    assert next(row["found"] for row in found["predicted"] if row["unit"] == "s") > 0  # of the end of a step


def test_plain_read_kernel_reads_everything():
    """In Triton's interpreter, which has to be chosen before Triton is loaded."""
    pytest.importorskip("triton")
    code = (
        "import torch; from gac.bench.read_kernel import read\n"
        "for n in (1, 4096, 32768, 100001):\n"
        "    x = torch.randn(n); assert torch.allclose(read(x).sum(), x.sum(), atol=1e-2), n\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False,
        env=_environment() | {"TRITON_INTERPRET": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def _environment() -> dict[str, str]:
    return dict(os.environ) | {"PYTHON": sys.executable}

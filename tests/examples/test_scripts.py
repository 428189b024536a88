"""The examples of one process at a tiny size, and the notebook on a run that is made of numbers."""

from __future__ import annotations

import json
import re
import sys
import types
from pathlib import Path

import pytest
import torch

from gac.report import HISTORY
from tests.examples.scripts import EXAMPLES, ROOT, load, run
from tests.gac.runs import test_page

README = (EXAMPLES / "README.md").read_text()


def test_the_table_has_every_example():
    linked = {Path(target).parts[0] for target in re.findall(r"\]\(([^)]+)\)", README)}
    assert linked == {path.name for path in EXAMPLES.iterdir() if path.name not in ("README.md", "__pycache__")}


@pytest.mark.parametrize("page", ["README.md", "*.py", "*/*.py", "*/*.md"])
def test_commands_name_files(page):
    """What a page tells to start lies there."""
    named = {name for path in EXAMPLES.glob(page) for name in re.findall(r"\bexamples/[\w./]+", path.read_text())}
    assert named
    assert [name for name in named if not (ROOT / name.rstrip(".")).exists()] == []


def test_plain_loop(monkeypatch, capsys):
    run(monkeypatch, "plain_loop.py", "--steps", 20, "--width", 256)
    out = capsys.readouterr().out
    found = re.findall(r"step +(\d+): right (\d+)%, mu (0\.\d+)", out)
    assert [int(step) for step, _, _ in found] == [10, 20]
    assert 0 <= int(found[0][1]) < int(found[1][1]) <= 100, "it learns"
    assert all(0.0 < float(mu) < 1.0 for _, _, mu in found)
    assert found[0][2] != found[1][2], "mu follows"
    assert re.search(r"measured every 1 steps by now, \d+\.\d\d% of the time in GAC", out)
    assert "Gradients of 10 measured steps from 2 to 20" in out
    assert all(re.search(rf"^{module} ", out, flags=re.MULTILINE) for module in ("digits", "hidden", "answer"))


def test_rewards_alone_teach_the_plain_loops_model():
    names = load("plain_loop.py")
    torch.manual_seed(0)
    model, pairs = names["Adder"](32), torch.tensor([[1, 2], [7, 5]])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    right = lambda: model(pairs).softmax(-1).gather(1, pairs.sum(1, keepdim=True)).mean().item()
    before = right()
    for _ in range(100):
        names["rl_loss"](model, pairs).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert before < 0.2
    assert right() > 0.9


def test_trl_hybrid(monkeypatch, capsys, tmp_path):
    run(monkeypatch, "trl_hybrid.py", "--max-steps", 12, "--start-steps", 30, "--out", tmp_path / "run")
    out = capsys.readouterr().out
    accuracies = re.findall(r"held out (before|after): (\d+)%", out)
    assert [when for when, _ in accuracies] == ["before", "after"]
    assert int(accuracies[1][1]) > 0, "demonstrations and prompts are rendered alike"
    mus = dict(re.findall(r"step (\d+): mu (0\.\d+), reward [01]\.\d+", out))
    assert list(mus) == ["3", "6", "9", "12"]
    assert len(set(mus.values())) > 1, "mu follows"
    assert re.search(r"time in GAC \d+\.\d+%", out)


class Image:
    """Stands in for IPython's, which is not needed to run this project."""

    shown: list[bytes]

    def __init__(self, filename: str) -> None:
        self.shown.append(Path(filename).read_bytes())


def test_read_a_run(monkeypatch, capsys, tmp_path):
    pytest.importorskip("matplotlib")
    book = json.loads((EXAMPLES / "read_a_run.ipynb").read_text())
    assert all(cell["outputs"] == [] for cell in book["cells"] if cell["cell_type"] == "code"), "committed without"
    for name, steps in (("default", 12), ("other", 8)):
        (tmp_path / "runs" / name).mkdir(parents=True)
        test_page.run(tmp_path / "runs" / name, steps)
    monkeypatch.setattr(Image, "shown", [], raising=False)
    for name, contents in (
        ("IPython", {"version_info": (9, 0), "get_ipython": lambda: None}),
        ("IPython.display", {"Image": Image}),
    ):
        module = types.ModuleType(name)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)
    (tmp_path / "examples").mkdir()
    monkeypatch.chdir(tmp_path / "examples")  # as Jupyter does
    names: dict[str, object] = {}
    for number, cell in enumerate(book["cells"]):
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"cell {number}", "exec"), names)
    out = capsys.readouterr().out
    assert "law gac on gcd<i>" in out
    assert "accuracy after the warm start 0.125, time in GAC 1.23%" in out
    assert "12 steps, 12 of them measured" in out
    assert "step    1: mu 0.062, reward 0.75" in out
    assert "sigma_r2: mean 2" in out
    assert str(names["report"]) in out
    assert names["report"].batch == {"sft": 64.0, "rl": 64.0}
    assert len(re.findall(r": disagreement .*, SNR of RL ", out)) == len(test_page.LABELS)
    assert "default: mean mu 0.406, last accuracy 0.750" in out
    assert "other: mean mu 0.281, last accuracy 0.500" in out
    assert [picture[:4] for picture in Image.shown] == [b"\x89PNG"] * 2
    files = {path.name for path in (tmp_path / "runs" / "default").iterdir()}
    assert files == {"config.json", "summary.json", "metrics.jsonl", HISTORY, "reading.png", "modules.png"}

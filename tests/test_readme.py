"""The README's examples run as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)


def test_there_are_two_examples():
    assert len(EXAMPLES) == 2


def test_own_loop(capsys):
    exec(EXAMPLES[0], {})
    assert 0.0 < float(capsys.readouterr().out) < 1.0


def test_trl(tmp_path):
    from datasets import Dataset

    from gac.tasks.characters import build_character_tokenizer
    from gac.tasks.models import build_small_model

    tokenizer = build_character_tokenizer()
    names = {
        "model": build_small_model(tokenizer, hidden_size=16, layers=1, heads=2),
        "tokenizer": tokenizer,
        "reward": lambda completions, **_: [float(len(text)) for text in completions],
        "prompts": Dataset.from_list([{"prompt": f"{k}+{k}="} for k in range(10)]),
        "demonstrations": Dataset.from_list([{"prompt": f"{k}+{k}=", "completion": str(2 * k)} for k in range(10)]),
        "out": str(tmp_path),
    }
    exec(EXAMPLES[1], names)
    assert names["trainer"].state.global_step == 1
    assert any("gac/mu" in entry for entry in names["trainer"].state.log_history)


@pytest.mark.parametrize("link", re.findall(r"\]\((?!https?:)([^)#]+)\)", README.read_text()))
def test_links_lead_somewhere(link):
    assert (README.parent / link).exists()

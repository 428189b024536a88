"""The snippet of docs/trainers.md runs as it stands."""

import re
from pathlib import Path

PAGE = Path(__file__).parents[3] / "docs" / "trainers.md"


def test_the_snippet_runs(tmp_path, capsys):
    (snippet,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    names = {"output_dir": str(tmp_path), "report_to": []}
    exec(snippet, names)
    trainer = names["trainer"]
    assert trainer.state.global_step == 4
    assert trainer.mixer.controller.steps == 4
    assert str(trainer.mixer.mu) in capsys.readouterr().out
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4"}

"""The example of ``docs/sequences.md`` runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

PAGE = Path(__file__).parents[3] / "docs" / "sequences.md"


def test_the_example_runs(capsys):
    (example,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    names: dict = {}
    exec(example, names)
    assert capsys.readouterr().out.startswith("tensor(4., dtype=torch.float64) tensor(2., dtype=torch.float64)")
    assert names["mixer"].coverage.share == 1

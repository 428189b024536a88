"""docs/laws.md names every option of every law that sets mu, with the default that the code has and a reason."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

from tests.gac.laws.test_options import LAWS_THAT_SET_MU

PAGE = (Path(__file__).parents[3] / "docs" / "laws.md").read_text()


@pytest.mark.parametrize("name", LAWS_THAT_SET_MU)
def test_options_and_defaults(name):
    section = PAGE.split(f"\n## `{name}`\n", 1)[1].split("\n## ", 1)[0]
    table = section.split("|---|---|---|\n", 1)[1].split("\n\n", 1)[0]
    stated = {}
    for line in table.splitlines():
        option, default, why = re.fullmatch(r"\| `(\w+)` \| `(.+?)` \| (.+) \|", line).groups()
        assert why, option
        stated[option] = default
    options = inspect.signature(LAWS_THAT_SET_MU[name]).parameters
    assert stated == {option: _quoted(repr(p.default)) for option, p in options.items()}


def _quoted(default: str) -> str:
    """Words in double quotes, as pages write them."""
    return re.sub(r"^'(\w+)'$", r'"\1"', default)

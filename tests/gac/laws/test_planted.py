"""Every candidate in every planted situation: the figures of docs/laws.md are what comes out."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from tests.gac.laws.planted import CONTRIBUTIONS, DIRECTIONS, SITUATIONS, Phase, Source, _draw, fulfils, judge, measured
from tests.gac.laws.planted_rules import CANDIDATES, is_judged

PAGE = (Path(__file__).parents[3] / "docs" / "laws.md").read_text()
SECTION = re.split(r"\n##+ ", PAGE.split("\n### Planted situations\n", 1)[1], maxsplit=1)[0]
ROUNDED = 0.0051
"""Half of the page's last digit."""


def _table() -> dict[str, dict[str, str]]:
    """Cells by situation and candidate."""
    lines = [line for line in SECTION.splitlines() if line.startswith("|")]
    header, rows = (
        [cell.strip() for cell in lines[0].strip("|").split("|")],
        [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]],
    )
    stories = {situation.story: name for name, situation in SITUATIONS.items()}
    return {stories[row[0]]: dict(zip(header[1:], row[1:], strict=True)) for row in rows}


def _cell(name: str, found: list[float]) -> str:
    """As the page writes it: bold where an answer is not as wanted."""
    text = ", ".join(f"{share:.2f}".replace("0.", ".") for share in found)
    return text if fulfils(name, found) else f"**{text}**"


def test_the_page_has_every_situation_and_candidate():
    table = _table()
    assert list(table) == list(SITUATIONS)
    for name, row in table.items():
        assert list(row) == ["wanted", *CANDIDATES]
        assert [c for c in CANDIDATES if row[c] != ""] == [c for c in CANDIDATES if is_judged(c, name)]
        bounds = [(float(low), float(high)) for low, high in re.findall(r"([\d.]+) to ([\d.]+)", row["wanted"])]
        assert bounds == [(wanted.low, wanted.high) for wanted in SITUATIONS[name].wanted]


CASES = [(name, candidate) for name in SITUATIONS for candidate in CANDIDATES if is_judged(candidate, name)]


@pytest.mark.parametrize(("name", "candidate"), CASES)
def test_answers(name, candidate):
    """Both ways: figures, and whether they are as wanted."""
    stated, found = _table()[name][candidate], judge(name, CANDIDATES[candidate])
    assert [float(x) for x in re.findall(r"[\d.]+", stated)] == pytest.approx(found, abs=ROUNDED)
    assert stated.startswith("**") != fulfils(name, found)


def test_the_draws_have_the_truth_that_they_claim():
    """Mean, noise and products of the sources, over many steps, within 4 standard errors."""
    steps, source = 4000, Source(cosine=0.6, signal=2.0, noise=3.0, unit=10.0)
    x = _draw((Phase(steps, source),), "sft", np.random.default_rng(3))
    assert x.shape == (steps, CONTRIBUTIONS, DIRECTIONS)
    mean = x.sum(1).mean(0) / source.unit
    error = source.noise / np.sqrt(DIRECTIONS * steps)
    wanted = np.zeros(DIRECTIONS)
    wanted[:2] = 1.2, 1.6
    assert np.abs(mean - wanted).max() < 4.5 * error  # of 100
    noise = ((x.sum(1) / source.unit - wanted) ** 2).sum(1)
    assert noise.mean() == pytest.approx(9.0, abs=4 * 9 * np.sqrt(2 / DIRECTIONS / steps))


@pytest.mark.parametrize("name", ["teacher", "sft-opposed"])
def test_what_is_measured_is_unbiased(name):
    """The statistics and products of a situation's steps average to its sources' truth, within 4 standard errors."""
    rows = [row for seed in range(4) for row in measured(name, seed)]
    sft = SITUATIONS[name].phases[0].sft
    truth = {"sigma_s2": 4.0, "sigma_r2": 4.0, "dot": sft.cosine, "worth_rs": sft.cosine, "worth_sr": sft.cosine}
    truth |= {"delta_g2": 2 - 2 * sft.cosine, "worth_ss": 1.0, "worth_rr": 1.0}
    for key, value in truth.items():
        drawn = np.array([row[key] for row in rows])
        drawn = drawn[np.isfinite(drawn)]
        # moving means tie some 20 products together
        error = drawn.std() / np.sqrt(len(drawn)) * (20**0.5 if key.startswith("worth") else 1)
        assert abs(drawn.mean() - value) < 4 * error, key

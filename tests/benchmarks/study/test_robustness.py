"""The chapter on regimes, against numbers by hand."""

import math

import pytest

from benchmarks.study import grid, report, robustness
from benchmarks.study.analysis import PHASES, study
from tests.benchmarks.study import fakes
from tests.benchmarks.study.test_regret import LATE, records

RATES = {"fixed:mu=0.1": 3e-5, "fixed:mu=0.9": 3e-5, "gac": 1e-4, "gac-reward": 1e-4}


def regimes(late, phase="regimes", seeds=2):
    """Runs of a phase, at the rates that the grid has."""
    named = {
        place: {"gac-reward" if n == "aim" else n: v[:seeds] for n, v in arms.items()} for place, arms in late.items()
    }
    found = []
    for record in records({place: dict(arms) for place, arms in named.items()}):
        found.append(record | {"phase": phase, "lr": RATES[robustness.arm(record)], "key": f"{phase}/{record['key']}"})
    return found


@pytest.fixture(autouse=True)
def rates(monkeypatch):
    """What tuning would have chosen, and a candidate in the place of law `aim`."""
    arms = {"fixed:mu=0.1": ("fixed", "mu=0.1"), "fixed:mu=0.9": ("fixed", "mu=0.9"), "gac": ("gac", "")}
    arms["gac-reward"] = ("gac-reward", "")
    monkeypatch.setattr("tests.benchmarks.study.test_regret.ARMS", arms)
    rows = lambda phase, _: [grid.Row(phase, "a", "small", *arms[name], lr, 1) for name, lr in RATES.items()]
    monkeypatch.setattr(grid, "rows", rows)


def test_sentences_follow_the_numbers():
    """Best constants: .9 in clean a, .1 elsewhere; the candidate loses 0 in clean and 2.5 at half wrong."""
    text = robustness.chapter(regimes(LATE))
    assert "On development data, 2 seeds:" in text
    assert "gac, weights by reward loses 1.2 points on average and 2.5 at worst (wrong-50)" in text
    assert "the default law 8.0 and 12.5 (wrong-50)" in text
    # a: (3+1)/2+(7+7)/2 over 2 = 4.5 (3 and 7 of seed 1: 5; 1 and 7 of seed 2: 4); b: (5+14)/2, (5+12)/2
    assert "gac, weights by reward minus the default law, over 4 pairs of a data set and a seed: +6.8 [" in text
    assert "in which it beats every constant: gac, weights by reward 1 of 2." in text
    assert "| gac (default) | 12.5" in text


def test_one_seed_has_no_interval_and_says_so():
    text = robustness.chapter(regimes(LATE, seeds=1))
    assert "On development data, 1 seed, and so without intervals:" in text
    assert "minus the default law, over 2 pairs of a data set and a seed: +7.2 points. " in text
    assert "[" not in text.split("(laws.md#regimes-in-training)")[1].replace("![", "")


def test_confirmation_is_about_the_candidate_that_development_chose():
    both = regimes(LATE) + regimes(LATE, "regimes-confirmation", seeds=1)
    text = robustness.chapter(both)
    assert text.index("On development data") < text.index("On confirmation data, 1 seed")


def test_pairs_of_two_arms_need_no_other_arm():
    """The default law and the candidate have a second seed, the constants do not."""
    few = [r for r in regimes(LATE) if r["seed"] == 1 or r["method"] != "fixed"]
    text = robustness.chapter(few)
    assert "On development data, 1 seed, and so without intervals:" in text
    assert "over 4 pairs of a data set and a seed: +6.8 [" in text
    half = [r for r in few if r["seed"] == 1 or r.get("regime")]
    assert "over 2 pairs of a data set and a seed: +7.2 points" in robustness.chapter(half), "a seed without clean"


def test_arms_that_have_not_run_everywhere_are_left_out_until_they_have():
    some = [r for r in regimes(LATE) if r["method"] != "gac-reward" or r["task"] == "a"]
    text = robustness.chapter(some)
    assert "weights by reward" not in text
    assert "| gac (default) |" in text


def test_runs_at_another_rate_do_not_count():
    other = [r | {"lr": 1e-3, "key": r["key"] + "/other"} for r in regimes(LATE)]
    assert robustness.chapter(regimes(LATE) + other) == robustness.chapter(regimes(LATE))


def test_a_run_that_broke_counts_nothing():
    broken = [
        r | {"accuracy": [[0, 0.1], [25, math.nan]]} if r["key"].endswith("clean/a/gac/1") else r for r in regimes(LATE)
    ]
    # the default's 28 of clean a, seed 1, is 0: 14 more for a mean of two regimes, a quarter of that for four pairs
    assert "a data set and a seed: +10.2 [" in robustness.chapter(broken)


def test_nothing_to_say():
    assert robustness.chapter([]) == ""
    assert robustness.chapter([r for r in regimes(LATE) if r["method"] != "fixed"]) == ""


def test_the_picture_is_of_the_development_half(tmp_path):
    robustness.draw(regimes(LATE), tmp_path)
    assert (tmp_path / robustness.PICTURE).stat().st_size > 10_000
    assert f"](images/{robustness.PICTURE})" in robustness.chapter(regimes(LATE))


def test_the_page_has_the_chapter():
    page = report.page(study(fakes.everything()), {}, dict.fromkeys(PHASES, 1), "the chapter")
    assert "### What does a wrong teacher cost?\n\nthe chapter\n\n## Limits" in page
    assert "wrong teacher" not in report.page(study(fakes.everything()), {}, dict.fromkeys(PHASES, 1))

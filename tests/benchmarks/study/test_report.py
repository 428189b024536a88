"""The report on runs that never happened: it says what the numbers say, and what is missing."""

import json
import re

import pytest

from benchmarks.study import report
from benchmarks.study.analysis import PHASES, size_contrast, sizes, study
from tests.benchmarks.study import fakes

COMPLETE = dict.fromkeys(PHASES, 1)


def _page(records, wanted=COMPLETE):
    return report.page(study(records), {}, wanted)


def _sentence(page, number):
    return re.search(rf"^{number}\. (.*)$", page, flags=re.MULTILINE).group(1)


def _chapter(page, title):
    return page.split(f"### {title}")[1].split("\n### ")[0]


@pytest.fixture(scope="module")
def won():
    return _page(fakes.everything(gac=0.26, coefficient=0.12))


@pytest.fixture(scope="module")
def lost():
    return _page(fakes.everything(gac=0.08, coefficient=0.2, confirmation_gac=0.26))


def test_verdicts_follow_the_numbers(won, lost):
    assert _sentence(won, 1).count(" better by ") == 2
    assert "worse by " in _sentence(lost, 1).split("; it is ")[0]
    assert "better by " in _sentence(lost, 1).split("; it is ")[1]
    assert "better than 9 of 9 (" in _sentence(won, 2)
    assert "worse than 9 (" in _sentence(lost, 2)
    assert "better by" in _sentence(won, 3)
    assert "worse by" in _sentence(lost, 3)
    assert "on gradients is better by" in _sentence(won, 4)
    assert "on gradients is worse by" in _sentence(lost, 4)
    assert "In none of 8 data sets" in _sentence(won, 5)
    assert "in 4 of 8 data sets (chain_sum, legs, rotate and syllogism)" in _sentence(lost, 5)
    assert "none turns around" in _sentence(won, 5)
    assert "better turns to worse or back for" in _sentence(lost, 5)


def test_equal_arms_are_not_told_apart():
    page = _page(fakes.comparison(gac=0.15, rule=0.15))
    found = study(fakes.comparison(gac=0.15, rule=0.15)).development
    assert found.verdict("paper") == "open"
    assert "not told apart from" in _sentence(page, 2)


def test_reasons_name_the_side_of_the_best_constant(lost):
    chapter = _chapter(lost, "Where does it lose, and why?")
    assert "with a mean mu of 0.55 above the best constant of 0.3" in chapter  # chain_sum
    assert "next to the best constant of 0.5: its level is not why" in chapter  # rotate
    assert "below the best constant of 0.9" in chapter  # syllogism


def test_size_trend():
    found = sizes(study(fakes.everything()))
    assert list(found) == ["small", "medium", "large"]
    assert size_contrast(found, "paper")[:2] == ("large", "small")
    grown = [r if r["size"] != "large" or r["method"] != "gac" else _lifted(r) for r in fakes.everything()]
    assert "the margin over paper's controller grows" in _page(grown)


def _lifted(record):
    return record | {"accuracy": [[step, min(value + (0.1 if step else 0), 1.0)] for step, value in record["accuracy"]]}


def test_complete_data_are_not_called_preliminary(won):
    assert "Preliminary" not in won
    assert "ot yet run" not in won.split("## Limits")[0]
    assert "all arms start from the same accuracy" in won
    assert "cpu A processor" in won


@pytest.mark.parametrize("records", [fakes.tuning(), fakes.comparison(seeds=[1]), fakes.comparison(seeds=[1, 2])[:-7]])
def test_partial_data(records):
    wanted = dict.fromkeys(PHASES, 500) | {"ablation": None}
    page = _page(records, wanted)
    assert "**Preliminary.**" in page
    assert "confirmation: not yet run" in page
    assert f"{records[0]['phase']}: {len(records)} of 500 runs" in page
    # seven runs of the last of eight pairs are missing: the other 13 arms of that pair wait
    assert ("On development data 13 runs wait" in page) == (len(records) == 153)
    assert "nan" not in page.lower()
    assert "| nan" not in report.readme_table(records)


def test_one_seed_gives_no_verdict():
    found = study(fakes.comparison(seeds=[1])).development
    assert {found.verdict(name) for name in found.versus} == {"missing"}
    page = _page(fakes.comparison(seeds=[1]))
    assert "not judged yet against 9 arms" in _sentence(page, 2)
    assert "the default law is not compared yet" in _sentence(page, 3)  # a search needs a second seed
    assert "over 4 pairs, too few for an interval" in _chapter(page, "Is it better than SFT first")


def test_unfair_data_are_shown():
    records = fakes.comparison(seeds=[1, 2])
    records[3]["accuracy"][0][1] += 0.1
    records[5]["rollouts"] = 1
    page = _page(records)
    assert "runs do NOT start" in page
    assert "Rollouts of a run: from 1 (" in page


def test_files(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    two = {"chain_sum": "math", "rotate": "code"}
    records = fakes.comparison(tasks=two, seeds=[1, 2])
    records += [
        fakes.record("ablation", task, "gac", form, seed) for task in two for form in fakes.FORMS for seed in (1, 2)
    ]
    (data / "comparison.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    page = tmp_path / "docs" / "study.md"
    readme = tmp_path / "README.md"
    readme.write_text("Before\n" + "\nold\n".join(report.MARKS) + "\nafter\n")
    report.main(data, page, readme)
    assert readme.read_text().startswith("Before\n" + report.MARKS[0])
    assert report.readme_table(records) in readme.read_text()
    assert "old" not in readme.read_text()
    assert readme.read_text().endswith(report.MARKS[1] + "\nafter\n")
    names = set(re.findall(r"\(images/(\w+)\.png\)", page.read_text()))
    assert names == {path.stem for path in (tmp_path / "docs" / "images").iterdir()}
    assert {"study", "study_forest", "study_constants", "study_mu", "study_ablation", "study_drift"} <= names
    assert "study_size" not in names
    before = {path: path.read_bytes() for path in (tmp_path / "docs" / "images").iterdir()}
    report.main(data, page)
    assert before == {path: path.read_bytes() for path in before}


def test_errors(tmp_path):
    with pytest.raises(ValueError, match="no records"):
        report.main(tmp_path, tmp_path / "study.md")
    (tmp_path / "README.md").write_text(report.MARKS[0])
    with pytest.raises(ValueError, match="must hold each of these lines once"):
        report.main(tmp_path, tmp_path / "study.md", tmp_path / "README.md")
    with pytest.raises(ValueError, match="phase must be one of"):
        study([fakes.record(phase="pilot")])


def test_readme_table_is_short():
    lines = report.readme_table(fakes.everything()).splitlines()
    assert lines[0] == "| arm | development, % | `gac` minus it | confirmation, % | `gac` minus it |"
    assert 12 < len(lines) < 25
    assert not any("constant 0." in line for line in lines)


def test_means_over_unlike_pairs_are_not_set_side_by_side():
    whole = fakes.comparison(seeds=[1, 2])
    begun = [r for r in fakes.comparison(seeds=[3]) if r["method"] in ("gac", "paper")]
    assert study(whole + begun).development.arms == study(whole).development.arms
    nothing_whole = [
        fakes.record(),
        fakes.record(seed=2),
        fakes.record(method="paper"),
        fakes.record(method="hpt", seed=2),
    ]
    found = study(nothing_whole).development
    assert found.left_out == 0
    assert set(found.versus) == {"paper", "hpt"}

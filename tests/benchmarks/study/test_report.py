"""The report on runs that never happened: it says what the numbers say, and what is missing."""

import json
import re

import pytest

from benchmarks.study import report
from benchmarks.study.analysis import PHASES, seen_from, size_contrast, sizes, study
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
    assert "worse by " in _sentence(lost, 1).split("; it is, ")[0]
    assert "better by " in _sentence(lost, 1).split("; it is, ")[1]
    assert _sentence(won, 1).count("better than 5 of 5 (constant 0.1") == 2
    assert "better than 5 of 5 (chord-mu" in _sentence(won, 2)
    assert "better than 4 of 4 (hpt" in _sentence(won, 2)
    assert "worse than 5 (" in _sentence(lost, 2)
    assert "worse than 4 (" in _sentence(lost, 2)
    assert "better by" in _sentence(won, 3)
    assert "worse by" in _sentence(lost, 3)
    assert "on gradients is better by" in _sentence(won, 4)
    assert "on gradients is worse by" in _sentence(lost, 4)
    assert _sentence(won, 5).count("In none of 8 data sets") == 2
    assert "in hindsight in 4 of 8 data sets (chain_sum, legs, rotate and syllogism)" in _sentence(lost, 5)
    assert "none turns around" in _sentence(won, 5)
    assert "better turns to worse or back for" in _sentence(lost, 5)


def test_what_a_search_finds_in_the_same_data_is_not_tested(won):
    found = study(fakes.everything(gac=0.26)).development
    for name in ("fixed:search", "fixed:hindsight", "sequential:search"):
        assert name not in found.adjusted
        assert found.verdict(name) == "untested"
        assert name not in found.told_apart()
    assert found.adjusted["fixed:carried"] == found.adjusted[found.carried("fixed")]
    assert re.search(r"of a search in the same data set `gac` is ahead of it by [\d.]+ points .*not tested", won, re.I)
    row = next(line for line in won.splitlines() if line.startswith("| constant by search"))
    assert "**" not in row


def test_a_search_that_does_worse_than_single_constants_says_so():
    """Two constants alike, each better on every other seed: the search follows the wrong one."""
    records = []
    for seed in range(1, 5):
        for task in fakes.DEVELOPMENT:
            cell = {"task": task, "seed": seed}
            records.append(_flat(fakes.record(**cell), 0.5))
            records.append(_flat(fakes.record(method="fixed", setting="mu=0.1", **cell), 0.4 + 0.1 * (seed % 2)))
            records.append(_flat(fakes.record(method="fixed", setting="mu=0.3", **cell), 0.5 - 0.1 * (seed % 2)))
    chapter = _chapter(_page(records), "Is the default law better than the best constant?")
    assert "did better than that search (constant 0.1 and constant 0.3)" in chapter


def _flat(record, late):
    return record | {"accuracy": [[step, 0.3 if step == 0 else late] for step, _ in record["accuracy"]]}


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


def test_another_learning_rate_of_the_best_constant_is_named():
    """Where both differ, nobody knows which of mu and the rate was why."""
    moved = [
        r | {"lr": 3e-3} if r["phase"] == "comparison" and r["setting"] in ("mu=0.5", "mu=0.9") else r
        for r in fakes.everything(gac=0.08)
    ]
    page = _page(moved)
    chapter = _chapter(page, "Where does it lose, and why?")
    assert "best constant of 0.5, which has another learning rate (0.003, not 0.001)." in chapter
    assert "best constant of 0.9, which has another learning rate (0.003, not 0.001)." in chapter
    assert "Constants run at the learning rates tuned for them, 0.001 to 0.003" in page


def test_size_trend():
    found = sizes(study(fakes.everything()))
    assert list(found) == ["small", "medium", "large"]
    assert size_contrast(found, "paper")[:2] == ("large", "small")
    # runs that are copies of the comparison's have its margins, searches included
    records = fakes.comparison(seeds=range(1, 6))
    arms = {("gac", ""), ("paper", ""), *(("fixed", setting) for setting in fakes.CONSTANTS[::2])}
    some = [r for r in records if (r["method"], r["setting"]) in arms and r["seed"] <= 3]
    copies = [r | {"phase": "size", "size": s, "key": f"{s}{r['key']}"} for r in some for s in ("medium", "large")]
    found = sizes(study(records + copies))
    for name in ("paper", "fixed:mu=0.1", "fixed:search", "fixed:hindsight"):
        assert len({found[size].versus[name].mean for size in found}) == 1, name
        assert size_contrast(found, name)[2].mean == 0
    grown = [r if r["size"] != "large" or r["method"] != "gac" else _lifted(r) for r in fakes.everything()]
    page = _page(grown)
    assert "the margin over paper's controller grows" in page
    assert re.search(r"margins over [^;]*paper's controller[^;]* grow", _sentence(page, 6))
    assert "no change is told apart from 0 in those over" in _sentence(_page(records + copies), 6)


def test_sizes_without_the_default_law_wait_for_it():
    records = [r for r in fakes.everything() if r["phase"] != "size" or r["method"] != "gac"]
    assert _chapter(_page(records), "Does the margin change").strip().endswith("Not yet run.")
    assert "**Size.**" not in _page(records)


def _lifted(record):
    return record | {"accuracy": [[step, min(value + (0.1 if step else 0), 1.0)] for step, value in record["accuracy"]]}


def test_exposure_sets_every_arm_beside_itself(won):
    """Rules gain 0.04 where every prompt has a demonstration, `gac` and the constant nothing."""
    chapter = _chapter(won, "Do rules that act per prompt lack demonstrations?")
    rows = {line.split(" | ")[0].strip("| "): line.split(" | ") for line in chapter.splitlines() if "| " in line}
    assert list(rows)[2:] == ["gac (default)", "constant 0.5", "gac without momentum", *sorted(fakes.PER_PROMPT)]
    assert abs(float(rows["gac (default)"][2].split()[0])) < 2
    assert float(rows["hpt"][2].split()[0]) > 2
    assert "Where the solution of every prompt is a demonstration" in _sentence(won, 2)
    by_task = [line for line in chapter.splitlines() if line.startswith("`gac` minus constant 0.5 by data set: ")]
    assert [line.count("(mean mu 0.5") for line in by_task] == [4, 4]


def test_the_first_form_of_the_law_is_judged_like_the_default(won):
    """It gains 0.05 less where it loses to the constant, and the same runs are what the default is compared with."""
    chapter = _chapter(won, "How did the law come to count momentum?")
    records = fakes.everything(gac=0.26, coefficient=0.12)
    found = study(records)
    first = seen_from(found.development, "gac:momentum=0")
    assert not any(name.startswith("gac") for name in first.versus)
    both = found.development.versus["paper"].mean - found.development.versus["gac:momentum=0"].mean
    assert first.versus["paper"].mean == pytest.approx(both)
    rows = {line.split(" | ")[0].strip("| "): line.strip("| ").split(" | ") for line in chapter.splitlines()}
    shown = [cell.strip("* ").split()[0] for cell in rows["paper's controller"][1:3]]
    assert shown == [f"{100 * x.versus['paper'].mean:+.1f}" for x in (first, found.development)]
    assert chapter.count("the law without momentum is, against single constants, ") == 4
    beaten = [r | {"method": "gac", "setting": "momentum=0;every-prompt"} for r in records if _is_first(r)]
    lost = _page([r for r in records if not _is_first(r)] + [_lowered(r) for r in beaten])
    text = _chapter(lost, "How did the law come to count momentum?")
    assert "constants, better than 0 of 1, worse than 1 (constant 0.5)" in text


def test_arms_at_replaced_rates_are_shown_and_named_where_they_did_better():
    records = fakes.everything(gac=0.2)
    carried = study(records).development.carried("fixed")
    setting = carried.partition(":")[2]
    again = [r for r in records if (r["phase"], r["method"], r["setting"]) == ("comparison", "fixed", setting)]
    for shift, worse in ((0.05, 1), (-0.05, 0)):
        old = [_shifted(r, shift) | {"lr": 3e-4, "key": r["key"] + "old"} for r in again]
        page = report.page(study(records, old), {}, COMPLETE)
        chapter = _chapter(page, "What did the second pass of tuning change?")
        assert f"the better one for {worse} of 1;" in chapter
        row = next(line for line in chapter.splitlines() if line.startswith(f"| constant {setting[3:]}"))
        cells = [cell.strip() for cell in row.strip("| ").split(" | ")]
        assert cells[1::3] == ["0.0003", "0.001"]
        assert float(cells[3].split()[0]) == pytest.approx(float(cells[6].split()[0]) - 100 * shift, abs=0.11)
        assert ("at 0.0003 the default law is ahead of it by" in _sentence(page, 1)) == bool(worse)


def _shifted(record, shift):
    return record | {"accuracy": [[step, value + shift * (step > 0)] for step, value in record["accuracy"]]}


def _is_first(record):
    return record["phase"] == "exposure" and record["setting"].startswith("momentum=0")


def _lowered(record):
    return record | {"accuracy": [[step, max(value - 0.15 * (step > 0), 0.0)] for step, value in record["accuracy"]]}


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
    assert "not judged yet against 5 arms" in _sentence(page, 2)
    assert "not judged yet against 4 arms" in _sentence(page, 2)
    assert "The default law is not compared yet" in _sentence(page, 3)  # no earlier runs
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
    assert [line.split("|")[1].strip() for line in lines[2:]] == [
        "gac (default)",
        "constant from earlier runs",
        "RL alone",
        "paper's controller",
    ]


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

"""Regret against numbers by hand."""

import math

import numpy as np
import pytest

from benchmarks.study.inference import interval
from benchmarks.study.regret import by_task, of_phase, picture, regrets, text

ARMS = {
    "fixed:mu=0.1": ("fixed", "mu=0.1"),
    "fixed:mu=0.9": ("fixed", "mu=0.9"),
    "aim": ("aim", ""),
    "gac": ("gac", ""),
}
LATE = {  # by regime and task: late accuracies of seeds 1 and 2, in percent
    ("clean", "a"): {"fixed:mu=0.1": (20, 22), "fixed:mu=0.9": (30, 34), "aim": (31, 31), "gac": (28, 30)},
    ("clean", "b"): {"fixed:mu=0.1": (50, 50), "fixed:mu=0.9": (40, 44), "aim": (50, 52), "gac": (45, 47)},
    ("wrong-50", "a"): {"fixed:mu=0.1": (12, 10), "fixed:mu=0.9": (2, 4), "aim": (12, 12), "gac": (5, 5)},
    ("wrong-50", "b"): {"fixed:mu=0.1": (30, 32), "fixed:mu=0.9": (8, 8), "aim": (24, 26), "gac": (10, 14)},
}


def records(late=LATE):
    found = []
    for (regime, task), arms in late.items():
        for name, values in arms.items():
            for seed, value in enumerate(values, start=1):
                method, setting = ARMS[name]
                record = {
                    "key": f"{regime}/{task}/{name}/{seed}", "task": task, "seed": seed, "method": method,
                    "setting": setting, "size": "small", "law": f"{method}:{setting}",
                    "accuracy": [[0, 0.1], [25, value / 100 - 0.01], [50, value / 100], [75, value / 100 + 0.01]],
                }  # fmt: skip
                found.append(record if regime == "clean" else record | {"regime": regime})
    return found


def test_by_hand():
    found = regrets(records())
    assert list(found) == list(ARMS)
    # best: clean a .9, clean b .1, wrong-50 .1 in both
    lost = {"clean": [[-1, 3], [0, -2]], "wrong-50": [[0, -2], [6, 6]]}
    for regime, groups in lost.items():
        wanted = interval([np.array(group, dtype=float) for group in groups])
        assert found["aim"].by_regime[regime] == pytest.approx(wanted)
        bounds = interval([np.array(group, dtype=float) for group in groups], 1 - 0.05 / 2)
        if regime == "wrong-50":
            assert found["aim"].worst[0] == pytest.approx(2.5)
            assert found["aim"].worst[2] >= bounds[2] - 1e-9
    assert found["aim"].where == "wrong-50"
    # a pair of the mean over regimes: task a (-1+0)/2, (3-2)/2, task b (0+6)/2, (-2+6)/2
    assert found["aim"].mean == pytest.approx(interval([np.array([-0.5, 0.5]), np.array([3.0, 2.0])]))
    assert found["gac"].by_regime["clean"][0] == pytest.approx((2 + 4 + 5 + 3) / 4)
    assert (found["gac"].worst[0], found["gac"].where) == (pytest.approx((7 + 5 + 20 + 18) / 4), "wrong-50")
    assert found["fixed:mu=0.1"].by_regime["wrong-50"][0] == 0.0
    assert found["fixed:mu=0.1"].by_regime["clean"][0] == pytest.approx((10 + 12) / 4)


def test_the_worst_case_has_bounds_of_all_regimes_together():
    """In 19 of 20 studies or more the largest true mean lies within them, however many regimes are nearly the worst."""
    rng, inside = np.random.default_rng(0), 0
    truth = (3.0, 2.9, 2.8, 1.0)
    for _ in range(80):
        late = {}
        for k, mean in enumerate(truth):
            for task in "ab":
                best = rng.normal(30, 2, 4)
                names = dict.fromkeys(("fixed:mu=0.1", "gac"))
                names |= {"fixed:mu=0.1": tuple(best), "fixed:mu=0.9": tuple(best - 20), "aim": tuple(best)}
                late[f"r{k}", task] = names | {"gac": tuple(best - mean - rng.normal(0, 1, 4))}
        _, low, high = regrets(records(late))["gac"].worst
        inside += low <= max(truth) <= high
    assert inside / 80 > 0.95 - 3 * math.sqrt(0.05 * 0.95 / 80)


def test_only_cells_that_all_arms_have_count():
    some = [r for r in records() if not (r["method"] == "gac" and r["task"] == "b" and r["seed"] == 2)]
    found = regrets(some)
    assert found["gac"].by_regime["clean"][0] == pytest.approx(((2 + 4) / 2 + 5) / 2)


def test_a_run_that_broke_counts_nothing():
    rows = records()
    for row in rows:
        if row["method"] == "gac":
            row["accuracy"] = [[0, 0.1], *([step, math.nan] for step in (25, 50, 75))]
    assert regrets(rows)["gac"].by_regime["clean"][0] == pytest.approx((30 + 34 + 50 + 50) / 4)


def test_clear_errors():
    rows = records()
    with pytest.raises(ValueError, match="two constants or more, got fixed:mu="):
        regrets([row for row in rows if row["setting"] != "mu=0.9"])
    with pytest.raises(ValueError, match="two runs of arm"):
        regrets([*rows, rows[0]])
    with pytest.raises(ValueError, match="share the size"):
        regrets([*rows, rows[0] | {"size": "large", "seed": 3}])
    with pytest.raises(ValueError, match="there is none yet"):
        regrets([row for row in rows if (row["method"] == "gac") == (row["seed"] == 1)])


def test_the_table_has_the_least_worst_case_first():
    lines = text(records()).splitlines()
    assert lines[0] == "| arm | worst case | in | mean | clean | wrong-50 |"
    assert [line.split(" | ")[0].removeprefix("| ") for line in lines[2:]] == [
        "aim", "constant 0.1", "gac (default)", "constant 0.9",
    ]  # fmt: skip
    assert " | wrong-50 | " in lines[2]


def test_the_picture_has_every_task_of_every_regime(tmp_path, monkeypatch):
    import matplotlib.pyplot as plt

    found = by_task(records())
    assert next(iter(found)) == "aim"
    assert found["aim"]["wrong-50"] == [("a", pytest.approx(-1.0)), ("b", pytest.approx(6.0))]
    assert list(found["gac"]) == ["clean", "wrong-50"]
    kept = []
    monkeypatch.setattr(plt, "close", kept.append)
    picture(records(), tmp_path / "new" / "regret.png")
    assert (tmp_path / "new" / "regret.png").read_bytes()[:4] == b"\x89PNG"
    axes = kept[-1].axes
    assert [axis.get_title(loc="left") for axis in axes] == ["clean", "wrong-50"]
    row = list(found).index("aim")
    marks = [line for line in axes[1].lines if line.get_marker() not in ("", "None") and line.get_ydata()[0] == row]
    assert sorted(line.get_xdata()[0] for line in marks) == pytest.approx([-1.0, 6.0])
    (mean,) = [line for line in axes[1].lines if len(line.get_xdata()) == 2 and line.get_ydata()[0] == row - 0.35]
    assert list(mean.get_xdata()) == pytest.approx([2.5, 2.5])
    plt.close("all")


def test_clean_runs_of_the_comparison_stand_in():
    """For the same arm, task and rate, where the regimes have none of their own."""
    made = [record | {"phase": "regimes", "lr": 1e-4} for record in records() if record.get("regime") == "wrong-50"]
    own = made + [record | {"phase": "regimes", "lr": 1e-4} for record in records() if record["key"] == "clean/a/gac/1"]
    clean = [record | {"phase": "comparison", "lr": 1e-4} for record in records() if "regime" not in record]
    other_rate = [record | {"lr": 3e-4} for record in clean]
    found = of_phase([*own, *clean, *other_rate, *({"phase": "tuning"} for _ in range(2))], "regimes")
    keys = [record["key"] for record in found]
    assert sorted(keys) == sorted(record["key"] for record in records())
    assert all(record["lr"] == 1e-4 for record in found)
    assert next(r for r in found if r["key"] == "clean/a/gac/1")["phase"] == "regimes"
    unknown = [record for record in made if record["method"] != "aim"]
    assert {r["method"] for r in of_phase([*unknown, *clean], "regimes")} == {"gac", "fixed"}


def test_labels_alone_make_no_other_run():
    """Of two sources: what does not read labels is as where half of the demonstrations are wrong."""
    half = [record | {"phase": "regimes", "lr": 1e-4} for record in records() if record.get("regime") == "wrong-50"]
    assert {r["regime"] for r in of_phase(half, "regimes")} == {"wrong-50"}, "nothing that reads labels has run"
    reads = [
        r | {"method": "gac-source", "regime": "sources"} for r in half if r["method"] == "aim" and r["task"] == "a"
    ]
    found = of_phase([*half, *reads], "regimes")
    added = [r for r in found if r["regime"] == "sources" and r["method"] != "gac-source"]
    assert {r["task"] for r in added} == {"a"}
    assert {(r["key"], r["accuracy"][-1][1]) for r in added} == {
        (r["key"], r["accuracy"][-1][1]) for r in half if (r["task"], r["seed"]) in {("a", s["seed"]) for s in reads}
    }
    own = half[0] | {"regime": "sources", "key": "run itself"}
    again = of_phase([*half, *reads, own], "regimes")
    same = [r for r in again if r["regime"] == "sources" and (r["method"], r["seed"]) == (own["method"], own["seed"])]
    assert [r["key"] for r in same if r["task"] == own["task"] and r["setting"] == own["setting"]] == ["run itself"]

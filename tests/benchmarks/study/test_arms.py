"""Pairs, and what search may and may not see."""

import pytest

from benchmarks.study.arms import arm, best_setting, by_arm, label, paired, with_searches
from benchmarks.study.measures import read_run
from tests.benchmarks.study.fakes import record


def _run(late, **row):
    """A run whose late accuracy is `late`."""
    flat = [[step, 0.3 if step == 0 else late] for step in range(0, 121, 20)]
    return read_run(record(accuracy=flat, **row))


def _constants(table, **row):
    """Runs of constants: ``table[mu][seed - 1]`` is the late accuracy."""
    found = []
    for mu, values in table.items():
        found += [_run(v, method="fixed", setting=f"mu={mu}", seed=s, **row) for s, v in enumerate(values, start=1)]
    return found


@pytest.mark.parametrize(
    ("method", "setting", "name", "shown"),
    [
        ("gac", "", "gac", "gac (default)"),
        ("gac", "exact", "gac", "gac (default)"),
        ("gac", "coefficient", "gac-coefficient", "gac in coefficient space"),
        ("gac", "half_life=7", "gac:half_life=7", "gac half_life=7"),
        ("gac", "alpha=0.25", "gac:alpha=0.25", "gac tuned: alpha=0.25"),
        ("fixed", "mu=0.3", "fixed:mu=0.3", "constant 0.3"),
        ("fixed", "", "fixed:mu=0.5", "constant 0.5"),
        ("sequential", "split=0", "sequential:split=0", "RL alone"),
        ("sequential", "split=200", "sequential:split=200", "SFT alone"),
        ("chord-mu", "decay=40", "chord-mu:decay=40", "chord-mu decay=40"),
    ],
)
def test_names(method, setting, name, shown):
    assert arm(record(method=method, setting=setting)) == name
    assert label(name) == shown


def test_search_leaves_its_own_seed_out():
    # seed 1 would choose 0.3 by itself; its other seeds say 0.7, and those of seed 2 and 3 too
    arms = with_searches(by_arm(_constants({0.3: [0.9, 0.4, 0.4], 0.7: [0.5, 0.6, 0.6]})))
    found = {seed: run.setting for (_, seed), run in arms["fixed:search"].items()}
    assert found == {1: "mu=0.7", 2: "mu=0.3", 3: "mu=0.3"}
    assert {run.setting for run in arms["fixed:hindsight"].values()} == {"mu=0.3"}
    assert "fixed:carried" not in arms


def test_search_uses_seeds_that_every_constant_has():
    runs = _constants({0.3: [0.5, 0.5, 0.9], 0.7: [0.6, 0.6]})
    arms = with_searches(by_arm(runs))
    assert set(arms["fixed:search"]) == {("chain_sum", 1), ("chain_sum", 2)}
    assert {run.setting for run in arms["fixed:search"].values()} == {"mu=0.7"}


def test_carried_over_constant_comes_from_earlier_runs_alone():
    earlier = _constants({0.3: [0.7], 0.7: [0.5]}, phase="tuning", lr=0.001)
    earlier += _constants({0.7: [0.6]}, phase="tuning", lr=0.003)
    arms = by_arm(_constants({0.3: [0.4, 0.4], 0.7: [0.6, 0.6]}))
    assert best_setting(earlier, arms) == "fixed:mu=0.3"
    assert with_searches(arms, earlier)["fixed:carried"] is arms["fixed:mu=0.3"]


def test_pairs_and_their_errors():
    gac = by_arm([_run(0.5, seed=1), _run(0.6, seed=2)])["gac"]
    other = by_arm(_constants({0.3: [0.4, 0.4, 0.4]}))["fixed:mu=0.3"]
    assert paired(gac, other) == {"chain_sum": pytest.approx([0.1, 0.2])}
    assert paired(gac, other, lambda run: None) == {}
    with pytest.raises(ValueError, match="two runs of arm 'gac'"):
        by_arm([_run(0.5), _run(0.5, lr=0.003)])
    with pytest.raises(ValueError, match="share the size"):
        by_arm([_run(0.5), _run(0.5, size="large", seed=2)])


def test_a_default_that_is_also_named_counts_once():
    runs = [_run(0.5, method="sequential", setting=setting) for setting in ("", "split=60")]
    assert len(by_arm(runs)["sequential:split=60"]) == 1

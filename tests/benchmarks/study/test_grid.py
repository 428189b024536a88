"""The rows of the phases, and what tuning chooses."""

import pytest

from benchmarks.study import grid
from benchmarks.study.ablations import registered
from benchmarks.study.methods import METHODS, STEPS, VARIANTS, arm_of
from gac.cli._config import TrainConfig
from gac.controller import Controller
from gac.laws.rules import carried_out


def record(row: grid.Row, late: float) -> dict:
    """A record of a run that ends at an accuracy."""
    curve = [[step, late] for step in range(0, STEPS + 1, 25)]
    return {
        **vars(row), "key": row.key, "steps": STEPS, "accuracy": curve, "kl": [[step, 0.0] for step, _ in curve],
        "mu": [0.5] * STEPS, "law": arm_of(row.method, row.setting).law, "seconds": 1.0, "seconds_per_step": 0.1,
        "gac_share": 0.01, "domain": "math", "role": "development", "parameters": 1,
    }  # fmt: skip


def tuned(best_lr: float, best_setting: str) -> list[dict]:
    """A complete tuning phase in which one learning rate and, for chord-mu, one setting are best."""
    records: list[dict] = []
    while True:
        done = {item["key"] for item in records}
        rows = [row for row in grid.rows("tuning", records) if row.key not in done]
        if not rows:
            return records
        records += [record(row, 0.3 + 0.1 * (row.lr == best_lr) + 0.1 * (row.setting == best_setting)) for row in rows]


def test_tuning_tries_as_many_settings_of_every_method():
    counts = {}
    for row in grid.rows("tuning", tuned(3e-4, "decay=100")):
        counts[row.method] = counts.get(row.method, 0) + 1
    assert set(counts) == set(METHODS)
    assert len(set(counts.values())) == 1


def test_tuning_chooses_the_best_of_what_was_run_and_only_once_all_was():
    records = tuned(1e-3, "decay=100")
    assert grid.chosen_lr("chord-mu", records) == 1e-3
    assert grid.chosen_setting("chord-mu", records) == "decay=100"
    assert grid.chosen_setting("gac", records) == ""
    assert grid.chosen_setting("chord-mu", records[:-1]) is None or records[-1]["method"] != "chord-mu"
    first = next(item for item in records if item["method"] == "gac")
    assert grid.chosen_lr("gac", [item for item in records if item is not first]) is None


def test_later_phases_wait_for_tuning_and_use_what_it_chose():
    with pytest.raises(grid.NotReady, match=r"'comparison' needs \d+ more runs"):
        grid.rows("comparison", [])
    records = tuned(1e-4, "decay=100")
    rows = grid.rows("comparison", records)
    assert {row.lr for row in rows} == {1e-4}
    assert {row.setting for row in rows if row.method == "chord-mu"} == {"decay=100"}
    assert {row.setting for row in rows if row.method == "gac"} == {""}
    assert len({row.seed for row in rows}) >= 5
    assert not {row.seed for row in rows} & set(grid.TUNING_SEEDS)
    confirmation = {row.task for row in grid.rows("confirmation", records)}
    assert len(confirmation) == 4
    assert not confirmation & {row.task for phase in ("tuning", "comparison", "ablation") for row in
                               grid.rows(phase, records)}  # fmt: skip


def test_ablations_and_sizes_have_their_pairs_among_the_comparison():
    records = tuned(1e-4, "")
    small = grid.rows("comparison", records)
    paired = {(row.task, row.seed) for row in small if (row.method, row.setting) == ("gac", "")}
    for phase in ("ablation", "size"):
        rows = grid.rows(phase, records)
        assert {(row.task, row.seed) for row in rows} <= paired
        assert len({row.seed for row in rows}) >= 3
    arms = {(row.method, row.setting, row.lr) for row in grid.rows("size", records)}
    assert arms <= {(row.method, row.setting, row.lr) for row in small}


def test_keys_are_unique_and_lead_back_to_their_rows():
    records = tuned(1e-4, "")
    rows = [row for phase in grid.PHASES for row in grid.rows(phase, records)]
    assert len({row.key for row in rows}) == len(rows)
    assert grid.Row.from_record(record(rows[-1], 0.5)) == rows[-1]


def test_every_arm_has_a_law_that_can_be_made():
    arms = [arm_of(method, setting) for method, spec in METHODS.items() for setting in ("", *spec.trials)]
    arms += [arm_of("gac", variant) for variant in VARIANTS]
    for arm in arms:
        name, options = TrainConfig(law=arm.law, prior=arm.prior).law_and_options()
        with carried_out(), registered():
            law = Controller(name, **options).law
        assert arm.beta > 0 or "kl" not in law.needs


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="unknown phase 'tunning'; known: tuning"):
        grid.rows("tunning", [])
    with pytest.raises(ValueError, match="unknown method 'gacc'; known: gac"):
        arm_of("gacc", "")

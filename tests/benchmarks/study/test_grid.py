"""The rows of the phases, and what tuning chooses."""

import dataclasses

import pytest

from benchmarks.study import grid
from benchmarks.study.ablations import registered
from benchmarks.study.methods import METHODS, PER_PROMPT, STEPS, VARIANTS, WITHOUT_MOMENTUM, arm_of, own_setting
from benchmarks.study.tuning import TUNING_SEEDS, Tuning
from gac.laws.controller import Controller
from gac.runs.config import TrainConfig


def record(row: grid.Row, late: float) -> dict:
    """A record of a run that ends at an accuracy."""
    curve = [[step, late] for step in range(0, STEPS + 1, 25)]
    return {
        **vars(row), "key": row.key, "steps": STEPS, "accuracy": curve, "kl": [[step, 0.0] for step, _ in curve],
        "mu": [0.5] * STEPS, "law": arm_of(row.method, row.setting).law, "seconds": 1.0, "seconds_per_step": 0.1,
        "gac_share": 0.01, "domain": "math", "role": "development", "parameters": 1,
    }  # fmt: skip


def tuned(best_lr: float, best_setting: str, late=None) -> list[dict]:
    """A complete tuning phase in which one learning rate and, for chord-mu, one setting are best, or as `late` says."""
    late = late or (lambda row: 0.3 + 0.1 * (row.lr == best_lr) + 0.1 * (row.setting == best_setting))
    records: list[dict] = []
    while True:
        done = {item["key"] for item in records}
        rows = [row for row in grid.rows("tuning", records) if row.key not in done]
        if not rows:
            return records
        records += [record(row, late(row)) for row in rows]


def rated(records: list[dict], late=lambda row: 0.3) -> list[dict]:
    """With the learning rates of larger models besides."""
    while rows := [row for row in grid.rows("rates", records) if row.key not in {item["key"] for item in records}]:
        records = records + [record(row, late(row)) for row in rows]
    return records


def choices(records: list[dict]) -> Tuning:
    return Tuning(records, grid.tasks("development"))


def test_tuning_tries_as_many_settings_of_every_method():
    """What arms that are no default get besides is a learning rate, never another setting."""
    records = tuned(3e-4, "decay=100")
    trials = {method: set() for method in METHODS}
    for row in grid.rows("tuning", records):
        trials[row.method].add((row.setting, row.lr))
    for method, spec in METHODS.items():
        first = {("", lr) for lr in grid.LEARNING_RATES} | {(setting, 3e-4) for setting in spec.trials}
        assert len(first) == 7
        assert first <= trials[method]
        more = {setting for setting, _ in trials[method] - first}
        own = {"fixed": set(grid.CONSTANTS), "sequential": set(grid.SPLITS), "chord-mu": {"decay=100"}}
        assert more <= (own | {"gac": {WITHOUT_MOMENTUM}}).get(method, set())


def test_tuning_chooses_the_best_of_what_was_run_and_only_once_all_was():
    records = tuned(1e-3, "decay=100")
    assert choices(records).lr("chord-mu") == 1e-3
    assert choices(records).setting("chord-mu") == "decay=100"
    assert choices(records).setting("gac") == ""
    last = max(i for i, item in enumerate(records) if item["method"] == "chord-mu" and item["setting"] == "valley=0.3")
    assert choices(records[:last] + records[last + 1 :]).setting("chord-mu") is None
    first = next(item for item in records if item["method"] == "gac")
    assert choices([item for item in records if item is not first]).lr("gac") is None


def test_an_arm_climbs_to_a_learning_rate_of_its_own():
    """The top at `mu=0.1` lies three rates above that of the default; at `mu=0.9` it is the default's."""

    def late(row):
        top = {"mu=0.1": 1e-3, "split=0": 1e-5}.get(row.setting, 3e-5)
        return 0.5 - 0.05 * abs(grid.LEARNING_RATES.index(row.lr) - grid.LEARNING_RATES.index(top))

    records = tuned(3e-5, "", late)
    found = choices(records)
    assert found.arm_lr("fixed", "") == found.arm_lr("fixed", "mu=0.5") == 3e-5
    assert found.climb("fixed", "mu=0.1") == (1e-3, [3e-5, 1e-5, 1e-4, 3e-4, 1e-3])
    assert found.climb("fixed", "mu=0.9") == (3e-5, [3e-5, 1e-5, 1e-4])
    assert found.climb("sequential", "split=0") == (1e-5, [3e-5, 1e-5, 1e-4])
    rates = {(row.method, row.setting): row.lr for row in grid.rows("comparison", records)}
    assert rates["fixed", "mu=0.1"] == 1e-3
    assert rates["sequential", "split=0"] == 1e-5
    assert rates["sequential", "split=200"] == rates["gac", ""] == 3e-5


def test_equals_stay_where_they_are():
    found = choices(tuned(3e-5, "", lambda row: 0.3 + 0.1 * (row.lr == 3e-5 and row.setting == "")))
    assert found.arm_lr("fixed", "mu=0.1") == 3e-5


def test_exposure_gives_every_prompt_a_demonstration_and_changes_nothing_else():
    records = tuned(1e-4, "")
    plain = {(row.method, row.setting, row.lr) for row in grid.rows("comparison", records)}
    rows = grid.rows("exposure", records)
    confirmed = {row.method for row in rows if row.task in grid.tasks("confirmation")}
    assert confirmed == {"gac", "fixed"}
    assert {row.method for row in rows} == {"gac", "fixed", *PER_PROMPT}
    for row in rows:
        arm = arm_of(row.method, row.setting)
        assert arm.every_prompt
        assert dataclasses.replace(arm, every_prompt=False) == arm_of(row.method, own_setting(row.setting))
        assert (row.method, own_setting(row.setting), row.lr) in plain


def test_later_phases_wait_for_tuning_and_use_what_it_chose():
    with pytest.raises(grid.NotReady, match=r"'comparison' needs \d+ more runs"):
        grid.rows("comparison", [])
    records = tuned(1e-4, "decay=100")
    rows = grid.rows("comparison", records)
    assert {row.lr for row in rows} == {1e-4}
    assert {row.setting for row in rows if row.method == "chord-mu"} == {"decay=100"}
    assert {row.setting for row in rows if row.method == "gac"} == {"", WITHOUT_MOMENTUM}
    assert len({row.seed for row in rows}) >= 5
    assert not {row.seed for row in rows} & set(TUNING_SEEDS)
    confirmation = {row.task for row in grid.rows("confirmation", records)}
    assert len(confirmation) == 4
    assert not confirmation & {row.task for phase in ("tuning", "comparison", "ablation") for row in
                               grid.rows(phase, records)}  # fmt: skip


def test_ablations_and_sizes_have_their_pairs_among_the_comparison():
    records = tuned(1e-4, "")
    small = grid.rows("comparison", records)
    paired = {(row.task, row.seed) for row in small if (row.method, row.setting) == ("gac", "")}
    records = rated(records)
    for phase in ("ablation", "size"):
        rows = grid.rows(phase, records)
        assert {(row.task, row.seed) for row in rows} <= paired
        assert len({row.seed for row in rows}) >= 3
    arms = {(row.method, row.setting, row.lr) for row in grid.rows("size", records)}
    assert arms <= {(row.method, row.setting, row.lr) for row in small}, "no lower rate was better"


def test_larger_models_get_lower_rates_as_long_as_these_are_better():
    """At 1e-4 on the small one. Large: `gac` is best at 1e-5, constant 0.5 at 3e-5, others as they were."""
    top = {("gac", ""): 1e-5, ("fixed", "mu=0.5"): 3e-5}

    def late(row):
        best = top.get((row.method, row.setting), 1e-4) if row.size == "large" else 1e-4
        return 0.5 - 0.05 * abs(grid.LEARNING_RATES.index(row.lr) - grid.LEARNING_RATES.index(best))

    records = tuned(1e-4, "")
    with pytest.raises(grid.NotReady, match=r"'size' needs \d+ more runs of the rates phase"):
        grid.rows("size", records)
    records = rated(records, late)
    asked: dict = {}
    for row in grid.rows("rates", records):
        assert row.seed in TUNING_SEEDS
        asked.setdefault((row.size, row.method, row.setting), set()).add(row.lr)
    assert len(asked) == 2 * 6, "the arms of both larger sizes"
    assert asked["large", "gac", ""] == {1e-4, 3e-5, 1e-5}
    assert asked["large", "fixed", "mu=0.5"] == {1e-4, 3e-5, 1e-5}
    assert asked["large", "paper", ""] == asked["medium", "gac", ""] == {1e-4, 3e-5}
    found = {(row.size, row.method, row.setting): row.lr for row in grid.rows("size", records)}
    assert found["large", "gac", ""] == 1e-5
    assert found["large", "fixed", "mu=0.5"] == 3e-5
    assert {lr for arm, lr in found.items() if arm[0] == "medium" or arm[1] == "paper"} == {1e-4}


def test_candidates_of_the_regimes_climb_to_rates_of_their_own():
    """From that of ``gac``; `gac-reward` is best a rate below, `aim-reward` where it starts."""
    top = {"gac-reward": 3e-5, "aim-reward": 1e-4}

    def late(row):
        return 0.5 - 0.05 * abs(grid.LEARNING_RATES.index(row.lr) - grid.LEARNING_RATES.index(top[row.method]))

    records = tuned(1e-4, "")
    rates = lambda: {row.method: row.lr for row in grid.rows("regimes", records)}
    assert rates()["gac-reward"] == 1e-4, "as gac, while nothing was tried"
    asked: dict = {}
    while rows := [row for row in grid.rows("regimes-tuning", records) if row.key not in {r["key"] for r in records}]:
        for row in rows:
            asked.setdefault(row.method, set()).add(row.lr)
            assert row.seed in TUNING_SEEDS
        records = records + [record(row, late(row)) for row in rows]
    assert asked == {"gac-reward": {1e-4, 3e-5, 3e-4, 1e-5}, "aim-reward": {1e-4, 3e-5, 3e-4}}
    assert [rates()[name] for name in ("gac-reward", "aim-reward", "aim", "gac")] == [3e-5, 1e-4, 1e-4, 1e-4]


def test_the_lowest_rate_of_the_grid_is_not_tried_again():
    assert choices(tuned(1e-5, "")).descend("gac", "", 1e-5) == (1e-5, [])


def test_keys_are_unique_and_lead_back_to_their_rows():
    records = rated(tuned(1e-4, ""))
    rows = [row for phase in grid.PHASES for row in grid.rows(phase, records)]
    assert len({row.key for row in rows}) == len(rows)
    assert grid.Row.from_record(record(rows[-1], 0.5)) == rows[-1]


def test_every_arm_has_a_law_that_can_be_made():
    arms = [arm_of(method, setting) for method, spec in METHODS.items() for setting in ("", *spec.trials)]
    arms += [arm_of("gac", variant) for variant in VARIANTS]
    for arm in arms:
        name, options = TrainConfig(law=arm.law, prior=arm.prior).law_and_options()
        with registered():
            law = Controller(name, **options).law
        assert arm.beta > 0 or "kl" not in law.needs


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="unknown phase 'tunning'; known: tuning"):
        grid.rows("tunning", [])
    with pytest.raises(ValueError, match="unknown method 'gacc'; known: gac"):
        arm_of("gacc", "")

"""Each regime does what it says, and nothing else; a short run of each kind."""

import json

import pytest
import torch

from benchmarks.study import grid, training
from benchmarks.study.__main__ import main
from benchmarks.study.methods import CANDIDATES, METHODS, PER_PROMPT
from benchmarks.study.regimes import (
    CLEAN,
    CONFIRMATION,
    PASS_RATE,
    REGIMES,
    Turning,
    cut,
    demonstrate,
    noisy,
    regime_of,
    wrong_answers,
)
from benchmarks.study.rows import Row
from gac.tasks.problems import exact_match
from tests.benchmarks.study.test_grid import tuned

SEED = 3
PROMPTS = [
    {"prompt": f"{k}+1=", "completion": str(k + 1), "answer": str(k + 1), "demonstrated": k < 400} for k in range(1200)
]


def shown(name: str) -> list[dict]:
    return [row for row in demonstrate(REGIMES[name], PROMPTS, SEED) if row["demonstrated"]]


def right(rows: list[dict]) -> float:
    return sum(exact_match(row["completion"], row["answer"]) for row in rows) / len(rows)


def test_clean_changes_nothing():
    assert demonstrate(REGIMES[CLEAN], PROMPTS, SEED) == PROMPTS
    reward = lambda completions: [1.0]
    assert noisy(REGIMES[CLEAN], reward, SEED) is reward


@pytest.mark.parametrize(
    ("name", "count", "share"),
    [
        ("wrong-25", 400, 0.75),
        ("wrong-50", 400, 0.5),
        ("wrong-100", 400, 0.0),
        ("format", 400, 0.0),
        ("few", 40, 1.0),
        ("many", 1200, 1.0),
        ("sparse", 400, 1.0),
        ("flipped", 400, 1.0),
        ("turns", 400, 1.0),
        ("sources", 400, 0.5),
    ],
)
def test_what_is_demonstrated(name, count, share):
    rows = demonstrate(REGIMES[name], PROMPTS, SEED)
    assert [(row["prompt"], row["answer"]) for row in rows] == [(row["prompt"], row["answer"]) for row in PROMPTS]
    assert len(shown(name)) == count
    assert right(shown(name)) == share
    assert rows == demonstrate(REGIMES[name], PROMPTS, SEED)
    assert PROMPTS[0].keys() == {"prompt", "completion", "answer", "demonstrated"}  # they are not written into
    if share not in (0.0, 1.0):
        assert rows != demonstrate(REGIMES[name], PROMPTS, SEED + 1)


def test_wrong_ones_are_answers_of_others():
    answers = {row["answer"] for row in PROMPTS}
    assert all(row["completion"] in answers for row in shown("wrong-100"))
    with pytest.raises(ValueError, match="all prompts have the same answer"):
        wrong_answers([{"answer": "1"}] * 3, SEED)


def test_another_format_is_right_inside():
    assert all(row["completion"] == f"[{row['answer']}]" for row in shown("format"))


def test_one_source_is_wrong():
    rows = shown("sources")
    for source, share in (("a", 1.0), ("b", 0.0)):
        own = [row for row in rows if row["source"] == source]
        assert len(own) == 200
        assert right(own) == share
    wrong = [row["completion"] for row in shown("wrong-50")]
    assert [row["completion"] for row in rows] == wrong  # the label is all that differs


def test_a_fifth_of_the_rewards_is_flipped():
    given = [float(k % 3 == 0) for k in range(3000)]
    flipped, again = (noisy(REGIMES["flipped"], lambda values: values, SEED) for _ in range(2))
    found = flipped(given[:1000]) + flipped(given[1000:])
    share = sum(a != b for a, b in zip(found, given, strict=True)) / 3000
    assert share == pytest.approx(0.2, abs=4 * (0.2 * 0.8 / 3000) ** 0.5)
    assert set(found) == {0.0, 1.0}
    assert found == again(given)  # however it is called


def test_demonstrations_turn():
    rows = Turning([{"a": 1}, {"a": 2}], [{"a": 3}, {"a": 4}])
    assert (len(rows), rows[1], list(rows)) == (2, {"a": 2}, [{"a": 1}, {"a": 2}])
    rows.turned = True
    assert (rows[1], list(rows)) == ({"a": 4}, [{"a": 3}, {"a": 4}])
    with pytest.raises(ValueError, match="as many"):
        Turning([{}], [])


def test_a_warm_start_is_cut_until_few_samples_pass():
    assert cut(200, lambda steps: steps / 2000) == (90, 0.045)
    assert cut(200, lambda steps: 0.5) == (10, 0.5)  # the shortest, where none is
    assert PASS_RATE == 0.05


def test_names():
    with pytest.raises(ValueError, match="known regimes: clean, wrong-25"):
        regime_of("dirty")
    assert all(name == regime.name and regime.story for name, regime in REGIMES.items())
    assert set(CONFIRMATION) < set(REGIMES)
    assert len(CONFIRMATION) >= 3


def test_rows_of_the_regimes():
    """Every arm in every regime, but what acts per prompt where demonstrations turn.

    The clean ones are named as rows always were, and keys lead back.
    """
    records = tuned(1e-4, "decay=100")
    for phase, role, names in (
        ("regimes", "development", set(REGIMES)),
        ("regimes-confirmation", "confirmation", {CLEAN, *CONFIRMATION}),
    ):
        rows = grid.rows(phase, records)
        assert len({row.key for row in rows}) == len(rows)
        assert {row.regime for row in rows} == names
        assert {row.task for row in rows} == set(grid.tasks(role))
        arms = {name: {(r.method, r.setting, r.lr) for r in rows if r.regime == name} for name in names}
        found = arms[CLEAN]
        for name, here in arms.items():
            assert here == {arm for arm in found if name != "turns" or arm[0] not in PER_PROMPT}
        assert {("fixed", constant) for constant in grid.CONSTANTS} < {(m, s) for m, s, _ in found}
        assert set(CANDIDATES) | {"gac", "paper"} | set(PER_PROMPT) <= {m for m, _, _ in found}
        assert {lr for m, _, lr in found if m in CANDIDATES} == {1e-4}
        for row in rows[:: len(rows) // 20]:
            assert Row.from_record({**row.fields, "key": row.key}) == row
            assert ("regime" in row.fields) == (row.regime != CLEAN) == row.key.endswith(row.regime)
    assert not set(CANDIDATES) & set(METHODS)


@pytest.fixture
def short_runs(monkeypatch):
    from benchmarks.study.tasks import TASKS

    monkeypatch.setattr(training, "STEPS", 4)
    monkeypatch.setattr(training, "EVALUATE_EVERY", 4)
    monkeypatch.setitem(TASKS["spell_backward"].warm_start_steps, "small", 3)
    threads, onednn = torch.get_num_threads(), torch.backends.mkldnn.enabled
    yield
    torch.set_num_threads(threads)
    torch.backends.mkldnn.enabled = onednn


def test_a_run_in_a_regime(short_runs, tmp_path, monkeypatch):
    """Law aim, demonstrations that turn, a record that names its regime; two steps of each kind are read."""
    from gac.trainers.demonstrations import DemonstrationCollator

    read = []
    encode = DemonstrationCollator.encode

    def spy(self, index):
        row = self.demonstrations[index]
        if isinstance(self.demonstrations, Turning):
            read.append(row["completion"] == row["answer"])
        return encode(self, index)

    monkeypatch.setattr(DemonstrationCollator, "encode", spy)
    row = Row("regimes", "spell_backward", "small", "aim", "", 3e-4, 7, "turns")
    record = training.train_row(row, tmp_path)
    assert record["regime"] == "turns"
    assert record["key"].endswith("/turns")
    assert record["law"] == "aim"
    assert Row.from_record(record) == row
    steps = read[-4 * training.STEP_DEMONSTRATIONS :]
    assert all(steps[: 2 * training.STEP_DEMONSTRATIONS])
    assert not any(steps[2 * training.STEP_DEMONSTRATIONS :])
    json.dumps(record, allow_nan=False)
    with pytest.raises(ValueError, match="'turns' has no form for 'hpt'"):
        training.train_row(Row("regimes", "spell_backward", "small", "hpt", "", 3e-4, 7, "turns"), tmp_path)


def test_sparse_runs_have_a_warm_start_of_their_own(short_runs, tmp_path):
    rows = [Row("regimes", "spell_backward", "small", "fixed", "", 3e-4, 7, name) for name in ("flipped", "sparse")]
    assert [training.warm_start_id(row) for row in rows] == [
        f"spell_backward-small-seed7{end}" for end in ("", "-sparse")
    ]
    _, folder = training.warm_start(rows[1], tmp_path)
    assert folder.name.endswith("-sparse")


def test_rows_are_chosen_by_arm_regime_and_seed(monkeypatch, capsys):
    """Of the committed data, with nothing trained."""
    ran = []
    monkeypatch.setattr("benchmarks.study.pool.run_rows", lambda rows, **_: ran.extend(rows) or [])
    chosen = ["--arms", "chord-mu:valley=0.3", "paper", "--regimes", "wrong-50", "few", "--seeds", "2"]
    assert main(["run", "--phase", "regimes", *chosen]) == 0
    assert len(ran) == 2 * 2 * 4
    assert {row.method for row in ran} == {"chord-mu", "paper"}
    assert {row.regime for row in ran} == {"wrong-50", "few"}
    assert {row.seed for row in ran} == {2}
    assert main(["run", "--phase", "regimes", "--arms", "gca"]) == 2
    assert "--arms gca: no such rows; choose from aim, aim-reward" in capsys.readouterr().err
    assert main(["run", "--phase", "regimes", "--regimes", "wrong-5"]) == 2
    assert "--regimes wrong-5: no such rows" in capsys.readouterr().err


def test_unknown_phases_are_refused(capsys):
    assert main(["regret", "--phase", "tuning"]) == 2
    assert "regimes-confirmation" in capsys.readouterr().err

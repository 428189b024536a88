import json

import pytest

from gac.audit.run import RAW
from gac.cli import main
from tests.gac.cli.test_cli import TINY

AUDIT = ["audit", *TINY, "--steps", "3"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A small audit with two points."""
    out = tmp_path_factory.mktemp("audit") / "run"
    assert main([*AUDIT, "--steps", "4", "--every", "2", "--replicates", "3", "--out", str(out)]) == 0
    return out


def test_data_and_picture(finished):
    data = json.loads((finished / "audit.json").read_text())
    assert data["command"][:2] == ["gac", "audit"]
    assert data["versions"]["torch"]
    assert [point["step"] for point in data["record"]["points"]] == [1, 3]
    assert data["figures"]["points"] == 2
    assert set(data["figures"]["verdict"]) == {"by sums", "by ratios"}
    assert len(data["record"]["mu"]["the run's law"]) == 4
    assert (finished / "audit.png").stat().st_size > 20_000
    assert (finished / "metrics.jsonl").exists()


def test_again_gives_the_same_tables_and_trains_nothing(finished, tmp_path, capsys):
    before = (finished / RAW).read_bytes()
    assert main(["audit", "--again", str(finished), "--json", str(tmp_path / "a.json")]) == 0
    shown = capsys.readouterr().out
    assert "laws, on this run's parameters" in shown
    assert "of the oracle's" in shown
    assert (tmp_path / "a.json").read_bytes() == (finished / "audit.json").read_bytes()
    assert (finished / RAW).read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*AUDIT, "--law", "hpt"], "--law hpt acts per prompt or token"),
        ([*AUDIT, "--law", "gac", "--law-option", "alpha='kl'"], "moves its target"),
        ([*AUDIT, "--every", "9"], "--every 9 measures no truth in --steps 3"),
        ([*AUDIT, "--replicates", "2", "--every", "2"], "--replicates 2 is too few"),
        (["audit", "--again", "absent"], "absent holds no finished audit"),
    ],
)
def test_mistakes_exit_with_2_and_one_line(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]


def test_finished_runs_are_not_overwritten(finished, capsys):
    assert main([*AUDIT, "--every", "2", "--out", str(finished)]) == 2
    assert "already holds a run" in capsys.readouterr().err

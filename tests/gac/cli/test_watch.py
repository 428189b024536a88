"""``gac watch``: once where there is no terminal, following on one."""

import json
import sys

import pytest

from gac.cli import main, watch
from gac.runs.folder import METRICS
from tests.gac.runs.test_watching import record, write

rich = pytest.importorskip("rich.console")


@pytest.fixture
def terminal(monkeypatch):
    """Standard output taken for a terminal of 100 columns."""
    console = rich.Console
    monkeypatch.setattr(rich, "Console", lambda **options: console(force_terminal=True, width=100, **options))


def test_one_look_where_there_is_no_terminal(tmp_path, capsys):
    """The run is not finished: waiting for it would not end."""
    write(tmp_path, [1, 2])
    assert main(["watch", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "step 2 of 8" in text
    assert "\x1b" not in text


def test_once_on_a_terminal(tmp_path, capsys, terminal):
    write(tmp_path, [1, 2])
    assert main(["watch", str(tmp_path), "--once"]) == 0
    assert "\x1b[" in capsys.readouterr().out


def test_follows_until_the_run_ends(tmp_path, capsys, terminal, monkeypatch):
    write(tmp_path, [1, 2])

    def sleep(seconds):
        assert seconds == 0.5
        step = len((tmp_path / METRICS).read_text().splitlines()) + 1
        with (tmp_path / METRICS).open("a") as file:
            file.write(json.dumps(record(step)) + "\n")

    monkeypatch.setattr(watch.time, "sleep", sleep)
    assert main(["watch", str(tmp_path), "--every", "0.5"]) == 0
    text = capsys.readouterr().out
    assert all(f"step {step} of 8" in text for step in range(2, 9))
    assert text.index("step 8 of 8") < text.index("finished")


def test_ctrl_c_leaves_the_last_look(tmp_path, capsys, terminal, monkeypatch):
    write(tmp_path, [1, 2])

    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(watch.time, "sleep", interrupt)
    assert main(["watch", str(tmp_path)]) == 0
    assert "step 2 of 8" in capsys.readouterr().out


def test_mistakes_exit_with_2_and_one_line(tmp_path, capsys, monkeypatch):
    for arguments, message in (
        ([str(tmp_path / "absent")], "no such run"),
        ([str(tmp_path)], "no run directory"),
        ([str(tmp_path), "--every", "0"], "not a number above 0"),
        ([], "RUN"),
    ):
        assert main(["watch", *arguments]) == 2
        assert message in capsys.readouterr().err.strip().splitlines()[-1]
    write(tmp_path, [1])
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert main(["watch", str(tmp_path)]) == 2
    assert "needs rich" in capsys.readouterr().err

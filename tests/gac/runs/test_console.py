"""What a run shows where there is no terminal."""

import pytest

from gac.runs.console import Reporter, duration, markdown_table, size


def test_lines_at_milestones_alone(capsys):
    reporter = Reporter()
    reporter.begin("training", 4)
    reporter.advance(1, reward=0.5)
    reporter.advance(2, milestone=True, reward=0.5, accuracy=None)
    reporter.end()
    assert capsys.readouterr().out == "training 2/4  reward 0.500\n"


def test_tables(capsys):
    Reporter().table("title", ["", "value"], [["a row", "1.5"]])
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("title", "value", "a row", "1.5"))
    assert markdown_table(["", "value"], [["a row", "1.5"]]) == "|  | value |\n|---|---:|\n| a row | 1.5 |\n"


@pytest.mark.parametrize(("seconds", "text"), [(5.4, "5 s"), (75, "1 min 15 s"), (3600, "60 min 00 s")])
def test_durations(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"), [(None, "unknown"), (3 * 2**20, "3 MiB"), (2**30, "1.00 GiB"), (5 * 2**29, "2.50 GiB")]
)
def test_sizes(count, text):
    assert size(count) == text

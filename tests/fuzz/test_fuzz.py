"""The fuzzer by a few draws, and proof that it finds faults that are planted."""

from __future__ import annotations

import pytest

from tests.fuzz import kernels, mixer
from tests.fuzz.__main__ import main
from tests.fuzz.draw import Draw, Pass, Step
from tests.fuzz.drawing import drawn
from tests.fuzz.judge import judge, known_as
from tests.fuzz.known import KNOWN
from tests.fuzz.report import as_code

DRAWS = 50


def test_a_few_draws_find_nothing_new():
    tally = mixer.fuzz(20_000, range(DRAWS))
    assert tally.draws == DRAWS
    assert not tally.failures, "\n".join(tally.failures)


def test_a_draw_is_its_seed_and_number():
    assert drawn(3, 17) == drawn(3, 17)
    assert drawn(3, 17) != drawn(3, 18)
    assert drawn(3, 17) != drawn(4, 17)
    for number in range(50):
        draw = drawn(0, number)
        assert eval(as_code(draw), {"Draw": Draw, "Pass": Pass, "Step": Step}) == draw


@pytest.mark.parametrize("known", KNOWN, ids=lambda known: known.name)
def test_known_findings_are_still_there(known):
    """An entry whose example succeeds has been mended: take it out, and its line in docs/fuzzing.md."""
    failure = judge(known.example)
    assert failure is not None, f"{known.name!r} is mended"
    assert known_as(failure) == [known]


def test_a_few_calls_of_kernels_find_nothing():
    tally = kernels.fuzz(20_000, range(120))
    assert tally.draws == 120
    assert not tally.failures, "\n".join(tally.failures)


def test_the_command(capsys):
    assert main(["--draws", "6", "--seconds", "60", "--seed", "20000"]) == 0
    out = capsys.readouterr().out
    assert "mixer: 6 draws" in out
    assert "kernels: 6 draws" in out

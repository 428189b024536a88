"""The fuzzer by a few draws, and proof that it finds faults that are planted."""

from __future__ import annotations

import pytest
import torch

import gac
from gac import weights
from gac.laws.gac import GacLaw
from gac.observe import contribution, observer, pending
from gac.observe.ledger import Ledger
from tests.fuzz import mixer
from tests.fuzz.draw import Draw, Pass, Step, drawn
from tests.fuzz.judge import judge, known_as, shrunk
from tests.fuzz.known import KNOWN
from tests.fuzz.report import as_code

DRAWS = 50


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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


def _wrong_weight(monkeypatch):
    real = weights.Weights.__init__

    def swapped(self, mu):
        real(self, mu)
        self.of = dict(zip(self.of, reversed(self.of.values()), strict=True))

    monkeypatch.setattr(weights.Weights, "__init__", swapped)


def _weight_not_undone(monkeypatch):
    real = weights.Weights.__init__

    def kept(self, mu):
        real(self, mu)
        self.undone = {branch: torch.ones(()) for branch in self.undone}

    monkeypatch.setattr(weights.Weights, "__init__", kept)


def _branches_swapped(monkeypatch):
    real = Ledger.end
    other = {gac.statistics.Branch.SFT: gac.statistics.Branch.RL, gac.statistics.Branch.RL: gac.statistics.Branch.SFT}
    monkeypatch.setattr(Ledger, "end", lambda self, branch, scale: real(self, other[branch], scale))


def _previous_forgotten(monkeypatch):
    real = Ledger.begin

    def begin(self):
        real(self)
        if self.previous is not None:
            self.previous.zero_()

    monkeypatch.setattr(Ledger, "begin", begin)


def _tokens_ignored(monkeypatch):
    real = contribution.Contribution
    monkeypatch.setattr(observer, "Contribution", lambda branch, tokens: real(branch, None))


def _gradients_lost(monkeypatch):
    """A pass that reaches fewer parameters than the first one of its kind leaves out one of them."""
    real = pending.Pending.take

    def take(self, moments):
        if len(self.gradients) > 1:
            self.gradients.pop(next(iter(self.gradients)))
        return real(self, moments)

    monkeypatch.setattr(pending.Pending, "take", take)


def _gradient_changed(monkeypatch):
    real = observer.Observer.finish

    def finish(self):
        real(self)
        for parameter in self.parameters[:1]:
            if parameter.grad is not None and not parameter.grad.is_sparse:
                parameter.grad.mul_(1.001)

    monkeypatch.setattr(observer.Observer, "finish", finish)


def _momentum_ignored(monkeypatch):
    monkeypatch.setattr(gac.Mixer, "_measure_by", lambda self, optimizer: self._measurement.follow(optimizer))


def _state_forgotten(monkeypatch):
    monkeypatch.setattr(gac.Controller, "load_state_dict", lambda self, state: None)


def _foreign_error(monkeypatch):
    monkeypatch.setattr(GacLaw, "update", lambda self, statistics, step: {}["mu"])


FAULTS = {
    fault.__name__.strip("_").replace("_", " "): fault
    for fault in (
        _wrong_weight,
        _weight_not_undone,
        _branches_swapped,
        _previous_forgotten,
        _tokens_ignored,
        _gradients_lost,
        _gradient_changed,
        _momentum_ignored,
        _state_forgotten,
        _foreign_error,
    )
}


@pytest.mark.parametrize("name", FAULTS)
def test_planted_faults_are_found(name, monkeypatch):
    """Within 150 draws, as nothing that is known; and what is shrunk still shows it."""
    FAULTS[name](monkeypatch)
    for number in range(150):
        failure = judge(drawn(20_000, number))
        if failure is not None and not known_as(failure):
            break
    else:
        pytest.fail("not found")
    least = shrunk(failure, limit=60)
    assert judge(least.draw) is not None
    print(f"{name}: draw {number}, {least.kind}: {least.what[:200]}")

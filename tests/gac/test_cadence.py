"""Which steps are measured under a budget: in numbers alone, and in mixers whose clock is the test's."""

import math
import random

import pytest
import torch

import gac
import gac.branches
import gac.ending
import gac.mixer
import gac.observe.observer
import gac.quiet
import gac.spending
from gac.cadence import AIM, FLOOR, MOST, RESERVE, WARM_UP, BudgetCadence, Costs, FixedCadence

pytestmark = pytest.mark.budget


class Simulated:
    """A cadence and the account of its steps; seconds are drawn around given means."""

    def __init__(self, overhead=0.01, seed=0, ranks=1):
        self.cadences = [BudgetCadence(overhead) for _ in range(ranks)]
        self.draw = random.Random(seed)
        self.steps, self.log = 0, []  # (measured, gac, rest)
        self.report = [0.0] * 4

    def step(self, m, u, rest, moved=0.0):
        due = {cadence.is_due(self.steps) for cadence in self.cadences}
        assert len(due) == 1, "ranks disagree"
        measured = due.pop()
        gac_seconds = (m if measured else u) * self.draw.lognormvariate(0, 0.2)
        rest = rest * self.draw.lognormvariate(0, 0.1)
        for cadence in self.cadences:
            if measured:
                cadence.measured(Costs(*self.report, moved) if self.report[3] else None)
            else:
                cadence.passed()
        if measured:
            self.report = [0.0] * 4
        self.report[0 if measured else 1] += gac_seconds
        self.report[2] += rest
        self.report[3] += 1
        self.log.append((measured, gac_seconds, rest))
        self.steps += 1

    def share(self, first, last=None):
        part = self.log[first:last]
        return sum(g for _, g, _ in part) / sum(r for _, _, r in part)

    def measured(self, first=0, last=None):
        return sum(m for m, _, _ in self.log[first:last])


@pytest.mark.parametrize(
    ("m", "u", "rest"),
    [(1.3e-3, 2e-5, 3e-3), (25e-3, 1e-4, 0.75), (20e-3, 2e-3, 0.43), (43e-3, 3.6e-3, 0.475), (9e-3, 1e-5, 0.012)],
)
def test_the_share_stays_below_the_budget(m, u, rest):
    run = Simulated()
    for _ in range(4000):
        run.step(m, u, rest)
    assert run.measured(0, WARM_UP) == WARM_UP
    assert run.share(WARM_UP) < 0.01
    afforded = (4000 - WARM_UP) * (AIM * 0.01 * rest - u) / (m - u)  # some of it is kept
    assert run.measured(WARM_UP) > 0.9 * afforded - RESERVE - 3


def test_where_it_is_cheap_every_step_is_measured():
    run = Simulated()
    for _ in range(500):
        run.step(1e-3, 1e-5, 1.0)
    assert run.measured() == 500


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("factor", [0.1, 10.0])
def test_steps_that_change_are_followed(factor, seed):
    """The share over the change and after it, and how often is measured once it has settled."""
    run, m, u, rest = Simulated(seed=seed), 10e-3, 2e-5, 0.1
    for _ in range(1000):
        run.step(m, u, rest)
    for _ in range(6000):
        run.step(m, u, rest * factor)
    assert run.share(WARM_UP) < 0.01
    spent, outside = (sum(step[k] for step in run.log[3000:]) for k in (1, 2))
    assert spent < 0.01 * outside + 2 * RESERVE * 1.5 * m, "no more than was earned and kept"
    afforded = 4000 * min((AIM * 0.01 * rest * factor - u) / (m - u), 1.0)
    assert run.measured(3000) > 0.9 * afforded - RESERVE - 3


def test_one_long_pause_pays_for_few_measurements():
    run = Simulated()
    for step in range(600):
        run.step(10e-3, 2e-5, 60.0 if step == 300 else 0.1)
    before, after = run.measured(100, 300), run.measured(302, 502)
    assert after <= before + 10


def test_what_is_kept_is_spent_when_statistics_move():
    calm, moved = Simulated(), Simulated()
    for step in range(1000):
        calm.step(10e-3, 2e-5, 0.1)
        moved.step(10e-3, 2e-5, 0.1, moved=float(600 <= step < 800))
    assert moved.measured(600, 800) >= calm.measured(600, 800) + 5
    assert moved.share(WARM_UP) < 0.01


def test_a_budget_that_unmeasured_steps_use_up_still_measures():
    run = Simulated()
    for _ in range(3000):
        run.step(1e-3, 2e-4, 1e-3)
    assert run.measured(WARM_UP) >= 40
    assert run.share(WARM_UP) < 0.2 * (1 + 2 * FLOOR)


def test_ranks_decide_alike():
    run = Simulated(ranks=4)
    for step in range(2000):
        run.step(10e-3, 2e-5, 0.1, moved=float(step % 97 == 0))


def test_a_state_goes_on_alike():
    run = Simulated()
    for _ in range(777):
        run.step(10e-3, 2e-5, 0.1)
    first, second = run.cadences[0], BudgetCadence(0.01)
    second.load_state_dict(first.state_dict())
    run.cadences.append(second)
    for _ in range(500):
        run.step(10e-3, 2e-5, 0.1)
    assert second.measurements == first.measurements


def test_every_number_is_taken():
    """Costs of clocks that stand still or jump leave an interval within its bounds."""
    cadence = BudgetCadence(0.5)
    for values in [(0.0, 0.0, 0.0), (1e9, 0.0, 1e-9), (0.0, 1e9, 0.0), (1e-9, 1e-12, 1e9)] * 10:
        cadence.measured(Costs(*values, 3.0, 0.0))
        assert 1 <= cadence.interval <= MOST
        assert math.isfinite(float(cadence.state_dict()["balance"]))


def test_a_fixed_interval_goes_by_the_number_of_the_step():
    cadence = FixedCadence(3)
    assert [step for step in range(10) if cadence.is_due(step)] == [0, 3, 6, 9]
    assert [cadence.until_due(step) for step in range(5)] == [0, 2, 1, 0, 2]


# -- in mixers ------------------------------------------------------------------------------------------------------


class Clock:
    """Time that passes where the test says so: in GAC's code a little with every look, outside as told."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        self.now += 2e-6
        return self.now


@pytest.fixture
def clock(monkeypatch):
    found = Clock()
    for module in (gac.branches, gac.ending, gac.mixer, gac.observe.observer, gac.quiet, gac.spending):
        monkeypatch.setattr(module, "perf_counter", found)
    return found


class Model(torch.nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.linear = torch.nn.Linear(5, 4)

    def loss(self):
        return self.linear(torch.randn(3, 5)).square().mean()


def train(mixer, model, steps, outside, clock, **told):
    for _ in range(steps):
        for branch in (mixer.sft, mixer.rl):
            with branch():
                for _ in range(2):
                    mixer.backward(model.loss())
        if mixer._measurement.is_measured:
            clock.now += 5e-3  # what the kernels take, within the step's end
            mixer._observer.now.seconds += 5e-3
        clock.now += outside
        model.zero_grad()
        mixer.step(**told)


@pytest.mark.parametrize("outside", [0.01, 0.1, 3.0])
def test_a_mixer_keeps_its_budget(clock, outside):
    model = Model()
    with gac.patch(model) as mixer:
        train(mixer, model, 400, outside, clock)
        assert mixer.metrics()["overhead"] < 0.01
        assert (mixer.interval == 1) == (outside > 1)
        assert mixer._measurement.spending.cadence.measurements > 10


def test_a_run_under_a_budget_is_that_of_its_measurements(clock):
    """Passing steps by leaves mu, the law's state and the steps as ending each of them does."""
    models, mixers = [Model(), Model()], []
    for model in models:
        mixers.append(gac.patch(model, cap=0.001))
    passed = 0
    for step in range(150):
        for model, mixer in zip(models, mixers, strict=True):
            torch.manual_seed(step)
            told = {} if mixer is mixers[0] else {"alpha": 0.5}  # the law's own; who tells it something ends every step
            train(mixer, model, 1, 0.05, clock, **told)
        mixers[1]._measurement.spending.cadence.load_state_dict(mixers[0]._measurement.spending.cadence.state_dict())
        left = 0 if mixers[0]._observer.measuring else mixers[0]._quiet.left + 1
        mixers[1]._ending.catch_up()
        mixers[1]._measurement.spending.cadence._left = left
        mixers[1]._ending.plan()
        passed += mixers[0]._quiet.passed > 0
        assert float(mixers[0].mu) == float(mixers[1].mu)
        assert mixers[0].controller.steps == mixers[1].controller.steps == step + 1
    assert passed > 50
    for name, value in mixers[0].controller.law.state.items():
        torch.testing.assert_close(value, mixers[1].controller.law.state[name], rtol=1e-12, atol=0, equal_nan=True)
    for mixer in mixers:
        mixer.unpatch()


def test_numbers_of_steps_that_are_passed_by(clock):
    model = Model()
    with gac.patch(model) as mixer:
        train(mixer, model, 15, 0.01, clock)
        for step in range(15, 40):
            train(mixer, model, 1, 0.01, clock)
            told = mixer.metrics()
            assert told["step"] == step
            assert told["mu"] == pytest.approx(float(mixer.mu))
            assert (mixer.statistics is None) == math.isnan(told["distance2"])
            assert float(mixer.controller.mu) == pytest.approx(float(mixer.mu), abs=1e-6)
        state = mixer.state_dict()
        assert state["controller"]["steps"] == 40
        again = Model()
        with gac.patch(again) as other:
            other.load_state_dict(state)
            left = int(state["cadence"]["counts"][0])
            assert other._measurement.spending.cadence.until_due(40) == left
            for name in ("counts", "balance", "recent"):
                torch.testing.assert_close(other.state_dict()["cadence"][name], state["cadence"][name], equal_nan=True)


def test_a_backward_pass_is_still_looked_for(clock):
    model = Model()
    with gac.patch(model) as mixer:
        train(mixer, model, 15, 0.01, clock)
        assert not mixer._measurement.is_measured
        with pytest.raises(RuntimeError, match="nothing observed"):
            mixer.step()
        train(mixer, model, 1, 0.01, clock)


def test_weights_made_under_inference_mode_serve_backward_passes(clock):
    model = Model()
    with gac.patch(model, cap=1e-4) as mixer:
        for _ in range(40):
            for branch in (mixer.sft, mixer.rl):
                with branch():
                    (mixer.weight * model.loss()).backward()
            clock.now += 0.01
            with torch.inference_mode():
                mixer.step()
            model.zero_grad()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"overhead": 0.01, "interval": 2}, "leave one of them out"),
        ({"overhead": 0.0}, "overhead must be in"),
        ({"overhead": 2.0}, "overhead must be in"),
        ({"overhead": "1%"}, "overhead must be a number"),
        ({"interval": 0}, "interval must be a whole number"),
    ],
)
def test_what_cannot_be_is_refused(options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        gac.patch(Model(), **options)

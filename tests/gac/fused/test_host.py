"""The program of the CPU library that ends steps against plain floats and against torch, whatever it is told."""

import math
import random
from array import array

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gac
from gac.fused import law as on_floats
from gac.fused.host import HostProgram, HostVector, state_of_errors, vector_of
from gac.fused.state import HostState, numbers_of
from gac.fused.statistics import UNMEASURED, attach_errors, cosine_of, has_moved, statistics_of
from gac.fused.vector import OF_ERRORS
from gac.laws.base import Step
from gac.metrics import NAMES, OF_LAW
from gac.statistics.step import Statistics, noise_from_sums, pair_statistics
from gac.statistics.sums import StepSums, SumsOnHost
from gac.statistics.uncertainty import StandardErrors
from gac.weights import HostWeights, new_slots
from gac_kernels.cpu.ending import serves
from tests.gac.fused.test_law import OPTIONS, below_the_end, same, unit_of

pytestmark = pytest.mark.skipif(not serves(), reason="the CPU library does not serve")

KINDS = ("plain",) * 5 + ("one branch", "lone", "none", "broken", "weightless", "statistics", "nothing told")


class Three:
    """The same steps three times: in the program, on floats, in torch."""

    def __init__(self, options):
        self.controller = gac.Controller("gac", **options)
        self.errors = StandardErrors(torch.device("cpu"), torch.float64)
        self.law, self.own = (gac.Controller("gac", **options).law for _ in range(2))
        self.numbers, self.of_errors = numbers_of(self.law.state), numbers_of(self.errors.state)
        self.program, self.skipped = HostProgram(self.own), 0.0
        self.own_errors, self.own_skipped = dict(self.errors.state), 0.0
        self.vector, self.weights, self.moved = None, None, 0.0

    def step(self, sums, told, present=(True, True), lone=(False, False), statistics=None):
        """``sums`` None: nothing was measured, unless ``statistics`` were."""
        step = Step(self.controller.steps, **told)
        found = in_floats = source = None
        if statistics is not None:
            found = Statistics(**statistics)
            in_floats = {name: float(getattr(found, name)) for name in UNMEASURED}
            source = array("d", found.stacked().tolist())
        if sums is not None:
            in_floats = statistics_of(SumsOnHost(*sums), present, lone)
            power, tokens, n, nonfinite, silent, norms, by_time = (torch.tensor(x, dtype=torch.float64) for x in sums)
            total = StepSums(power, tokens, n * torch.tensor(present), nonfinite, silent, norms, by_time)
            known = torch.where(total.n > 0, by_time, math.nan)
            noise = torch.where(torch.tensor(lone), known, noise_from_sums(total, total.n))
            found = pair_statistics(noise=noise, norms=norms, n=total.n, nonfinite=nonfinite)
            source = array("d", [x for part in sums for x in (part if isinstance(part, tuple) else (part,))])
        if in_floats is not None:
            self.skipped += in_floats["nonfinite"] > 0
            before = self.of_errors["last"]
            self.of_errors, in_floats = attach_errors(self.of_errors, in_floats)
            self.moved = float(has_moved(before, in_floats))
            found = self.errors.attach(found)
        self.numbers = on_floats.update(self.law, self.numbers, in_floats, step)
        self.controller.update(found, **told)
        (slot,) = new_slots(1)
        self.vector = self.program(
            self.own_errors,
            self.own_skipped,
            step,
            source,
            weights=slot.address,
            from_statistics=statistics is not None,
            present=present,
            lone=lone,
        )
        self.own_errors, self.own_skipped = state_of_errors(self.vector), self.vector["skipped"]
        self.weights = HostWeights.written(slot, self.vector.numbers[0])
        return in_floats or UNMEASURED, found

    def compare(self, in_floats, found, rel=1e-12):
        own = self.own.state.numbers()
        assert list(own) == list(self.numbers)
        unit = unit_of(self.numbers)
        for name, value in own.items():
            assert same(value, self.numbers[name], rel, name, unit), (name, value, self.numbers[name])
            assert same(value, self.controller.law.state[name].tolist(), rel, name, unit), name
        for name in OF_ERRORS:
            assert same(self.own_errors.numbers()[name], self.of_errors[name], rel, name), name
            assert same(self.own_errors.numbers()[name], self.errors.state[name].tolist(), rel, name), name
        unit = unit_of(in_floats)
        expected = [HostWeights.rounded(self.numbers["mu"]), *(self.numbers[name] for name in OF_LAW.values())]
        expected += [self.skipped, *in_floats.values(), cosine_of(in_floats)]
        for name, value, wanted in zip(NAMES, self.vector.row, expected, strict=True):
            assert same(value, wanted, rel, name, unit), (name, value, wanted)
        if found is not None:
            assert self.vector["moved"] == self.moved
            for name in Statistics.names():
                mine = float(getattr(self.vector.statistics(), name))
                assert same(mine, float(getattr(found, name)), rel, name, unit), name
        weights = HostWeights(self.numbers["mu"])
        if HostWeights.rounded(own["mu"]) == float(weights.mu):  # the last bit of mu may lie between two float32
            for name in ("of", "undone"):
                assert list(map(float, getattr(self.weights, name).values())) == list(
                    map(float, getattr(weights, name).values())
                )
            assert self.weights.present_on_host == weights.present_on_host


def drawn(draw, kind):
    """Sums of a step."""
    n = [draw.choice([2.0, 3.0, 5.0]) for _ in range(2)]
    tokens = [draw.choice([k, 10.0 * k]) for k in n]
    a, b = draw.lognormvariate(0, 1), draw.lognormvariate(0, 1)
    norms = (a, b, draw.uniform(-0.9, 0.9) * math.sqrt(a * b))
    power = [draw.uniform(0.9, 3) * norms[k] / tokens[k] for k in range(2)]  # below 1 rounding has made it negative
    if kind == "one branch":
        n[draw.randrange(2)] = 0.0
    if kind == "lone":
        n[draw.randrange(2)] = 1.0
    return tuple(power), tuple(tokens), tuple(n), 3.0 * (kind == "broken"), 0.0, norms, (draw.random(), draw.random())


@pytest.mark.parametrize("case", OPTIONS)
def test_a_run_three_times(case):
    draw, three = random.Random(case), Three(OPTIONS[case])
    for number in range(120):
        kind = KINDS[number] if number < len(KINDS) else draw.choice(KINDS)
        sums = None if kind in ("none", "statistics") else drawn(draw, kind)
        present = (True, draw.random() < 0.5) if kind == "weightless" else (True, True)
        lone = tuple(sums[2][k] == 1 for k in range(2)) if kind == "lone" else (False, False)
        told = {"kl": draw.lognormvariate(-4, 1)}
        if draw.random() < 0.1:
            told |= {"alpha": draw.choice([draw.random(), torch.tensor(draw.random(), dtype=torch.float64)])}
        if draw.random() < 0.1:
            told |= {"prior": draw.choice([draw.random(), torch.tensor(draw.choice([math.inf, 1.5, 0.4]))])}
        if draw.random() < 0.1:
            told |= {"kl": torch.tensor(draw.choice([math.nan, 0.03]))}
        statistics = {"sigma_s2": 1.0, "sigma_r2": draw.random(), "delta_g2": draw.random(), "n_s": 4.0, "n_r": 3.0}
        three.compare(*three.step(sums, told, present, lone, statistics if kind == "statistics" else None))
        if number == 60:
            three.own.momentum = three.law.momentum = three.controller.law.momentum = 0.8
        if number % 40 == 7:  # as after a state was loaded: nothing stands in a vector
            three.own.state = HostState(three.own.state.numbers())


positive = below_the_end.map(abs)


@settings(max_examples=150, deadline=None)
@given(
    case=st.sampled_from(sorted(OPTIONS)),
    norms=st.tuples(positive, positive, below_the_end),
    power=st.tuples(positive, positive),
    n=st.tuples(st.integers(0, 3).map(float), st.integers(0, 3).map(float)),
    kl=below_the_end,
)
def test_any_numbers(case, norms, power, n, kl):
    # mu cancels where numbers differ by 300 orders of magnitude: what is compared is the kind of result there
    three = Three(OPTIONS[case])
    three.step(drawn(random.Random(0), "plain"), {"kl": 0.01})
    three.step((power, n, n, 0.0, 0.0, norms, (0.0, 0.0)), {"kl": kl})
    own = three.own.state.numbers()
    assert three.law.mu_min <= own["mu"] <= three.law.mu_max
    for name in ("mu", "waiting", "unsettled"):
        assert same(own[name], three.numbers[name], 1e-9, name), name
    assert math.isfinite(own["raw"]) == math.isfinite(three.numbers["raw"])


@pytest.mark.parametrize("passed", [1, 5, 400])
@pytest.mark.parametrize("case", ["defaults", "no guardrails"])
def test_steps_that_have_passed_are_made_up_for(case, passed):
    """By the program where nobody has read the state, and by the state where somebody has."""
    draw, three = random.Random(0), Three(OPTIONS[case])
    for _ in range(3):
        three.step(drawn(draw, "plain"), {})
    for seen in (False, True):
        three.own.state.passed = passed
        three.numbers = on_floats.coast(three.law, three.numbers, passed)
        for _ in range(passed):
            three.controller.update(None)
        assert three.own.state.vector is three.vector
        if seen:
            assert same(float(three.own.state["mu"]), three.numbers["mu"], 1e-12, "mu")
            assert three.own.state.vector is None
        three.compare(*three.step(drawn(draw, "plain"), {}))


def test_what_was_written_into_a_state_counts():
    three = Three({})
    for _ in range(2):
        three.step(drawn(random.Random(1), "plain"), {})
    before = three.vector.numbers[:]
    three.own.state["mu"].fill_(0.2)
    assert three.own.state.vector is None
    three.step(None, {})
    assert abs(three.vector["mu"] - 0.2) <= three.law.cap + 1e-12
    three.own.state["mu"] = torch.tensor(0.9, dtype=torch.float64)
    three.step(None, {})
    assert abs(three.vector["mu"] - 0.9) <= three.law.cap + 1e-12
    three.own_skipped = 7.0
    three.step(None, {})
    assert three.vector["skipped"] == 7.0
    assert before[0] != three.vector.numbers[0]


def test_a_vector_is_taken_as_it_is_only_where_both_states_stand_in_it():
    three, other = Three({}), Three({})
    for one in (three, other):
        one.step(drawn(random.Random(2), "plain"), {})
    vector, errors = three.vector, three.own_errors
    assert vector_of(three.own.state, errors, 0.0, 2) == (vector, 0)
    for law, own, skipped in (
        (three.own.state, other.own_errors, 0.0),
        (three.own.state, errors, 1.0),
        (three.own.state, dict(errors), 0.0),
        (dict(three.own.state), errors, 0.0),
    ):
        found, passed = vector_of(law, own, skipped, 2)
        assert found is not vector
        assert passed == 0
        for name in (*vector.names, *OF_ERRORS):
            assert same(found.of([name])[name], vector.of([name])[name], 0.0), name
        assert found["skipped"] == skipped


def test_parts_have_the_shapes_of_the_state():
    for case in OPTIONS:
        law = gac.Controller("gac", **OPTIONS[case]).law
        errors = StandardErrors(torch.device("cpu"), torch.float64).state
        vector, _ = vector_of(law.state, errors, 0.0, len(law.rates))
        assert isinstance(vector, HostVector)
        for name, value in law.state.items():
            assert same(vector.of([name])[name], value.tolist(), 0.0), name

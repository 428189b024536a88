"""The program that ends steps on a GPU against plain floats and against torch, on a GPU or in Triton's interpreter."""

import math
import random

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import _disable_current_modes

import gac
import gac.ending
import gac_kernels.triton
from gac.ending import why_in_torch
from gac.fused import device as on_device
from gac.fused import law as on_floats
from gac.fused.device import DeviceProgram
from gac.fused.state import HostState, numbers_of
from gac.fused.statistics import UNMEASURED, attach_errors, cosine_of, has_moved, statistics_of
from gac.fused.vector import OF_ERRORS, VectorState, vector_of
from gac.laws.base import Step
from gac.metrics import NAMES, OF_LAW
from gac.observe import ledger as ledgers
from gac.observe.contribution import Contribution, Seen
from gac.observe.reduction.local import LocalReduction
from gac.statistics import Branch
from gac.statistics.step import Statistics, noise_from_sums, pair_statistics
from gac.statistics.sums import StepSums, SumsOnHost
from gac.statistics.uncertainty import StandardErrors
from gac.weights import DeviceWeights, HostWeights, Weights
from gac_kernels import step_vector
from gac_kernels.triton import ending
from gac_kernels.triton import launch as starting
from tests.gac.fused.test_ending import Model, Operations, agree, everything, flat, train
from tests.gac.fused.test_law import below_the_end, same, unit_of

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if ON_GPU else torch.device("cpu")
pytestmark = [pytest.mark.gpu] if ON_GPU else []


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    """On a CPU: steps end in the program, norms are those of the Triton kernels, and dividing by 0 is no warning."""
    monkeypatch.setattr(on_device, "ON", {DEVICE.type})
    monkeypatch.setattr(ledgers, "pair_moments", gac_kernels.triton.pair_moments)
    with np.errstate(all="ignore"):
        yield


@pytest.fixture
def in_torch(monkeypatch):
    """Makes every step end in torch."""

    def switch(on: bool) -> None:
        monkeypatch.setattr(gac.ending, "why_in_torch", (lambda *_: "asked for") if on else why_in_torch)

    return switch


# -- one program ------------------------------------------------------------------------------------------------------

OPTIONS = {
    "defaults": {},
    "momentum, no guardrails": {"half_life": 2, "momentum": 0.9, "cap": 1.0, "mu_min": 0.0, "mu_max": 1.0},
    "a prior of known weight": {"prior": 0.3, "prior_weight": 0.25, "momentum": 0.5},
    "a schedule": {"prior": {"warmup": 2, "decay": 5, "peak": 0.9, "valley": 0.1}, "prior_sd": 0.05},
    "kl": {"alpha": "kl", "prior": lambda step: torch.tensor(math.nan if step % 3 else 0.7)},
}


class Three:
    """The same steps three times: in the program, on floats, in torch."""

    def __init__(self, options):
        self.controller, self.errors = (
            gac.Controller("gac", **options),
            StandardErrors(torch.device("cpu"), torch.float64),
        )
        self.law = gac.Controller("gac", **options).law
        self.numbers = numbers_of(self.law.state)
        self.of_errors = numbers_of(self.errors.state)
        self.own = gac.Controller("gac", **options).law
        self.own.to(DEVICE)
        self.program, self.skipped, self.moved = DeviceProgram(self.own, DEVICE), 0.0, 0.0
        self.names, self.averages = tuple(self.own.state), len(self.own.rates)
        zero = torch.zeros((), dtype=torch.float64, device=DEVICE)
        errors = StandardErrors(DEVICE, torch.float64).state
        self.vector = vector_of(self.own.state, errors, zero, self.averages, DEVICE)
        self.weights = DeviceWeights.first(self.own.mu)

    def step(self, sums, told, present=(True, True), lone=(False, False), statistics=None):
        """``sums`` None: nothing was measured, unless ``statistics`` were."""
        step = Step(self.controller.steps, **told)
        for k, branch in enumerate(Branch):  # what the weights of the step say
            self.weights.of[branch].copy_(torch.tensor(0.5 if present[k] else 0.0))
        found = in_floats = None
        if statistics is not None:
            found = Statistics(**statistics)
            in_floats = {name: float(getattr(found, name)) for name in UNMEASURED}
        if sums is not None:
            in_floats = statistics_of(SumsOnHost(*sums), present, lone)
            power, tokens, n, nonfinite, silent, norms, by_time = (torch.tensor(x, dtype=torch.float64) for x in sums)
            total = StepSums(power, tokens, n * torch.tensor(present), nonfinite, silent, norms, by_time)
            noise = torch.where(
                torch.tensor(lone), torch.where(total.n > 0, by_time, math.nan), noise_from_sums(total, total.n)
            )
            found = pair_statistics(noise=noise, norms=norms, n=total.n, nonfinite=nonfinite)
        source = (
            None
            if found is None
            else found.stacked()
            if sums is None
            else torch.tensor([*_flat(sums)], dtype=torch.float64)
        )
        if in_floats is not None:
            self.skipped += in_floats["nonfinite"] > 0
            before = self.of_errors["last"]
            self.of_errors, in_floats = attach_errors(self.of_errors, in_floats)
            self.moved = float(has_moved(before, in_floats))
            found = self.errors.attach(found)
        self.numbers = on_floats.update(self.law, self.numbers, in_floats, step)
        self.controller.update(found, **told)
        told = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in told.items()}
        self.vector, numbers = self.program(
            self.vector,
            self.weights.numbers,
            Step(step.number, **told),
            None if source is None else source.to(DEVICE),
            from_statistics=sums is None and statistics is not None,
            lone=lone,
        )
        self.own.state = VectorState(self.vector, self.names)
        self.weights = DeviceWeights(numbers)
        return in_floats or UNMEASURED, found

    def compare(self, in_floats, found, rel=1e-12):
        own, weights = {name: x.tolist() for name, x in self.own.state.items()}, HostWeights(self.numbers["mu"])
        assert own.keys() == self.numbers.keys()
        unit = unit_of(self.numbers)
        for name, value in own.items():
            assert same(value, self.numbers[name], rel, name, unit), (name, value, self.numbers[name])
            assert same(value, self.controller.law.state[name].tolist(), rel, name, unit), name
        for name in OF_ERRORS:
            assert same(self.vector[name].tolist(), self.of_errors[name], rel, name), name
            assert same(self.vector[name].tolist(), self.errors.state[name].tolist(), rel, name), name
        unit = unit_of(in_floats)
        expected = [HostWeights.rounded(self.numbers["mu"]), *(self.numbers[name] for name in OF_LAW.values())]
        expected += [self.skipped, *in_floats.values(), cosine_of(in_floats)]
        row = dict(zip(NAMES, self.vector.row.tolist(), strict=True))
        for (name, value), wanted in zip(row.items(), expected, strict=True):
            assert same(value, wanted, rel, name, unit), (name, value, wanted)
        for name in Statistics.names() if found is not None else ():
            statistic = float(getattr(self.vector.statistics(), name))
            assert same(statistic, float(getattr(found, name)), rel, name, unit), name
        if found is not None:
            assert float(self.vector["moved"]) == self.moved
        mine = [*self.weights.of.values(), *self.weights.undone.values(), self.weights.mu]
        theirs = [*weights.of.values(), *weights.undone.values(), weights.mu]
        if HostWeights.rounded(own["mu"]) == float(weights.mu):  # the last bit of mu may lie between two float32
            assert list(map(float, mine)) == list(map(float, theirs))


def _flat(sums):
    return [x for part in sums for x in (part if isinstance(part, tuple) else (part,))]


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
    bad = 3.0 if kind == "broken" else 0.0
    return tuple(power), tuple(tokens), tuple(n), bad, 0.0, norms, (draw.random(), draw.random())


KINDS = ("plain", "plain", "one branch", "lone", "none", "broken", "plain", "weightless", "statistics")


@pytest.mark.parametrize("case", OPTIONS)
def test_a_run_three_times(case):
    draw, three = random.Random(case), Three(OPTIONS[case])
    for number, kind in enumerate(KINDS):
        sums = None if kind in ("none", "statistics") else drawn(draw, kind)
        present = (True, draw.random() < 0.5) if kind == "weightless" else (True, True)
        lone = tuple(sums[2][k] == 1 for k in range(2)) if kind == "lone" else (False, False)
        told = {"kl": draw.lognormvariate(-4, 1)}
        if number == 4:
            told |= {"alpha": torch.tensor(draw.random(), dtype=torch.float64), "prior": draw.random()}
        if number == 5:
            told |= {"kl": torch.tensor(0.03), "prior": torch.tensor(draw.choice([math.inf, 0.4]))}
        statistics = {"sigma_s2": 1.0, "sigma_r2": draw.random(), "delta_g2": draw.random(), "n_s": 4.0, "n_r": 3.0}
        told_of = statistics if kind == "statistics" else None
        three.compare(*three.step(sums, told, present, lone, told_of))
        if number == 6:
            three.own.momentum = three.law.momentum = three.controller.law.momentum = 0.8


positive = below_the_end.map(abs)


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
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
    own = {name: x.tolist() for name, x in three.own.state.items()}
    assert three.law.mu_min <= own["mu"] <= three.law.mu_max
    for name in ("mu", "waiting", "unsettled"):
        assert same(own[name], three.numbers[name], 1e-9, name), name
    assert math.isfinite(own["raw"]) == math.isfinite(three.numbers["raw"])


def test_the_vector_has_what_its_readers_call_it():
    row = ["mu", *(f"mu_{name}" if name == "raw" else name for name in step_vector.ROW[1:])]
    assert tuple(row) == NAMES
    assert step_vector.ROW[step_vector.STATISTICS] == Statistics.names()
    assert SumsOnHost._fields == (*step_vector.SUMS, "worth")  # which laws ask for that end in torch
    sums = StepSums(*(torch.full(shape, 1.0 * k) for k, shape in enumerate([(2,), (2,), (2,), (), (), (3,), (2,)])))
    assert sums.stacked().tolist() == [0, 0, 1, 1, 2, 2, 3, 4, 5, 5, 5, 6, 6]
    assert len(sums.stacked()) == step_vector.SUMS_SIZE


# -- the sums of a step -----------------------------------------------------------------------------------------------

FORMS = {
    "running sums": {"lossless": False, "running": True},
    "incoming gradients": {"lossless": False, "running": False},
    "exact": {"lossless": True, "running": False},
}


class Observed:
    """A step on one or several devices, as a reduction asks an observer for it."""

    by_module, module_labels = False, ("all",)

    def __init__(self, form, devices, tokens, *, scaled_anew=False):
        generator = torch.Generator().manual_seed(devices)
        numels = [2500, 70_000] if form == "running sums" else [3000, 70]
        self.seen, scales = Seen(broken=devices == 2), [torch.tensor(s, device=DEVICE) for s in (2.0, 0.25)]
        self.ledgers = [ledgers.Ledger(numels, DEVICE, **FORMS[form]) for _ in range(devices)]
        branches = [Branch.SFT, Branch.RL, Branch.RL]
        for k, (branch, told) in enumerate(zip(branches, tokens, strict=True)):
            self.seen.contributions.append(Contribution(branch, told))
            for ledger in self.ledgers:
                gradients = [torch.randn(n, generator=generator).to(DEVICE) for n in numels]
                gradients[0][0] = math.nan if k == 2 and devices == 2 else 0.0
                scale = scales[int(branch is Branch.RL)]
                scale = scale * (1 + k) if scaled_anew else scale
                ledger.begin()
                ledger.read(branch, [0, 1], gradients, scale)
                ledger.end(branch, scale)


@pytest.mark.parametrize(
    ("form", "devices", "tokens"),
    [
        ("running sums", 1, (None, None, None)),
        ("incoming gradients", 2, (3.0, 0.0, 5.0)),
        ("exact", 1, (None, torch.tensor(2.0), 7)),
        ("exact", 2, (None, None, None)),
    ],
)
def test_sums_are_those_of_the_reduction(form, devices, tokens):
    observed, zeros = Observed(form, devices, tokens), torch.zeros(2, dtype=torch.float64, device=DEVICE)
    topology = type("OneRank", (), {"ranks": 1, "groups": (), "sharded": False})()
    more = {"time_noise": zeros + 0.5, "silent": False}
    found = LocalReduction(observed, DEVICE, topology, **more).finish_on_device()
    expected = LocalReduction(observed, DEVICE, topology, **more).finish().stacked()
    assert same(found.tolist(), expected.tolist(), 1e-12)
    assert found[4:6].tolist() == [1.0, 1.0 if tokens[1] == 0 else 2.0]
    assert (found[6] > 0) == (devices == 2)


def test_a_branch_whose_contributions_differ_in_scale():
    """As a scaler of losses makes it: each has a tensor of its own."""
    observed, zeros = Observed("exact", 1, (None,) * 3, scaled_anew=True), torch.zeros(2, dtype=torch.float64)
    topology = type("OneRank", (), {"ranks": 1, "groups": (), "sharded": False})()
    assert not observed.ledgers[0].gathers([0, 1, 1])
    found = LocalReduction(observed, DEVICE, topology, time_noise=zeros.to(DEVICE), silent=False).finish_on_device()
    squares = [float(x) for x in observed.ledgers[0].powers()]
    assert same(found[:2].tolist(), [squares[0], squares[1] + squares[2]], 1e-12)


# -- mixers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "steps"), [("every third step", 9), ("exact", 4), ("by module", 3), ("auto", 6), ("coefficient", 3)]
)
def test_both_ways_agree(case, steps, in_torch):
    in_torch(True)
    expected = [(everything(mixer), mixer.state_dict()) for mixer in train(case, steps, device=DEVICE)]
    in_torch(False)
    for mixer, (seen, state) in zip(train(case, steps, device=DEVICE), expected, strict=True):
        agree(everything(mixer), seen)
        agree(mixer.state_dict(), state)
        assert isinstance(mixer.controller.law.state, VectorState)
    assert why_in_torch(mixer.controller.law, mixer.device) is None


@pytest.mark.parametrize("first", ["torch", "program"])
def test_a_state_goes_from_one_to_the_other(first, in_torch):
    in_torch(first == "torch")
    for mixer in train("sketch", 3, device=DEVICE):
        state = mixer.state_dict()
    expected = [everything(mixer) for mixer in train("sketch", 3, first=3, load=state, device=DEVICE)]
    in_torch(first != "torch")
    found = [everything(mixer) for mixer in train("sketch", 3, first=3, load=state, device=DEVICE)]
    agree(found, expected)


def test_a_state_of_the_host_goes_on_here(monkeypatch):
    monkeypatch.setattr(on_device, "ON", {"cuda"})
    states = {}
    for mixer in train("every third step", 6):
        states[mixer.controller.steps] = mixer.state_dict()
        assert isinstance(mixer.controller.law.state, HostState)
    monkeypatch.setattr(on_device, "ON", {DEVICE.type})
    for mixer in train("every third step", 2, first=4, load=states[4], device=DEVICE):  # neither is measured
        assert isinstance(mixer.controller.law.state, VectorState)
        agree(mixer.state_dict(), states[mixer.controller.steps])
    assert flat(states[4]["controller"]["state"]) != flat(states[6]["controller"]["state"])


def test_what_was_handed_out_stays_and_what_was_written_counts():
    held = []
    for step, mixer in enumerate(train("every third step", 6, device=DEVICE)):
        if step == 4:
            assert abs(float(mixer.controller.mu) - 0.2) < 0.05
        held.append((mixer.mu, float(mixer.mu), mixer.controller.mu, float(mixer.controller.mu)))
        if step == 3:
            mixer.controller.law.state["mu"] = mixer.controller.mu.clone()
            mixer.controller.law.state["mu"].fill_(0.2)
        if step == 4:
            mixer.controller.law.state["mu"].fill_(0.9)
    assert abs(float(mixer.controller.mu) - 0.9) < 0.05
    assert len({value for _, value, _, _ in held}) > 3
    for step, (mu, value, of_law, value_of_law) in enumerate(held):
        assert float(mu) == value
        assert float(of_law) == (0.9 if step == 4 else value_of_law)


@pytest.fixture
def two_ranks():
    """A group in which what this rank adds up comes back as it is."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("two_ranks")
def test_several_ranks(in_torch):
    in_torch(True)
    expected = [everything(mixer) for mixer in train("every third step", 4, device=DEVICE, kinds=["plain"])]
    in_torch(False)
    for mixer, seen in zip(train("every third step", 4, device=DEVICE, kinds=["plain"]), expected, strict=True):
        agree(everything(mixer), seen)
    assert mixer._measurement.topology.ranks == 2
    assert isinstance(mixer.controller.law.state, VectorState)


def count(mixer, call, monkeypatch):
    """Operations that torch dispatches in a call, and all that start something on a device."""
    launched = []
    ordinary = starting.launch

    def launch(kernel, *args, **options):
        launched.append(kernel)
        with _disable_current_modes():  # the interpreter's own
            ordinary(kernel, *args, **options)

    monkeypatch.setattr(starting, "launch", launch)
    with Operations() as seen:
        call()
    monkeypatch.setattr(starting, "launch", ordinary)
    none = ("aten.empty", "aten.copy_") if ON_GPU else ("aten.empty",)  # on a GPU metrics are copied to the host
    running = [name for name in seen.names if not name.startswith(none)]
    return seen.names, len(launched), launched, running


@pytest.mark.parametrize("case", ["sketch", "exact", "prior"])
def test_the_end_of_a_step_is_five_launches(case, monkeypatch):
    draw, counts = random.Random(0), {}
    options = {"sketch": {"estimator": "sketch"}, "exact": {"estimator": "exact"}, "prior": {"prior": 0.3}}[case]
    model = Model().to(DEVICE)
    with gac.patch(model, interval=2, report_interval=None, **options) as mixer:
        for step in range(4):
            for branch in (mixer.sft, mixer.rl):
                with branch():
                    for _ in range(2):
                        mixer.backward(model.loss(draw))
            counts[step] = count(mixer, mixer.step, monkeypatch)
    operations, launches, names, running = counts[2]  # measured, the second time
    assert launches == 3, names
    assert launches + len(running) <= 5, running
    assert 0 < len(operations) <= 20, operations
    operations, launches, names, running = counts[3]
    assert launches + len(running) <= 1, running
    assert len(operations) <= 3, operations


def test_steps_that_are_passed_by_are_told_when_asked():
    told = []
    for mixer in train("every third step", 6, device=DEVICE, kinds=["plain"]):
        told.append(mixer.metrics(wait=True))
        agree(mixer.metrics(wait=True), told[-1])
    assert [t["step"] for t in told] == list(range(6))
    assert [t["n_s"] > 0 for t in told] == [True, False, False] * 2
    assert told[-1]["mu"] == float(mixer.mu)
    assert mixer.statistics is None


def test_weights_are_those_of_torch():
    for mu in (0.0, 1.0, 0.3, 0.123456789):
        found, expected = DeviceWeights.first(torch.tensor(mu)), Weights(torch.tensor(mu))
        for name in ("of", "undone"):
            assert getattr(found, name) == getattr(expected, name)
        assert found.present.tolist() == expected.present.tolist()
        places = {x.data_ptr() % 16 for x in (*found.of.values(), *found.undone.values())}
        assert places == {found.numbers.data_ptr() % 16}


def test_what_triton_does_not_serve_is_said(monkeypatch):
    law = gac.Controller("gac").law
    monkeypatch.setattr(on_device, "ON", {"cuda"})
    monkeypatch.setattr("gac_kernels.backends.select", lambda _: (None, "reference", "triton is not installed"))
    assert "does not serve: triton is not installed" in why_in_torch(law, torch.device("cuda"))
    assert why_in_torch(law, torch.device("mps")) == "the numbers are on mps"
    assert "law 'paper'" in why_in_torch(gac.Controller("paper").law, torch.device("cuda"))
    assert ending.NOTHING != ending.SUMS != ending.STATISTICS

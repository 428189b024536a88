"""Steps that end in one piece against steps that end in torch: statistics, standard errors, weights, metrics, state."""

import math
import random

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

import gac
import gac.ending
import gac.observe.observer
import gac.observe.summing
import gac_kernels.cpu.ending
from gac.ending import why_in_torch
from gac.fused.host import HostProgram, HostVector
from gac.observe.places import place
from gac_kernels.cpu.ending import serves
from tests.gac.fused.test_law import same, unit_of

CASES = {
    "sketch": {"estimator": "sketch"},
    "exact": {"estimator": "exact"},
    "every third step": {"estimator": "sketch", "interval": 3},
    "by module": {"report_interval": 2},
    "prior": {"prior": {"warmup": 5, "decay": 30, "peak": 0.9, "valley": 0.1}},
    "kl": {"alpha": "kl"},
    "one half-life": {"half_life": 10, "cap": 0.3, "mu_min": 0.0, "mu_max": 1.0},
    "auto": {"estimator": "auto"},
    "coefficient": {"estimator": "coefficient", "interval": 2, "momentum": 0.9},
}


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))

    def loss(self, draw: random.Random) -> torch.Tensor:
        generator = torch.Generator().manual_seed(draw.randrange(2**31))
        device = next(self.parameters()).device
        x, y = torch.randn(4, 6, generator=generator), torch.randn(4, 3, generator=generator)
        return (self.layers(x.to(device)) - y.to(device)).square().mean()


KINDS = ("plain", "plain", "tokens", "lone", "no demonstrations", "broken", "mixed")


def train(case: str, steps: int, *, load: dict | None = None, first: int = 0, device="cpu", kinds=KINDS):
    """The mixer after each step, on draws that depend on the step alone."""
    model = Model().to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.5)
    with gac.patch(model, **{"interval": 1} | CASES[case]) as mixer:
        if load is not None:
            mixer.load_state_dict(load)
        for step in range(first, first + steps):
            draw = random.Random(f"{case} {step}")
            kind = draw.choice(kinds)
            if (kind == "mixed" and case == "auto") or case == "coefficient":
                rows = torch.randn(5, 3, generator=torch.Generator().manual_seed(step)).to(device)
                experts = (torch.arange(5) < 2).to(device)
                mixer.observe_tokens(-rows.abs(), rows[:, 0], torch.ones_like(rows), experts)
                mixer.mixed_loss(sft_loss=model.loss(draw), rl_loss=model.loss(draw)).backward()
            else:
                for branch in (mixer.sft, mixer.rl):
                    if kind == "no demonstrations" and branch == mixer.sft:
                        continue
                    with branch():
                        for _ in range(1 if kind == "lone" else draw.choice([2, 3, 5])):
                            told = {"tokens": float(draw.randrange(5))} if kind == "tokens" else {}
                            factor = math.inf if kind == "broken" and draw.random() < 0.3 else 1.0
                            mixer.backward(factor * model.loss(draw), **told)
            finite = all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
            if finite:
                optimizer.step()
            optimizer.zero_grad()
            mixer.step(**({"kl": draw.lognormvariate(-4, 1)} if case == "kl" else {}))
            yield mixer


def everything(mixer: gac.Mixer) -> dict:
    """What a user can read."""
    told = {k: v for k, v in mixer.metrics(wait=True).items() if k not in ("seconds", "overhead")}
    statistics = mixer.statistics
    fields = {} if statistics is None else {k: float(getattr(statistics, k)) for k in gac.Statistics.names()}
    modules = [] if mixer.modules is None else mixer.modules.values.flatten().tolist()
    return {"metrics": told, "statistics": fields, "modules": modules, "mu": float(mixer.mu)}


def flat(value):
    if isinstance(value, dict):
        return [x for name in value for x in (name, *flat(value[name]))]
    if isinstance(value, (list, tuple)):
        return [x for item in value for x in flat(item)]
    return value.flatten().tolist() if isinstance(value, torch.Tensor) else [value]


def plain(value):
    """Whether these are numbers alone."""
    return isinstance(value, float) or (isinstance(value, (list, tuple)) and all(map(plain, value)))


def agree(found, expected, name="", unit=0.0):
    """Numbers within 1e-12 of what they were computed from (:func:`same`), everything else alike."""
    found, expected = (x.tolist() if isinstance(x, torch.Tensor) else x for x in (found, expected))
    if isinstance(expected, dict):
        assert list(found) == list(expected)
        values = {key: value.tolist() if isinstance(value, torch.Tensor) else value for key, value in expected.items()}
        unit = max(unit, unit_of(values))
        for key, value in expected.items():
            agree(found[key], value, key, unit)
    elif isinstance(expected, (list, tuple)) and not plain(expected):
        assert len(found) == len(expected)
        for pair in zip(found, expected, strict=True):
            agree(*pair, name, unit)
    elif plain(expected):
        listed = (list(x) if isinstance(x, tuple) else x for x in (found, expected))
        assert same(*listed, 1e-12, name, unit), (name, found, expected)
    else:
        assert found == expected, (name, found, expected)


@pytest.fixture
def in_torch(monkeypatch):
    """Makes every step end in torch."""

    def switch(on: bool) -> None:
        monkeypatch.setattr(gac.ending, "why_in_torch", (lambda *_: "asked for") if on else why_in_torch)

    return switch


@pytest.mark.parametrize("case", CASES)
def test_both_ways_agree(case, in_torch):
    in_torch(True)
    expected = [(everything(mixer), mixer.state_dict()) for mixer in train(case, 60)]
    in_torch(False)
    measured = 0
    for mixer, (seen, state) in zip(train(case, 60), expected, strict=True):
        agree(everything(mixer), seen)
        agree(mixer.state_dict(), state)
        measured += mixer.statistics is not None
    assert measured >= 20
    assert why_in_torch(mixer.controller.law, mixer.device) is None


@pytest.fixture
def without_library(monkeypatch):
    """Has steps end on Python's numbers, as on a machine without a compiler."""

    def switch(without: bool) -> None:
        monkeypatch.setattr(gac_kernels.cpu.ending, "serves", lambda: not without)
        monkeypatch.setattr(gac.observe.summing, "serves", lambda: not without)

    return switch


@pytest.mark.skipif(not serves(), reason="the CPU library does not serve")
@pytest.mark.parametrize("case", CASES)
def test_without_the_library_numbers_are_the_same(case, without_library):
    without_library(True)
    expected = []
    for mixer in train(case, 16):
        assert not isinstance(mixer._ending._found, HostVector)
        expected.append((everything(mixer), mixer.state_dict()))
    without_library(False)
    in_program = 0
    for mixer, (seen, state) in zip(train(case, 16), expected, strict=True):
        in_program += isinstance(mixer._ending._found, HostVector)
        agree(everything(mixer), seen)
        agree(mixer.state_dict(), state)
    assert in_program >= 5


@pytest.mark.skipif(not serves(), reason="the CPU library does not serve")
@pytest.mark.parametrize("first", [True, False])
def test_a_mixer_goes_from_one_to_the_other(first, without_library):
    """Nothing but what ends a step changes, in the middle of a run."""
    expected = [everything(mixer) for mixer in train("every third step", 12)]
    without_library(first)
    for step, mixer in enumerate(train("every third step", 12)):
        agree(everything(mixer), expected[step])
        if step == 5:
            without_library(not first)


@pytest.mark.parametrize("first_in_torch", [True, False])
def test_a_state_goes_from_one_to_the_other(first_in_torch, in_torch):
    in_torch(first_in_torch)
    for mixer in train("sketch", 30):
        state = mixer.state_dict()
    expected = [everything(mixer) for mixer in train("sketch", 10, first=30, load=state)]
    in_torch(not first_in_torch)
    found = [everything(mixer) for mixer in train("sketch", 10, first=30, load=state)]
    agree(found, expected)


@pytest.fixture
def two_ranks():
    """A group in which what this rank adds up comes back as it is."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    dist.destroy_process_group()


@pytest.fixture
def two_ledgers(monkeypatch):
    """Half of the parameters to a ledger, as if they were on two devices."""

    def in_two(parameters, modules, count, copies, *, seed, **options):
        half = len(parameters) // 2
        first, places = place(parameters[:half], modules[:half], count, copies, seed=seed, **options)
        second, others = place(parameters[half:], modules[half:], count, copies, seed=seed + 1, **options)
        return first + second, [*places, *((1, region) for _, region in others)]

    monkeypatch.setattr(gac.observe.observer, "place", in_two)


@pytest.mark.parametrize("several", ["two_ranks", "two_ledgers"])
@pytest.mark.parametrize("case", ["every third step", "exact", "kl"])
def test_several_ranks_or_ledgers(several, case, in_torch, request, monkeypatch):
    request.getfixturevalue(several)
    ended, ordinary = [], HostProgram.__call__
    monkeypatch.setattr(HostProgram, "__call__", lambda *args, **more: ended.append(args[4]) or ordinary(*args, **more))
    kinds = [kind for kind in KINDS if kind != "mixed"]
    in_torch(True)
    expected = [(everything(mixer), mixer.state_dict()) for mixer in train(case, 12, kinds=kinds)]
    in_torch(False)
    assert not ended
    for mixer, (seen, state) in zip(train(case, 12, kinds=kinds), expected, strict=True):
        agree(everything(mixer), seen)
        agree(mixer.state_dict(), state)
    assert sum(sums is not None for sums in ended) == (0 if not serves() else 4 if case == "every third step" else 12)
    found = (mixer._measurement.topology.ranks, len(mixer._measurement.observer.ledgers))
    assert found == ((2, 1) if several == "two_ranks" else (1, 2))


def test_numbers_that_were_handed_out_stay():
    held = []
    for mixer in train("sketch", 10):
        held.append((mixer.mu, float(mixer.mu), mixer.controller.mu, float(mixer.controller.mu)))
    assert len({value for _, value, _, _ in held}) > 5
    for mu, value, of_law, value_of_law in held:
        assert float(mu) == value
        assert float(of_law) == value_of_law


def test_a_state_that_somebody_wrote_into_counts():
    for step, mixer in enumerate(train("sketch", 3)):
        if step == 1:
            mixer.controller.law.state["mu"].fill_(0.2)
        if step == 2:
            assert abs(float(mixer.controller.mu) - 0.2) < 0.1


@pytest.mark.parametrize(
    ("law", "reason"),
    [("gac", None), ("paper", "law 'paper'"), ("chord-mu", "law 'chord-mu'"), ("fixed", "law 'fixed'")],
)
def test_what_is_not_served_is_said(law, reason):
    found = why_in_torch(gac.Controller(law).law, torch.device("cpu"))
    assert found is None if reason is None else reason in found


class Operations(TorchDispatchMode):
    """Counts what is dispatched, views left out."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if not function.is_view:
            self.names.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("case", "most"), [("sketch", 2), ("exact", 2), ("prior", 2), ("kl", 2)])
def test_the_end_of_a_measured_step_is_few_operations(case, most):
    model = Model()
    draw = random.Random(0)
    with gac.patch(model, interval=1, report_interval=None, **CASES[case]) as mixer:
        for _ in range(3):
            for branch in (mixer.sft, mixer.rl):
                with branch():
                    for _ in range(4):
                        mixer.backward(model.loss(draw))
            with Operations() as seen:
                mixer.step(kl=0.01)
    assert 0 < len(seen.names) <= most, seen.names


def test_the_end_of_a_step_without_measurement_is_fewer():
    model = Model()
    draw = random.Random(0)
    with gac.patch(model, interval=2) as mixer:
        for _ in range(4):
            for branch in (mixer.sft, mixer.rl):
                with branch():
                    mixer.backward(model.loss(draw))
            with Operations() as seen:
                mixer.step()
    assert mixer.statistics is None
    assert len(seen.names) <= 3, seen.names

"""States of nonsense: each is refused with the place of what is wrong, and nothing of it is taken."""

from __future__ import annotations

import copy
import functools
import io

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import gac
from gac.laws.base import Law, create, register, unregister
from gac.saved import VERSION
from gac.state import Range

NAN, INF = float("nan"), float("inf")
MIXERS = {
    "exact": {"estimator": "exact"},
    "sketch": {"estimator": "sketch"},
    "exact, by time": {"estimator": "exact", "n_r": 1},
    "sketch, by time": {"estimator": "sketch", "n_r": 1},
    "alpha follows kl": {"alpha": "kl"},
    **{f"law {law}": {"law": law} for law in gac.laws.available()},
}


def small_model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 1))


def patched(case):
    """A model and its mixer, without a step."""
    options = dict(MIXERS[case])
    options.pop("n_r", None)
    model = small_model()
    return model, gac.patch(model, carries_out_rules=True, **options)


def run(case, model, mixer, steps, seed=0, optimizer=None):
    generator = torch.Generator().manual_seed(seed)
    batch = lambda: torch.randn(4, 5, generator=generator)
    for _ in range(steps):
        with mixer.sft():
            for _ in range(3):
                mixer.backward(model(batch()).square().mean())
        with mixer.rl():
            for _ in range(MIXERS[case].get("n_r", 3)):
                mixer.backward(-model(batch()).mean())
        if optimizer is None:
            mixer.step(kl=0.03, entropy=1.5)
        else:
            optimizer.step()
            mixer.step()  # told nothing: steps that measure nothing are passed by
        model.zero_grad()


def trained(case, steps=3, seed=0):
    model, mixer = patched(case)
    run(case, model, mixer, steps, seed)
    return mixer


def places(state, at=()):
    """The path of everything in a state, from the outside in."""
    if at:
        yield at
    items = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, list) else ()
    for key, value in items:
        yield from places(value, (*at, key))


def inside(state, place):
    return functools.reduce(lambda part, key: part[key], place, state)


def put(state, place, value):
    inside(state, place[:-1])[place[-1]] = value


def written(at, place):
    return at + "".join(f'["{key}"]' if isinstance(key, str) else f"[{key}]" for key in place)


def same(a, b):
    """Whether two states are the same, to the bit, in kinds, order and dtypes too."""
    if isinstance(a, torch.Tensor):
        same_kind = isinstance(b, torch.Tensor) and (a.dtype, a.shape, a.device) == (b.dtype, b.shape, b.device)
        return same_kind and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(value, b[key]) for key, value in a.items())
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def refuses(mixer, state, *words, error=(TypeError, ValueError)):
    before, mu = mixer.state_dict(), float(mixer.mu)
    with pytest.raises(error) as raised:
        mixer.load_state_dict(state)
    assert raised.type in (TypeError, ValueError), "no error of somebody else"
    message = str(raised.value)
    for word in words:
        assert word in message
    assert "pass what" in message, "no word of what to do"
    assert "start anew" in message
    assert same(mixer.state_dict(), before), "part of a refused state was taken"
    assert float(mixer.mu) == mu


@pytest.mark.parametrize("case", MIXERS)
def test_a_state_comes_back_through_a_file(case):
    mixer = trained(case)
    file = io.BytesIO()
    torch.save(mixer.state_dict(), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    model, other = patched(case)
    other.load_state_dict(loaded)
    assert same(other.state_dict(), mixer.state_dict())
    assert float(other.mu) == float(mixer.mu)
    run(case, model, other, 2, seed=1)  # what was loaded is fit to go on with
    assert other.controller.steps == 5
    assert same(loaded, mixer.state_dict()), "the mixer goes on in copies"


@pytest.mark.parametrize("stop", [4, 5])
@pytest.mark.parametrize("case", ["exact", "sketch", "sketch, by time"])
def test_a_run_goes_on_to_the_bit_between_two_measurements(case, stop):
    """Steps 0, 3, 6 and 9 are measured; the run is stopped after so many steps, and goes on in another model."""
    file, found = io.BytesIO(), []
    for parts in ([10], [stop, 10 - stop]):
        rows, first = [], 0
        for steps in parts:
            model = small_model()
            optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
            options = {name: value for name, value in MIXERS[case].items() if name != "n_r"}
            with gac.patch(model, interval=3, **options) as mixer:
                if first:
                    torch.nn.init.zeros_(model[0].weight)  # everything comes from the file
                    file.seek(0)
                    for part, state in zip((model, optimizer, mixer), torch.load(file), strict=True):
                        part.load_state_dict(state)
                for step in range(first, first + steps):
                    run(case, model, mixer, 1, seed=step, optimizer=optimizer)
                    told = mixer.metrics(wait=True)
                    left_out = {"seconds", "overhead"} | (
                        {"estimator"} if told["n_s"] == 0 else set()
                    )  # that of the last
                    rows.append({name: value for name, value in told.items() if name not in left_out})
                file.seek(0)
                states = [part.state_dict() for part in (model, optimizer, mixer)]
                torch.save(states, file)
            first += steps
        found.append((repr(rows), *map(copy.deepcopy, states)))
        assert [row["n_s"] > 0 for row in rows] == [step % 3 == 0 for step in range(10)]
    (whole, *whole_states), (resumed, *states) = found
    assert resumed == whole, "to the last digit; as text, since NaN is not equal to itself"
    assert len({row["mu"] for row in rows}) >= 4, "mu moves"
    assert same(states, whole_states)


@pytest.mark.parametrize("case", MIXERS)
def test_a_state_without_a_step_comes_back(case):
    _, mixer = patched(case)
    before = mixer.state_dict()
    mixer.load_state_dict(copy.deepcopy(before))
    assert same(mixer.state_dict(), before)
    later = trained(case)
    later.load_state_dict(before)
    assert same(later.state_dict(), before), "moving means of the steps before are gone too"


LEAF = ("controller", "state", "mu")


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (torch.tensor(NAN, dtype=torch.float64), ("must be a number in [0, 1], got nan",)),
        (torch.tensor(7.0, dtype=torch.float64), ("must be a number in [0, 1], got 7",)),
        (torch.tensor(-1e-9, dtype=torch.float64), ("must be a number in [0, 1], got -1e-09",)),
        (torch.tensor(INF, dtype=torch.float64), ("must be a number in [0, 1], got inf",)),
        (torch.tensor(0.5 + 0.5j), ("real numbers", "complex64")),
        (torch.tensor(0.5, dtype=torch.float16), ("real numbers", "float16")),
        (torch.tensor(1), ("real numbers", "int64")),
        (torch.tensor(True), ("real numbers", "bool")),
        (torch.tensor([0.5], dtype=torch.float64), ("must have the shape (), got (1,)",)),
        (torch.zeros(0, dtype=torch.float64), ("must have the shape (), got (0,)",)),
        (torch.empty((), dtype=torch.float64, device="meta"), ("dense", "meta")),
        (torch.zeros(1, dtype=torch.float64).to_sparse(), ("dense", "sparse")),
        (0.5, ("must be a tensor, got 0.5 (float)",)),
        (None, ("must be a tensor, got NoneType",)),
        ("text", ("must be a tensor, got 'text' (str)",)),
        ([0.5], ("must be a tensor, got list",)),
        ({}, ("must be a tensor, got dict",)),
    ],
)
def test_what_mu_cannot_be(value, words):
    mixer = trained("exact")
    state = mixer.state_dict()
    put(state, LEAF, value)
    refuses(mixer, state, written("state_dict", LEAF), *words)


COUNTS = [-5, -1, True, 3.0, NAN, "3", None, 2**53 + 1, 10**5000, torch.tensor(3), 3j]


@pytest.mark.parametrize("value", COUNTS, ids=lambda value: f"{type(value).__name__}")
@pytest.mark.parametrize("place", [("controller", "steps"), ("version",)])
def test_what_counts_cannot_be(place, value):
    mixer = trained("exact")
    state = mixer.state_dict()
    put(state, place, value)
    before = mixer.state_dict()
    with pytest.raises((TypeError, ValueError)) as raised:
        mixer.load_state_dict(state)
    assert written("state_dict", place) in str(raised.value)
    assert same(mixer.state_dict(), before)


@pytest.mark.parametrize("value", [-1.0, 0.5, NAN, INF])
@pytest.mark.parametrize(
    "place", [("skipped",), ("uncertainty", "count"), ("controller", "state", "waiting")], ids=lambda place: place[-1]
)
def test_what_counts_in_tensors_cannot_be(place, value):
    mixer = trained("exact")
    state = mixer.state_dict()
    inside(state, place).fill_(value)
    refuses(mixer, state, written("state_dict", place), "whole number", f"got {value:g}", error=ValueError)


@pytest.mark.parametrize(
    ("case", "place", "index", "value"),
    [
        ("exact", ("controller", "state", "sums"), (0, 1, 2), -0.5),  # a weight
        ("exact", ("controller", "state", "sums"), (0, 0, 2), INF),
        ("exact", ("controller", "state", "squares"), (0, 1, 2), NAN),
        ("exact", ("controller", "state", "unsettled"), (1,), 1.5),
        ("exact", ("controller", "state", "evidence"), (1,), -1.0),
        ("exact", ("controller", "state", "mu_se"), (), -1.0),
        ("exact", ("controller", "state", "prior"), (), 1.5),
        ("alpha follows kl", ("controller", "state", "alpha"), (), 2.0),
        ("alpha follows kl", ("controller", "state", "kl"), (), INF),
        ("law paper", ("controller", "state", "average"), (1,), INF),
        ("law paper", ("controller", "state", "last_refresh"), (), NAN),
        ("law paper", ("controller", "state", "last_refresh"), (), INF),
        ("exact", ("uncertainty", "level"), (0,), -1.0),
        ("exact", ("uncertainty", "average"), (0,), -1.0),
        ("exact", ("uncertainty", "last"), (0,), INF),
        ("sketch, by time", ("means", 0, "rl.mean"), (3,), NAN),
        ("sketch, by time", ("means", 0, "rl.weight"), (), 1.5),
    ],
)
def test_numbers_out_of_range(case, place, index, value):
    mixer = trained(case)
    state = mixer.state_dict()
    inside(state, place)[index] = value
    at = written("state_dict", place) + (f"[{', '.join(map(str, index))}]" if index else "")
    refuses(mixer, state, f"{at} must be", f"got {value:g}", error=ValueError)


@pytest.mark.parametrize(
    ("case", "place", "index", "value"),
    [
        ("exact", ("controller", "state", "raw"), (), NAN),  # before the first measurement
        ("exact", ("controller", "state", "raw"), (), INF),  # an alpha that was a tensor
        ("exact", ("controller", "state", "mu_se"), (), INF),
        ("exact", ("controller", "state", "mus"), (1,), NAN),
        ("exact", ("uncertainty", "last"), (2,), NAN),
        ("exact", ("uncertainty", "average"), (2,), NAN),
        ("alpha follows kl", ("controller", "state", "kl"), (), NAN),
        ("law paper", ("controller", "state", "last_refresh"), (), -INF),
        ("law paper", ("controller", "state", "average"), (2,), NAN),
        ("law entropy-ctrl", ("controller", "state", "target"), (), NAN),
    ],
)
def test_what_is_not_known_yet_is_taken(case, place, index, value):
    mixer = trained(case)
    state = mixer.state_dict()
    inside(state, place)[index] = value
    mixer.load_state_dict(state)
    assert same(mixer.state_dict(), state)


@pytest.mark.parametrize("case", ["exact", "sketch, by time", "law paper"])
@pytest.mark.parametrize("wrong", [{}, [], None, 0, "text", torch.zeros(()), (), {1: 2}])
def test_no_part_may_be_something_else(case, wrong):
    """Each part of a state, and the state itself, against each kind of thing that it is not."""
    mixer = trained(case)
    refuses(mixer, wrong)
    for place in places(mixer.state_dict()):
        state = mixer.state_dict()
        own = inside(state, place)
        if place == ("means",) and isinstance(wrong, (list, tuple)):
            continue  # a state of several ranks has no means
        if type(own) is type(wrong) and (not isinstance(own, torch.Tensor) or own.shape == wrong.shape):
            continue
        if place == ("means", 0) and isinstance(wrong, dict) and not wrong:
            continue
        put(state, place, wrong)
        if place == ("version",):
            with pytest.raises((TypeError, ValueError), match="version"):
                mixer.load_state_dict(state)
        else:
            refuses(mixer, state, written("state_dict", place))


@pytest.mark.parametrize("case", ["exact", "sketch, by time", "law paper"])
def test_nothing_may_be_missing_and_nothing_more(case):
    mixer = trained(case)
    for place in places(mixer.state_dict()):
        state = mixer.state_dict()
        parent = inside(state, place[:-1])
        if place == ("version",) or isinstance(parent, list):
            continue
        del parent[place[-1]]
        # half of a moving mean is left
        text = "has no place for" if place[0] == "means" and len(place) == 3 and len(parent) % 2 == 0 else "lacks"
        refuses(mixer, state, f"{written('state_dict', place[:-1])} {text}", error=ValueError)
        state = mixer.state_dict()
        inside(state, place[:-1])["more"] = torch.zeros(())
        refuses(mixer, state, f"{written('state_dict', place[:-1])} has no place for more", error=ValueError)


def test_an_older_state_has_no_version():
    mixer = trained("exact")
    state = mixer.state_dict()
    assert state.pop("version") == VERSION == 3
    del state["cadence"]
    _, other = patched("exact")
    other.load_state_dict(state)
    assert same(other.state_dict() | {"cadence": None}, mixer.state_dict() | {"cadence": None})


def test_exact_moving_means_of_an_older_state_start_anew():
    """They had random signs, which gradients as they are have not."""
    mixer = trained("exact, by time")
    state = mixer.state_dict()
    state["version"] = 1
    del state["cadence"], state["means"][0]["rl.square"], state["means"][0]["rl.step"]
    _, other = patched("exact, by time")
    other.load_state_dict(state)
    assert other.state_dict()["means"] == [{}]
    assert same(other.state_dict() | {"means": 0, "cadence": 0}, mixer.state_dict() | {"means": 0, "cadence": 0})


@pytest.mark.parametrize("versioned", [True, False])
def test_moving_means_of_an_older_state_are_of_every_step(versioned):
    """Without their age they stand for measurements in every step, and go on to the same numbers."""
    model, mixer = patched("sketch, by time")
    run("sketch, by time", model, mixer, 3)
    state = mixer.state_dict()
    state["version"] = 1
    if not versioned:
        del state["version"]
    del state["cadence"], state["means"][0]["rl.square"], state["means"][0]["rl.step"]
    again, other = patched("sketch, by time")
    again.load_state_dict(model.state_dict())
    other.load_state_dict(state)
    for each in ((model, mixer), (again, other)):
        run("sketch, by time", *each, 4, seed=1)
    assert float(other.statistics.sigma_r2) == pytest.approx(float(mixer.statistics.sigma_r2), rel=1e-12)
    assert other.state_dict()["means"][0].keys() == mixer.state_dict()["means"][0].keys()
    refuses(mixer, state | {"version": 2}, "lacks", error=ValueError)


def test_a_newer_state_is_left_to_a_newer_gac():
    """What a later version holds is not known: the version is the complaint, not the names."""
    mixer = trained("exact")
    state = {"version": VERSION + 1, "quite": "different"}
    refuses(mixer, state, f'state_dict["version"] is {VERSION + 1}', "newer gac", error=ValueError)


def test_a_state_of_another_law():
    refuses(trained("exact"), trained("law fixed").state_dict(), "law 'fixed'", "build it with the same law")


@pytest.mark.parametrize(("estimator", "other"), [("sketch", "exact"), ("exact", "sketch")])
def test_moving_means_of_another_estimator(estimator, other):
    """A model that is larger than its sketch."""
    mixers = {}
    for name in (estimator, other):
        model = torch.nn.Linear(300, 300)
        mixers[name] = gac.patch(model, estimator=name)
        for branch in (mixers[name].sft, mixers[name].rl):
            with branch():
                mixers[name].backward(model(torch.ones(2, 300)).square().mean())
        mixers[name].step()
    refuses(mixers[estimator], mixers[other].state_dict(), '["means"][0]["sft.mean"] must have the shape')


def test_moving_means_of_other_ranks_start_anew():
    mixer = trained("sketch, by time")
    state = mixer.state_dict()
    assert set(state["means"][0]) == {"rl.mean", "rl.weight", "rl.square", "rl.step"}
    for means in ([], state["means"] * 2):
        mixer.load_state_dict(state)
        mixer.load_state_dict(state | {"means": means})
        assert same(mixer.state_dict(), state | {"means": [{}]})
    refuses(
        mixer, state | {"means": [{}, {"rl.mean": torch.zeros(3)}]}, '["means"][1] lacks rl.square, rl.step, rl.weight'
    )


def test_within_a_step():
    model, mixer = patched("exact")
    state = mixer.state_dict()
    with mixer.sft():
        mixer.backward(model(torch.ones(2, 5)).square().mean())
        with pytest.raises(RuntimeError, match="leave the branch first"):
            mixer.load_state_dict(state)
    mixer.load_state_dict(state)  # the step under way is forgotten
    assert same(mixer.state_dict(), state)


def test_a_mixer_that_was_unpatched_takes_no_state_and_no_hooks():
    model, mixer = patched("exact")
    state = mixer.state_dict()
    mixer.unpatch()
    with pytest.raises(RuntimeError, match="unpatched"):
        mixer.load_state_dict(state)
    assert not any(parameter._post_accumulate_grad_hooks for parameter in model.parameters())


# -- laws of users ----------------------------------------------------------------------------------------------------


@pytest.fixture
def mine():
    @register("mine")
    class Mine(Law):
        def __init__(self, last: float = NAN) -> None:
            super().__init__(0.25)
            self.record("total", 0.0)
            self.record("last", last)
            self.state["seen"] = torch.zeros(2, dtype=torch.int64)

        def update(self, statistics, step):
            self.record("total", self.state["total"] + 1.0)
            return self.mu

    yield Mine
    unregister("mine")


def test_a_law_that_declares_nothing(mine):
    """Names, shapes, dtypes; finite numbers, and NaN where the law begins with it."""
    controller = gac.Controller("mine")
    state = controller.state_dict()
    state["state"]["seen"] = torch.tensor([0.5, 1.0])  # its integers are floats from the beginning, as they are later
    controller.load_state_dict(state)
    assert controller.law.state["seen"].tolist() == [0.5, 1.0]
    for name, value in (("total", NAN), ("total", INF), ("last", INF), ("mu", 7.0)):
        state = controller.state_dict()
        state["state"][name].fill_(value)
        with pytest.raises(ValueError, match=rf'^state_dict\["state"\]\["{name}"\] must be'):
            controller.load_state_dict(state)
    with pytest.raises(ValueError, match=r'\["last"\] must be a finite number, got nan'):
        gac.Controller("mine", last=0.0).load_state_dict(controller.state_dict())


def test_a_law_that_declares_its_own_keeps_what_all_laws_have(mine):
    class Declared(mine):
        ranges = {"total": Range(0.0, 10.0), "mu": Range(0.2, 0.3)}  # noqa: RUF012

    register("declared")(Declared)
    try:
        controller = gac.Controller("declared")
        for name, value in (("total", 11.0), ("mu", 0.5), ("prior", 2.0)):
            state = controller.state_dict()
            state["state"][name].fill_(value)
            with pytest.raises(ValueError, match=rf'\["{name}"\] must be a number in'):
                controller.load_state_dict(state)
    finally:
        unregister("declared")


@pytest.mark.parametrize("name", gac.laws.available())
def test_every_law_of_this_package_declares_all_that_it_keeps(name):
    for options in ({"alpha": "kl"}, {"half_life": 5.0}, {}) if name == "gac" else ({},):
        law = create(name, **options)
        assert [entry for entry in law.state if law.range_of(entry) is None] == []


# -- mutations of a real state ----------------------------------------------------------------------------------------

anything = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**18), 10**18),
    st.floats(),
    st.complex_numbers(),
    st.text(max_size=5),
    st.binary(max_size=5),
    st.lists(st.integers(), max_size=3),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
    st.sampled_from([torch.float16, torch.float32, torch.float64, torch.int64, torch.bool, torch.complex128]).flatmap(
        lambda dtype: st.lists(st.integers(0, 4), max_size=3).map(lambda shape: torch.ones(shape, dtype=dtype))
    ),
)
number = st.one_of(st.floats(), st.sampled_from([NAN, INF, -INF, -1.0, -1e-300, 0.5, 1.5, 1e308]))


def mutate(data, state):
    place = data.draw(st.sampled_from(list(places(state))), label="place")
    way = data.draw(st.sampled_from(["replace", "drop", "add", "number", "swap"]), label="way")
    part, own = inside(state, place[:-1]), inside(state, place)
    if way == "drop":
        del part[place[-1]]
    elif way == "add":
        value = data.draw(anything)
        part.append(value) if isinstance(part, list) else part.update({data.draw(st.text(max_size=4)): value})
    elif way == "number" and isinstance(own, torch.Tensor) and own.numel():
        value = torch.tensor(data.draw(number), dtype=torch.float64)  # which may be infinite in float32
        own.view(-1)[data.draw(st.integers(0, own.numel() - 1))] = value
    elif way == "swap":
        put(state, place, copy.deepcopy(inside(state, data.draw(st.sampled_from(list(places(state)))))))
    else:
        put(state, place, data.draw(anything))


@pytest.mark.parametrize("case", MIXERS)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(data=st.data())
def test_a_mutated_state_is_taken_whole_or_not_at_all(case, data):
    mixer, state = loaded(case)
    for _ in range(data.draw(st.integers(1, 2))):
        if state:
            mutate(data, state)
    given_state, before, mu = copy.deepcopy(state), mixer.state_dict(), float(mixer.mu)
    refused = None
    try:
        mixer.load_state_dict(state)
    except (TypeError, ValueError) as error:
        refused = str(error)
    if refused is not None:
        assert "state_dict" in refused, "a foreign error"
        assert same(mixer.state_dict(), before), "part of a refused state was taken"
        assert float(mixer.mu) == mu
    else:
        expected = {"version": VERSION} | given_state
        if len(expected["means"]) != 1:
            expected["means"] = [{}]
        found = mixer.state_dict()
        assert found.keys() == expected.keys()
        assert all(equal(found[key], expected[key]) for key in found)
        assert float(mixer.mu) == float(torch.tensor(float(found["controller"]["state"]["mu"]), dtype=torch.float32))
        assert 0.0 <= float(mixer.mu) <= 1.0


def equal(found, expected):
    """As :func:`same`, whatever the order of names and whether a number came as float32 or a list as a tuple."""
    if isinstance(found, torch.Tensor):
        return found.shape == expected.shape and same(found, expected.detach().to(found.dtype))
    if isinstance(found, dict):
        return found.keys() == expected.keys() and all(equal(value, expected[key]) for key, value in found.items())
    if isinstance(found, list):
        return len(found) == len(expected) and all(map(equal, found, expected))
    return same(found, expected)


@functools.cache
def _states(case):
    return trained(case, seed=5), trained(case, 4, seed=6).state_dict()


def loaded(case):
    """A mixer in the same state each time, and a state of another one."""
    mixer, state = _states(case)
    return mixer, copy.deepcopy(state)

"""Law gac on floats against the law in torch, whatever it is told."""

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gac
from gac.fused.law import update
from gac.fused.state import numbers_of
from gac.laws.base import Step
from tests.gac.laws.test_edges import numbers, statistics

OPTIONS = {
    "defaults": {},
    "one half-life": {"half_life": 20},
    "a short half-life": {"half_life": 1e-3},
    "momentum": {"momentum": 0.9},
    "prior": {"prior": 0.3},
    "prior of known weight": {"prior": 0.3, "prior_weight": 0.25},
    "schedule": {"prior": {"warmup": 5, "decay": 30, "peak": 0.9, "valley": 0.1}},
    "a schedule of tensors": {"prior": lambda step: torch.tensor(math.nan if step % 3 else 0.7)},
    "kl": {"alpha": "kl", "momentum": 0.9},
    "alpha": {"alpha": 0.0},
    "no guardrails": {"cap": 1.0, "mu_min": 0.0, "mu_max": 1.0},
}


def same(found, expected, rel):
    if isinstance(expected, list):
        return len(found) == len(expected) and all(same(f, e, rel) for f, e in zip(found, expected, strict=True))
    return (found != found and expected != expected) or math.isclose(found, expected, rel_tol=rel, abs_tol=rel)


def compare(options, rows, rel):
    """Both forms of the law, side by side; the floats go on from their own state."""
    reference, law = gac.Controller("gac", **options), gac.Controller("gac", **options).law
    state = numbers_of(law.state)
    for number, (row, told) in enumerate(rows):
        measured = statistics(row) if row else None
        reference.update(measured, **told)
        plain = {name: float(getattr(measured, name)) for name in gac.Statistics.names()} if row else None
        state = update(law, state, plain, Step(number, **told))
        expected = numbers_of(reference.law.state)
        assert state.keys() == expected.keys()
        for name in expected:
            assert same(state[name], expected[name], rel), (number, name, state[name], expected[name])


@pytest.mark.parametrize("case", OPTIONS)
def test_a_run(case):
    draw = random.Random(case)
    rows = []
    for step in range(300):
        s, r, d = (draw.lognormvariate(0, 1) for _ in range(3))
        delta = d + draw.gauss(0, 1)
        row = [s, r * 1.01**step, delta, delta + s + r, 0.1 * s, 0.2 * r, 0.3, 0.0, 0.0, 0.0]
        for place in range(7):
            if draw.random() < 0.05:
                row[place] = math.nan
        row[7] = float(draw.random() < 0.05)
        told = {"kl": draw.lognormvariate(-4, 1)}
        if draw.random() < 0.1:
            told["alpha"] = draw.random()
        if draw.random() < 0.1:
            told["prior"] = draw.choice([draw.random(), torch.tensor(draw.random()), torch.tensor(math.inf)])
        rows.append((None if draw.random() < 0.2 else row, told))
    compare(OPTIONS[case], rows, 1e-12)


# Where an average of the largest float is taken, the last bit decides whether it overflows.
below_the_end = numbers.map(lambda x: math.copysign(1e300, x) if 1e300 < abs(x) < math.inf else x)

measurements = st.tuples(*[below_the_end] * 7, st.sampled_from([0.0, 0.0, 2.0]))


@settings(max_examples=200, deadline=None)
@given(
    case=st.sampled_from(sorted(OPTIONS)),
    rows=st.lists(
        st.tuples(st.one_of(st.none(), st.tuples(*[below_the_end] * 7, st.sampled_from([0.0, 0.0, 2.0]))), numbers)
    ),
)
def test_any_numbers(case, rows):
    # mu cancels where numbers differ by 300 orders of magnitude: what is compared is the kind of result there
    law = gac.Controller("gac", **OPTIONS[case]).law
    reference = gac.Controller("gac", **OPTIONS[case])
    state = numbers_of(law.state)
    for number, (row, kl) in enumerate(rows):
        measured = statistics((*row, 0.0, 0.0)) if row else None
        reference.update(measured, kl=kl)
        plain = {name: float(getattr(measured, name)) for name in gac.Statistics.names()} if row else None
        state = update(law, state, plain, Step(number, kl=kl))
        assert law.mu_min <= state["mu"] <= law.mu_max
        for name in ("mu", "waiting", "unsettled"):
            assert same(state[name], reference.law.state[name].tolist(), 1e-9), name
        assert math.isfinite(state["raw"]) == math.isfinite(float(reference.law.state["raw"]))

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
    "a prior that is sure": {"prior": 0.3, "prior_sd": 0.02},
    "start": {"start": 0.8, "cap": 0.005},
    "schedule": {"prior": {"warmup": 5, "decay": 30, "peak": 0.9, "valley": 0.1}},
    "a schedule of tensors": {"prior": lambda step: torch.tensor(math.nan if step % 3 else 0.7)},
    "kl": {"alpha": "kl", "momentum": 0.9},
    "alpha": {"alpha": 0.0},
    "no guardrails": {"cap": 1.0, "mu_min": 0.0, "mu_max": 1.0},
}


SHARES = {"mu", "raw", "mu_raw", "alpha", "prior", "cosine"}
"""Differences of numbers up to 1, whatever is left of these: of weights, and of products of unit vectors."""

NORMS = ("sigma_s2", "sigma_r2", "distance2", "norm_s2", "norm_r2", "delta_g2", "dot")
"""Differences of a step's squared norms; their standard errors are differences of two steps'."""
OF_NORMS = {*NORMS, *(f"{name}_se" for name in NORMS)}


def same(found, expected, rel, name="", unit=0.0):
    """Whether numbers agree to ``rel`` of what they were computed from, some thousand roundings.

    Sums and products of numbers of one sign keep their accuracy, and are held to ``rel`` of themselves. What is
    a difference has the rounding of what it is a difference of: shares of numbers up to 1; numbers of a list, averages
    of one kind, of the largest in it; statistics of squared norms, of which ``unit`` is the largest. The terms of the
    evidence are differences of shares times such norms, so that each has the rounding of ``unit``, and its square that
    of ``unit`` times their root mean square.
    """
    if name == "evidence":
        (total, squares), (total_, squares_) = found, expected
        size = math.sqrt(squares_) if squares_ >= 0 else 0.0  # NaN is none
        return _close(total, total_, rel, unit) and _close(squares, squares_, rel, size * unit)
    if isinstance(expected, list):
        largest = max((abs(x) for x in expected if not isinstance(x, list) and math.isfinite(x)), default=0.0)
        pairs = zip(found, expected, strict=True)
        return len(found) == len(expected) and all(
            same(f, e, rel) if isinstance(e, list) else _close(f, e, rel, largest) for f, e in pairs
        )
    return _close(found, expected, rel, 1.0 if name in SHARES else unit if name in OF_NORMS else 0.0)


def _close(found, expected, rel, scale):
    tolerance = rel * scale if math.isfinite(scale) else 0.0
    return (found != found and expected != expected) or math.isclose(found, expected, rel_tol=rel, abs_tol=tolerance)


def unit_of(numbers):
    """The largest squared norm among statistics by name, or among the averages of a law's state; 0 for none."""
    norms = [numbers[name] for name in NORMS if name in numbers]
    for total, weight in numbers.get("sums", ()):
        norms += [x / w for x, w in zip(total, weight, strict=True) if w > 0]
    return max((abs(x) for x in norms if math.isfinite(x)), default=0.0)


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
        unit = unit_of(expected)
        for name in expected:
            assert same(state[name], expected[name], rel, name, unit), (number, name, state[name], expected[name])


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
            assert same(state[name], reference.law.state[name].tolist(), 1e-9, name), name
        assert math.isfinite(state["raw"]) == math.isfinite(float(reference.law.state["raw"]))

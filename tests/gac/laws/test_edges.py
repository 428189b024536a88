"""mu stays finite and inside its bounds, for every law that sets mu, whatever it is told."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gac
from tests.gac.truth import contribution_statistics, noise_from_contributions

S = gac.Statistics
NAN, INF = math.nan, math.inf

LAWS = {
    "gac": ("gac", {}, (0.05, 0.95)),
    "gac with a prior": ("gac", {"prior": 0.3}, (0.05, 0.95)),
    "gac with kl": ("gac", {"alpha": "kl", "cap": 1.0, "mu_min": 0.1, "mu_max": 0.8}, (0.1, 0.8)),
    "gac without guardrails": ("gac", {"cap": 1.0, "mu_min": 0.0, "mu_max": 1.0, "half_life": 1e9}, (0.0, 1.0)),
    "paper": ("paper", {"mu_update_freq": 1}, (0.05, 0.9)),
    "paper without a prior": ("paper", {"mu_update_freq": 1, "blend": 1.0, "ema_beta": 0.0}, (0.05, 0.9)),
    "paper with a ratio": ("paper", {"mu_update_freq": 1, "blend": 1.0, "delta_g2_cap_ratio": 2.0}, (0.05, 0.9)),
    "kl-ctrl": ("kl-ctrl", {}, (0.05, 0.9)),
    "entropy-ctrl": ("entropy-ctrl", {"rate": 10.0}, (0.05, 0.95)),
    "chord-mu": ("chord-mu", {}, (0.05, 0.9)),
    "sequential": ("sequential", {"split": 2}, (0.0, 1.0)),
    "aim": ("aim", {}, (0.001, 0.999)),
    "fixed": ("fixed", {"mu": 0.3}, (0.3, 0.3)),
}
every_law = pytest.mark.parametrize("case", LAWS)

numbers = st.one_of(
    st.sampled_from(
        [0.0, -0.0, 1.0, -1.0, 1e-30, 1e30, -1e30, 5e-324, sys.float_info.min, sys.float_info.max, NAN, INF, -INF]
    ),
    st.floats(-30, 30).map(lambda x: 10.0**x),
)
steps = st.lists(
    st.one_of(st.none(), st.tuples(*[numbers] * 7, st.sampled_from([0.0, 0.0, 0.0, 2.0]), numbers, numbers)),
    min_size=1,
    max_size=6,
)


def statistics(row: tuple) -> S:
    s, r, delta, distance, *errors = row[:7]
    names = ("sigma_s2_se", "sigma_r2_se", "distance2_se")
    return S(s, r, delta, distance, nonfinite=row[7], **dict(zip(names, errors, strict=True)))


def check(controller: gac.Controller, low: float, high: float) -> float:
    mu = float(controller.mu)
    assert low <= mu <= high, (mu, low, high)  # NaN fails too
    return mu


@every_law
@settings(max_examples=25, deadline=None)
@given(rows=steps)
def test_any_numbers(case, rows):
    name, options, (low, high) = LAWS[case]
    controller = gac.Controller(name, **options)
    cap = getattr(controller.law, "cap", 1.0)
    last = check(controller, low, high)
    seen = [0, 0, 0]  # how often law gac has measured each number
    for row in rows:
        kl, entropy = (row[8], row[9]) if row else (0.0, 0.0)
        controller.update(statistics(row) if row else None, kl=kl, entropy=entropy)
        mu = check(controller, low, high)
        extra = 0.0
        if name == "gac" and row and row[7] == 0.0:
            new = [math.isfinite(x) for x in row[:3]]
            seen = [n + known for n, known in zip(seen, new, strict=True)]
            extra = max((1 / n for n, known in zip(seen, new, strict=True) if known), default=0.0)
        assert abs(mu - last) <= cap + extra + 1e-12
        if row and row[7] and name in ("gac", "paper"):
            assert mu == last, "a step with non-finite gradients changes nothing"
        last = mu


@every_law
@settings(max_examples=25, deadline=None)
@given(rows=steps)
def test_what_a_law_comes_to_is_never_refused_as_a_state(case, rows):
    name, options, _ = LAWS[case]
    controller = gac.Controller(name, **options)
    for row in rows:
        kl, entropy = (row[8], row[9]) if row else (0.0, 0.0)
        controller.update(statistics(row) if row else None, kl=kl, entropy=entropy)
        other = gac.Controller(name, **options)
        other.load_state_dict(controller.state_dict())
        assert other.steps == controller.steps
        for entry, value in controller.law.state.items():
            torch.testing.assert_close(other.law.state[entry], value, rtol=0, atol=0, equal_nan=True)


def measured(x_s: list[float], x_r: list[float]) -> S:
    """Statistics of one-dimensional contributions, by the package's own formulas."""
    values = {}
    for name, x in (("s", torch.tensor(x_s, dtype=torch.float64)), ("r", torch.tensor(x_r, dtype=torch.float64))):
        n, norm2 = torch.tensor(float(len(x))), x.sum() ** 2
        values |= {f"sigma_{name}2": noise_from_contributions((x**2).sum(), norm2, n), f"norm_{name}2": norm2}
        values[f"n_{name}"] = n
    dot = torch.tensor(sum(x_s) * sum(x_r), dtype=torch.float64)
    return contribution_statistics(**values, dot=dot, nonfinite=torch.zeros(()))


SITUATIONS = {
    "all advantages zero": (measured([1.0, 3.0], [0.0, 0.0]), 0.0),
    "demonstrations without a gradient": (measured([0.0, 0.0], [1.0, 3.0]), 1.0),
    "nothing has a gradient": (measured([0.0, 0.0], [0.0, 0.0]), None),
    "identical branches": (measured([1.0, 3.0], [1.0, 3.0]), 0.5),
    "noise-free branches": (measured([1.0, 1.0], [3.0, 3.0]), 0.5),
    "one contribution each": (measured([1.0], [2.0]), None),
    "one contribution of one branch": (measured([1.0, 3.0], [2.0]), None),
    "tiny": (S(1e-30, 3e-30, 0.0, 4e-30, sigma_s2_se=1e-31, sigma_r2_se=1e-31, distance2_se=1e-31), 0.75),
    "huge": (S(1e30, 3e30, 0.0, 4e30, sigma_s2_se=1e29, sigma_r2_se=1e29, distance2_se=1e29), 0.75),
    "far apart": (S(1e-30, 1e30, 1.0), 1.0),
    "denormal": (S(1e-310, 3e-310, 0.0), 0.75),
}


@pytest.mark.parametrize("situation", SITUATIONS)
def test_where_the_estimate_goes(situation):
    """After one step (an average that has seen one value) and after a hundred."""
    told, expected = SITUATIONS[situation]
    controller = gac.Controller("gac", cap=1.0, mu_min=0.0, mu_max=1.0, start=0.4)
    for _ in range(100):
        mu = float(controller.update(told))
        if expected is None:
            assert mu == 0.4, "nothing known: mu stays"
        elif situation == "all advantages zero":  # delta_g2 = 16 - 4, sigma_s2 = 4
            assert mu == pytest.approx(6 / 16)
        elif situation == "demonstrations without a gradient":
            assert mu == pytest.approx(1 - 6 / 16)
        else:
            assert mu == pytest.approx(expected, rel=1e-6)


@every_law
@pytest.mark.parametrize("situation", SITUATIONS)
def test_situations_in_every_law(case, situation):
    name, options, bounds = LAWS[case]
    controller = gac.Controller(name, **options)
    for _ in range(12):
        controller.update(SITUATIONS[situation][0], kl=0.02, entropy=1.0)
        check(controller, *bounds)


@every_law
@pytest.mark.parametrize("missing", ["sft", "rl", "both"])
def test_a_branch_missing_for_a_hundred_steps(case, missing):
    name, options, bounds = LAWS[case]
    controller = gac.Controller(name, **options)
    present = S(1.0, 2.0, 1.0, 4.0, sigma_s2_se=0.1, sigma_r2_se=0.1, distance2_se=0.1)
    absent = {"sft": S(sigma_r2=2.0, sigma_r2_se=0.1), "rl": S(sigma_s2=1.0, sigma_s2_se=0.1), "both": None}[missing]
    told = [present] * 60 + [absent] * 100 + [present] * 60
    mus = []
    for row in told:
        controller.update(row, kl=0.02, entropy=1.0)
        mus.append(check(controller, *bounds))
    if name == "gac" and "prior" not in options:  # the weight of a prior still settles
        assert mus[59] == pytest.approx(mus[159], abs=1e-9), "what was known is kept"
        assert mus[219] == pytest.approx(mus[59], abs=1e-9)


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e30])
def test_the_scale_of_gradients_does_not_matter(scale):
    """mu and its standard error are ratios."""
    ends = []
    for c in (1.0, scale):
        controller = gac.Controller("gac", prior=0.3)
        for k in range(5):
            row = [c * x for x in (1.0 + k, 2.0, 0.5, 3.5 + k, 0.3, 0.2, 0.6)]
            controller.update(statistics((*row, 0.0)))
        ends.append([float(controller.law.state[key]) for key in ("mu", "raw", "mu_se")])
    assert ends[0] == pytest.approx(ends[1], rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers_of_other_dtypes(dtype):
    controller = gac.Controller("gac", prior=0.5, alpha="kl")
    controller.update(S(torch.tensor(1.0, dtype=dtype), 2.0, 0.5), kl=torch.tensor(0.5, dtype=dtype))
    assert controller.mu.dtype == torch.float64
    check(controller, 0.05, 0.95)

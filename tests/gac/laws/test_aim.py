"""Law ``aim``: its parts against formulas by hand, its invariances, what pins it, and numbers of any size."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gac
from gac.laws.aim import AimLaw
from gac.statistics.trust import probability_right
from gac.statistics.worth import Worth
from tests.gac.laws.planted import answers_of, measured

NAN, INF = math.nan, math.inf
ROWS = measured("teacher", 0)[:40]
UNITS = {"norm_s2": 2, "sigma_s2": 2, "dot": 1, "worth_ss": 2, "worth_sr": 1, "worth_rs": 1}
"""Powers of the SFT loss's unit in what the law looks at."""


def number(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


def trust(c: float, error: float, scale: float, prior: float) -> float:
    """P by its definition: densities of a measured ``c`` under three teachers, the half-normal ones by quadrature."""

    def likelihood(sign: int) -> float:
        points = torch.linspace(0, 8 * scale, 20_001, dtype=torch.float64)
        density = torch.exp(-((c - sign * points) ** 2) / (2 * error**2) - points**2 / (2 * scale**2))
        return float(torch.trapezoid(density, points)) * 2 / math.sqrt(2 * math.pi) / scale

    useless = math.exp(-(c**2) / (2 * error**2))
    right, wrong = likelihood(1), likelihood(-1)
    return prior * right / (prior * right + (1 - prior) * (wrong + useless) / 2)


@pytest.mark.parametrize("c", [-0.4, -0.05, 0.0, 0.03, 0.3])
@pytest.mark.parametrize("error", [0.02, 0.1, 1.0])
def test_the_probability_is_that_of_the_three_teachers(c, error):
    found = probability_right(number(c), number(error), number(0.2), 0.6)
    assert float(found) == pytest.approx(trust(c, error, max(0.2, error), 0.6), rel=1e-5, abs=1e-12)


@pytest.mark.parametrize(("c", "error", "scale"), [(0.3, NAN, 0.2), (0.1, 0.0, 0.2), (NAN, 0.1, 0.2), (NAN, NAN, NAN)])
def test_what_cannot_be_told_leaves_the_prior(c, error, scale):
    assert float(probability_right(number(c), number(error), number(scale), 0.6)) == pytest.approx(0.6, rel=1e-12)


def test_weights_are_the_least_squares_solution():
    """Of 100,000 draws of two noisy gradients, no other weights come nearer to the target, to a thousandth."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    g_s, g_r = torch.tensor([1.0, 0.0, 0.5]).double(), torch.tensor([0.3, 0.8, 0.0]).double()
    alpha, noise = 0.3, (0.7, 1.2)  # standard deviation in each of 3 directions; no momentum
    law = AimLaw(alpha=alpha, momentum=0.0)
    sigma = [3 * s**2 for s in noise]
    size = [float(g @ g) + v for g, v in zip((g_s, g_r), sigma, strict=True)]
    own = [float(g_s @ g_s), float(g_r @ g_r)]
    many = torch.tensor([[*size, *own, float(g_s @ g_r), NAN, NAN, NAN, NAN]]).double()
    share, lengths, *_ = law._weigh(many, torch.zeros(9).double(), gac.laws.Step(0))
    assert lengths[0].tolist() == pytest.approx([math.sqrt(x) for x in size])
    drawn = [(g + s * draw(100_000, 3)) / u for g, s, u in zip((g_s, g_r), noise, lengths[0], strict=True)]
    target = alpha * g_s / lengths[0, 0] + (1 - alpha) * g_r / lengths[0, 1]
    columns = torch.stack([x.reshape(-1) for x in drawn], dim=1)
    x, y = torch.linalg.lstsq(columns, target.repeat(100_000)[:, None]).solution.flatten().tolist()
    assert float(share[0]) == pytest.approx(x / (x + y), abs=5e-3)


def test_a_unit_changes_mu_and_not_the_share():
    """Exactly, to rounding, when the SFT loss is multiplied by a power of two."""
    runs = []
    for unit in (1.0, 64.0):
        rows = [row | {name: row[name] * unit**power for name, power in UNITS.items()} for row in ROWS]
        mus = answers_of("aim")(rows)
        runs.append([mu * unit / (mu * unit + 1 - mu) for mu in mus])
    assert runs[0][0] == pytest.approx(0.5, abs=0.3)
    assert runs[1] == pytest.approx(runs[0], rel=1e-9)


def test_pins():
    assert set(answers_of("aim", mu=0.3)(ROWS)) == {0.3}
    controller = gac.Controller("aim", alpha=0.2)
    one = gac.Statistics(norm_s2=2.0, norm_r2=2.0, sigma_s2=1.0, sigma_r2=1.0, dot=0.0, n_s=2, n_r=2)
    controller.update(one)
    assert float(controller.law.state["alpha"]) == 0.2
    assert float(controller.mu) == pytest.approx(0.2)  # equal lengths, at right angles
    controller.update(one, alpha=0.9)
    assert float(controller.law.state["alpha"]) == 0.9


def test_a_step_without_statistics_goes_on_towards_the_estimate_by_the_cap():
    controller = gac.Controller("aim", alpha=0.0, cap=0.01)
    answers = [float(controller.update(None)) for _ in range(2)]
    assert answers == [0.5, 0.5]
    one = gac.Statistics(norm_s2=2.0, norm_r2=2.0, sigma_s2=1.0, sigma_r2=1.0, dot=0.0, n_s=2, n_r=2)
    for _ in range(4):
        controller.update(one)
    controller.law.state["share"] = number(0.4)
    before = float(controller.law.state["wanted"])
    assert before == 0.0
    assert float(controller.update(None)) == pytest.approx(0.39)


def test_standard_errors_are_those_of_moved_averages():
    """alpha_se and mu_se shrink with the noise."""
    found = []
    for factor in (1.0, 0.3):
        controller = gac.Controller("aim", momentum=0.9)
        generator = torch.Generator().manual_seed(1)
        for _ in range(30):
            x = torch.randn(9, generator=generator, dtype=torch.float64) * factor
            worth = Worth(torch.stack([1 + x[0], 0.3 + x[1], 0.3 + x[2], 1 + x[3]]), torch.full((4,), factor).double())
            controller.update(
                gac.Statistics(
                    norm_s2=5 + x[4], norm_r2=5 + x[5], sigma_s2=4.0, sigma_r2=4.0, dot=0.3 + x[6], n_s=4, n_r=4
                ),
                worth=worth,
            )
        found.append([float(controller.law.state[name]) for name in ("mu_se", "alpha_se")])
    assert all(0 < small < large < 0.5 for large, small in zip(*found, strict=True))


numbers = st.one_of(
    st.sampled_from([0.0, 1.0, -1.0, 1e-30, 1e30, -1e30, 5e-324, 1.7e308, NAN, INF, -INF]),
    st.floats(-30, 30).map(lambda x: 10.0**x),
)
rows = st.lists(st.one_of(st.none(), st.tuples(*[numbers] * 13, st.sampled_from([0.0, 0.0, 1.0]))), max_size=5)


@settings(max_examples=60, deadline=None)
@given(rows, st.booleans())
def test_mu_is_finite_and_bounded_whatever_is_measured(rows, told):
    controller = gac.Controller("aim", momentum=0.9)
    for row in rows:
        if row is None:
            controller.update(None)
            continue
        names = ("sigma_s2", "sigma_r2", "norm_s2", "norm_r2", "dot")
        statistics = gac.Statistics(**dict(zip(names, row[:5], strict=True)), n_s=2, n_r=2, nonfinite=row[13])
        values = torch.tensor(row[5:13], dtype=torch.float64)
        worth = Worth(values[:4], values[4:].abs()) if told else None
        before = float(controller.mu)
        mu = float(controller.update(statistics, worth=worth))
        assert 0.001 <= mu <= 0.999
        assert mu == before or row[13] == 0
    law = controller.law.state
    assert 0.05 <= float(law["share"]) <= 0.95
    assert 0 <= float(law["alpha"]) <= 0.5
    other = gac.Controller("aim", momentum=0.9)
    other.load_state_dict(controller.state_dict())
    assert float(other.mu) == float(controller.mu)

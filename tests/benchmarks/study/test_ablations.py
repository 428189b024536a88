"""The laws that only the study has, against what they say they compute."""

import pytest
import torch

from benchmarks.study.ablations import LAWS, registered
from gac.laws.controller import Controller


@pytest.fixture(autouse=True)
def laws():
    with registered():
        yield


def test_they_are_known_only_while_asked_for():
    from gac.laws import available

    assert set(LAWS) <= set(available())
    with registered():
        pass
    assert not set(LAWS) & set(available())


def statistics(**numbers):
    """Statistics of a step with the numbers given; the rest follows or is 1."""
    from gac.statistics import Statistics

    values = {"norm_s2": 1.0, "norm_r2": 1.0, "dot": 0.0, "sigma_s2": 0.5, "sigma_r2": 0.5} | numbers
    values["distance2"] = values["norm_s2"] + values["norm_r2"] - 2 * values["dot"]
    values["delta_g2"] = values["distance2"] - values["sigma_s2"] - values["sigma_r2"]
    return Statistics(**{k: torch.tensor(v, dtype=torch.float64) for k, v in values.items()}, n_s=4, n_r=4, nonfinite=0)


def settled(law: str, given, **options) -> float:
    controller = Controller(law, **options)
    for _ in range(60):
        mu = controller.update(given)
    return float(mu)


def test_without_disagreement_only_noise_counts():
    given = statistics(norm_s2=9.0, norm_r2=9.0, sigma_s2=1.0, sigma_r2=3.0)
    assert settled("gac-no-disagreement", given) == pytest.approx(0.75)
    assert settled("gac", given) == pytest.approx((0.5 * 14 + 3) / 18)


def test_without_variance_mu_goes_to_alpha():
    given = statistics(norm_s2=9.0, norm_r2=9.0, sigma_s2=1.0, sigma_r2=3.0)
    assert settled("gac-no-variance", given, alpha=0.3) == pytest.approx(0.3)


def test_the_direction_law_points_best():
    """Against a search over mu for the best expected alignment with the target, gradients drawn at random."""
    torch.manual_seed(0)
    g_s, g_r = torch.randn(50, dtype=torch.float64), 0.7 * torch.randn(50, dtype=torch.float64)
    g_r += 0.2 * g_s
    sigma_s2, sigma_r2, alpha = 20.0, 60.0, 0.5
    target = alpha * g_s + (1 - alpha) * g_r
    mus = torch.linspace(0.05, 0.95, 9001, dtype=torch.float64)
    mixed = mus[:, None] * g_s + (1 - mus)[:, None] * g_r
    length2 = mixed.square().sum(1) + mus**2 * sigma_s2 + (1 - mus) ** 2 * sigma_r2
    best = mus[((mixed @ target) / length2.sqrt()).argmax()]
    given = statistics(
        norm_s2=float(g_s @ g_s) + sigma_s2, norm_r2=float(g_r @ g_r) + sigma_r2, dot=float(g_s @ g_r),
        sigma_s2=sigma_s2, sigma_r2=sigma_r2,
    )  # fmt: skip
    assert settled("gac-direction", given) == pytest.approx(float(best), abs=2e-4)
    assert abs(settled("gac", given) - float(best)) > 0.01  # another aim, another mu


def test_the_direction_law_leaves_a_poisoned_step_out():
    controller = Controller("gac-direction")
    before = float(controller.update(statistics()))
    assert float(controller.update(statistics(norm_s2=float("nan")))) == before

"""Formulas over sums, and the coefficient estimator by hand."""

from __future__ import annotations

import math
import statistics as plain

import pytest
import torch

import gac
from tests.gac.truth import noise_from_contributions


def number(value) -> torch.Tensor:
    return torch.tensor(float(value), dtype=torch.float64)


@pytest.mark.parametrize("n", [2, 3, 8])
def test_noise_is_unbiased(n):
    """2,000 draws of n Gaussian contributions: the mean is within 4 standard errors of the truth."""
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(2000, n, 30, generator=generator, dtype=torch.float64) + 2.0
    power, total = x.square().sum((1, 2)), x.sum(1).square().sum(1)
    estimates = noise_from_contributions(power, total, torch.full((2000,), float(n)))
    truth = n * 30.0
    assert abs(float(estimates.mean()) - truth) < 4 * float(estimates.std()) / math.sqrt(2000)


def test_one_contribution_measures_no_noise():
    assert math.isnan(float(noise_from_contributions(number(3), number(3), number(1))))


def test_equal_contributions_have_no_noise():
    assert float(noise_from_contributions(number(3 * 0.1), number(9 * 0.1), number(3))) == pytest.approx(0, abs=1e-12)


def test_coefficients_by_hand():
    logprobs = torch.log(torch.tensor([[0.5, 0.2], [0.9, 0.5], [0.25, 0.75]], dtype=torch.float64))
    advantages = torch.tensor([7.0, 1.0, -1.0], dtype=torch.float64)
    mask = torch.tensor([[1, 1], [1, 0], [1, 1]])
    expert = torch.tensor([True, False, False])
    found = gac.coefficient_statistics(logprobs, advantages, mask, expert, z_normalize=False)
    phi = lambda p: p * (1 - p)
    rows = [
        (phi(0.5) ** 2 + phi(0.2) ** 2) / 2,
        (phi(0.9) - 1.0) ** 2,
        ((phi(0.25) + 1.0) ** 2 + (phi(0.75) + 1.0) ** 2) / 2,
    ]
    assert float(found.delta_g2) == pytest.approx(sum(rows) / 3)
    assert float(found.sigma_r2) == pytest.approx(1.0)
    assert float(found.sigma_s2) == 1e-8, "one demonstration has no variance: the floor"
    assert (float(found.n_s), float(found.n_r)) == (1, 2)
    plain_form = gac.coefficient_statistics(logprobs, advantages, mask, expert, z_normalize=False, phi=False)
    assert float(plain_form.delta_g2) == pytest.approx((1 + 0 + 4) / 3)


def test_z_normalised_coefficients():
    generator = torch.Generator().manual_seed(0)
    logprobs = -torch.rand(5, 7, generator=generator, dtype=torch.float64)
    advantages = torch.randn(5, 7, generator=generator, dtype=torch.float64)
    mask = torch.rand(5, 7, generator=generator) > 0.3
    expert = torch.tensor([True, False, False, False, True])
    found = gac.coefficient_statistics(logprobs, advantages, mask, expert)
    rows = [1, 2, 3]
    c_s = [-(p * (1 - p)) for p in logprobs[rows][mask[rows]].exp().tolist()]
    c_r = [-a for a in advantages[rows][mask[rows]].tolist()]
    z = lambda xs: [(x - plain.fmean(xs)) / plain.pstdev(xs) for x in xs]
    squares = [(a - b) ** 2 for a, b in zip(z(c_s), z(c_r), strict=True)]
    sizes = mask[rows].sum(1).tolist()
    means = [plain.fmean(squares[sum(sizes[:k]) : sum(sizes[: k + 1])]) for k in range(3)]
    assert float(found.delta_g2) == pytest.approx(plain.fmean(means), rel=1e-9)


def test_trimming():
    nll = [10.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, -90.0]
    logprobs = -torch.tensor(nll, dtype=torch.float64)[:, None]
    expert = torch.ones(10, dtype=torch.bool)
    found = gac.coefficient_statistics(logprobs, torch.zeros(10, dtype=torch.float64), torch.ones(10, 1), expert)
    assert float(found.sigma_s2) == pytest.approx(plain.pvariance([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]))
    untrimmed = gac.coefficient_statistics(
        logprobs[:3], torch.zeros(3, dtype=torch.float64), torch.ones(3, 1), expert[:3]
    )
    assert float(untrimmed.sigma_s2) == pytest.approx(plain.pvariance(nll[:3]))
    assert math.isnan(float(untrimmed.sigma_r2)), "no rollout, no number"
    assert math.isnan(float(untrimmed.delta_g2))


def test_one_branch_and_empty_rows():
    logprobs = torch.log(torch.tensor([[0.5, 0.5], [0.3, 0.3]]))
    found = gac.coefficient_statistics(
        logprobs, torch.tensor([1.0, 2.0]), torch.tensor([[1, 1], [0, 0]]), torch.tensor([False, False])
    )
    assert math.isnan(float(found.sigma_s2))
    assert float(found.n_r) == 1, "a row without tokens does not count"
    assert float(found.nonfinite) == 0


def test_masked_values_are_never_used():
    logprobs = torch.tensor([[-1.0, math.nan], [-2.0, -math.inf]])
    mask = torch.tensor([[1, 0], [1, 0]])
    found = gac.coefficient_statistics(
        logprobs, torch.tensor([[1.0, math.nan], [2.0, math.inf]]), mask, torch.tensor([False, True])
    )
    for name in ("sigma_s2", "sigma_r2", "delta_g2"):
        assert math.isfinite(float(getattr(found, name)))
    assert float(found.nonfinite) == 0
    poisoned = gac.coefficient_statistics(
        logprobs, torch.tensor([1.0, 2.0]), torch.ones(2, 2), torch.tensor([False, True])
    )
    assert float(poisoned.nonfinite) > 0


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"trim": 0.5}, "trim"),
        ({"logprobs": torch.zeros(3)}, "logprobs must have shape"),
        ({"advantages": torch.zeros(4)}, "advantages must have shape"),
        ({"mask": torch.ones(2, 3)}, "mask must have shape"),
        ({"is_expert": torch.ones(3, dtype=torch.bool)}, "is_expert must have shape"),
    ],
)
def test_wrong_arguments(change, match):
    arguments = {
        "logprobs": torch.zeros(2, 2),
        "advantages": torch.zeros(2),
        "mask": torch.ones(2, 2),
        "is_expert": torch.tensor([True, False]),
    }
    with pytest.raises(ValueError, match=match):
        gac.coefficient_statistics(**(arguments | change))

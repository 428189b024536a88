import pytest
import torch

from gac.audit.jackknife import jackknife
from gac.audit.replicates import gram, mean_squared_error, oracle, truth
from gac.laws.base import closed_form
from tests.gac.audit.synthetic import MEAN_R, MEAN_S, draw, true_values


def test_inner_products_are_those_of_float64(monkeypatch):
    monkeypatch.setattr("gac.audit.replicates._CHUNK", 7)
    vectors = torch.randn(5, 23)
    wide = vectors.double()
    torch.testing.assert_close(gram(list(vectors)), wide @ wide.T, rtol=1e-14, atol=1e-14)


def test_numbers_are_those_of_the_definitions_with_and_without_each_step():
    kinds = draw(6, torch.Generator().manual_seed(0), shift=True)
    found = truth(*map(list, kinds))

    def by_definition(rows):
        s, r, f = (x[rows] for x in kinds)
        n = len(rows)
        trace = lambda x: (x - x.mean(0)).square().sum() / (n - 1)
        norm2 = lambda x: x.mean(0).square().sum() - trace(x) / n
        return torch.stack(
            [
                s.square().sum(1).mean() - 2 * s.mean(0) @ f.mean(0) + norm2(f),
                trace(r),
                norm2(f) - 2 * f.mean(0) @ r.mean(0) + norm2(r),
                s.mean(0) @ (f.mean(0) - r.mean(0)) - norm2(f) + f.mean(0) @ r.mean(0),
            ]
        )

    torch.testing.assert_close(found.values, by_definition(list(range(6))), rtol=1e-12, atol=1e-12)
    for left_out in range(6):
        rest = [k for k in range(6) if k != left_out]
        torch.testing.assert_close(found.deleted[left_out], by_definition(rest), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shift", [False, True])
def test_truth_has_no_bias_and_knows_its_error(shift):
    """Over many truths: means within 4 standard errors, and reported variances that err on the safe side.

    A jackknife variance is never too small on average (Efron and Stein 1981), and too large by a share that falls with
    the number of steps.
    """
    generator = torch.Generator().manual_seed(1)
    for steps, draws, most in ((6, 2000, 2.2), (32, 600, 1.4)):
        found = [truth(*draw(steps, generator, shift)) for _ in range(draws)]
        values = torch.stack([x.values for x in found])
        error = values.std(0) / draws**0.5
        assert ((values.mean(0) - true_values(shift)).abs() < 4 * error).all()
        ratio = torch.stack([x.covariance.diagonal() for x in found]).mean(0) / values.var(0)
        assert ((ratio > 0.9) & (ratio < most)).all(), ratio


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize(("mu", "alpha"), [(0.0, 0.5), (0.3, 0.5), (0.9, 0.2), (1.0, 1.0)])
def test_error_of_the_mix_is_what_mixing_shows(mu, alpha, shift):
    sft, rl, _ = draw(20_000, torch.Generator().manual_seed(2), shift)
    target = alpha * MEAN_S + (1 - alpha) * MEAN_R
    squares = (mu * sft + (1 - mu) * rl - target).square().sum(1)
    error = squares.std() / len(squares) ** 0.5
    assert abs(squares.mean() - mean_squared_error(mu, true_values(shift), alpha)) < 4 * error


def test_oracle_has_the_least_error():
    grid = torch.linspace(0, 1, 10_001, dtype=torch.float64)
    for alpha in (0.0, 0.5, 0.8):
        for values in (true_values(False), true_values(True), torch.tensor([1.0, 3.0, -0.5, 0.1])):
            least = grid[mean_squared_error(grid, values.double().expand(len(grid), 4), alpha).argmin()]
            assert abs(oracle(values, alpha) - least) <= 1e-4
    sigma_s2, sigma_r2, delta_g2, cross = true_values(False)
    assert cross == 0
    torch.testing.assert_close(oracle(true_values(False), 0.3), closed_form(sigma_s2, sigma_r2, delta_g2, 0.3))


def test_jackknife_of_a_mean_and_of_a_square():
    x = torch.randn(3, 8, 1, dtype=torch.float64)  # points, replicates
    values = x.mean(1)
    deleted = (8 * values[:, None] - x) / 7
    mean = jackknife(lambda v: v[..., 0].sum(-1), values, deleted)
    torch.testing.assert_close(mean.se, (x.var(1) / 8).sum().sqrt())
    torch.testing.assert_close(mean.corrected, values.sum())
    square = jackknife(lambda v: v[..., 0].square().sum(-1), values, deleted)
    torch.testing.assert_close(square.corrected, (values.square() - x.var(1) / 8).sum())  # the unbiased form


def test_too_little_is_refused():
    kinds = [list(x) for x in draw(3, torch.Generator())]
    with pytest.raises(ValueError, match="2 steps are too few"):
        truth(*(x[:2] for x in kinds))
    with pytest.raises(ValueError, match="3 SFT, 2 RL and 3 fresh"):
        truth(kinds[0], kinds[1][:2], kinds[2])

"""The sketch's own error: no bias over seeds, and the variance that independent signs would have."""

from __future__ import annotations

import itertools

import pytest
import torch

import gac_kernels
from gac.observe.ledger import Ledger
from gac_kernels import SketchLayout
from tests.gac.statistics.sources import ESTIMATES, KINDS, assert_mean, error_of_variance, family, feed
from tests.gac.statistics.test_of_models import bucket_of_each_element

NUMELS = (70_000, 9_000, 70)
SEEDS = 2000


def per_bucket(layout: SketchLayout, values: torch.Tensor) -> torch.Tensor:
    return torch.zeros(layout.size, dtype=torch.float64).index_add_(0, bucket_of_each_element(layout), values)


def variance_of_product(layout: SketchLayout, x: torch.Tensor, y: torch.Tensor) -> float:
    """Variance of ``<Sx, Sy>`` over independent signs.

    A bucket holds ``sum s_i x_i``, so the error is the sum over ``i != j`` of ``s_i s_j x_i y_j`` within buckets; pairs
    are uncorrelated, ``(i, j)`` and ``(j, i)`` are one: the variance is
    ``sum_b [(sum x^2)(sum y^2) + (sum xy)^2 - 2 sum x^2 y^2]``.
    """
    xx, yy, xy = per_bucket(layout, x * x), per_bucket(layout, y * y), per_bucket(layout, x * y)
    return float((xx * yy + xy**2 - 2 * per_bucket(layout, x * x * y * y)).sum())


def variance_of_form(layout: SketchLayout, vectors: list[torch.Tensor], weights: list[float]) -> float:
    """Variance over signs of ``sum_k weights_k |S v_k|^2 = s^T A s``: twice the squares off A's diagonal, by bucket."""
    total = 0.0
    for (v, a), (w, b) in itertools.product(zip(vectors, weights, strict=True), repeat=2):
        square = per_bucket(layout, v * w).square() - per_bucket(layout, (v * w).square())
        total += 2 * a * b * float(square.sum())
    return total


def pair(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Two vectors that agree in part; ``constant`` has no random sign of its own to help the sketch's."""
    if name == "constant":
        return torch.ones(sum(NUMELS)), torch.linspace(-1, 1, sum(NUMELS))
    source = family(name, NUMELS, 1024, seed=1).to(torch.float32)
    generator = torch.Generator().manual_seed(1)
    x, z = source.draw(2, generator=generator)
    return x, 0.5 * x + z


@pytest.mark.parametrize("name", ["isotropic", "rows", "layer", "constant"])
@pytest.mark.parametrize("rows_per_slab", [1, 4, 64])
def test_norms_and_products(name, rows_per_slab):
    """Over 2,000 seeds: mean and variance of ``|Sx|^2`` and ``<Sx, Sy>``, each within 4 standard errors of theory."""
    x, y = pair(name)
    lossless = rows_per_slab == 1
    found = []
    for seed in range(20 if lossless else SEEDS):
        layout = SketchLayout(NUMELS, rows_per_slab, seed=seed)
        sx, sy = torch.empty(layout.size), torch.empty(layout.size)
        for vector, out in ((x, sx), (y, sy)):
            gac_kernels.sketch(list(vector.split(NUMELS)), out, layout=layout)
        found.append(gac_kernels.pair_moments(sx, sy)[[0, 2]])
    squares, products = torch.stack(found).unbind(1)
    x, y = x.double(), y.double()
    if lossless:
        # the same float32 numbers up to signs: float64 sums of them, up to the order of adding
        torch.testing.assert_close(squares, (x @ x).expand_as(squares), rtol=1e-6, atol=0)
        torch.testing.assert_close(products, (x @ y).expand_as(products), rtol=1e-6, atol=float(1e-6 * x @ x))
        return
    for what, values, a, b in (("|Sx|^2", squares, x, x), ("<Sx, Sy>", products, x, y)):
        expected = variance_of_product(layout, a, b)
        assert_mean(values, float(a @ b), error=(expected / SEEDS) ** 0.5, what=f"{name}, {rows_per_slab} rows, {what}")
        ratio, error = float(values.var()) / expected, error_of_variance(values) / expected
        print(f"  error {expected**0.5 / float(a.norm() * b.norm()):.2%}; variance {ratio:.3f} of theory's")
        assert abs(ratio - 1) < 4 * error, what


@pytest.mark.parametrize("kind", list(KINDS)[2:])
@pytest.mark.parametrize("rows_per_slab", [4, 64])
def test_estimators(kind, rows_per_slab, monkeypatch):
    """One step's gradients under 500 seeds: each estimate's mean is the exact one, its variance that of its form.

    ``sigma_b2 = N/(N-1) * sum_k |S(x_k - mean x)|^2``, ``distance2 = |S(G_s - G_r)|^2`` and their difference
    ``delta_g2`` are quadratic forms of the signs.
    """
    n_s, n_r, seeds = 3, 2, 500
    monkeypatch.setattr("gac.observe.ledger.SMALLEST_SKETCH", -(-sum(NUMELS) // rows_per_slab))
    generator = torch.Generator().manual_seed(2)
    source = family("direction", NUMELS, 1024, seed=1).to(torch.float32)
    x_s, x_r = source.draw(n_s, generator=generator) / n_s, -source.draw(n_r, generator=generator) / n_r
    rows = []
    for seed in range(seeds):
        ledger = Ledger(NUMELS, torch.device("cpu"), **KINDS[kind], seed=seed)
        rows.append(feed(ledger, x_s, x_r).stacked())
    assert ledger.layout.rows_per_slab == rows_per_slab
    x_s, x_r = x_s.double(), x_r.double()
    forms = {
        "sigma_s2": (list(x_s - x_s.mean(0)), [n_s / (n_s - 1)] * n_s),
        "sigma_r2": (list(x_r - x_r.mean(0)), [n_r / (n_r - 1)] * n_r),
        "distance2": ([x_s.sum(0) - x_r.sum(0)], [1.0]),
    }
    minus = [(v, -w) for key in ("sigma_s2", "sigma_r2") for v, w in zip(*forms[key], strict=True)]
    forms["delta_g2"] = (forms["distance2"][0] + [v for v, _ in minus], [1.0] + [w for _, w in minus])
    for key, values in zip(ESTIMATES, torch.stack(rows)[:, : len(ESTIMATES)].unbind(1), strict=True):
        vectors, weights = forms[key]
        exact = sum(w * float(v @ v) for v, w in zip(vectors, weights, strict=True))
        expected = variance_of_form(ledger.layout, vectors, weights)
        assert_mean(values, exact, error=(expected / seeds) ** 0.5, what=f"{kind}, {rows_per_slab} rows, {key}")
        assert abs(float(values.var()) - expected) < 4 * error_of_variance(values), key

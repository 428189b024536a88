"""Every unbiased estimator averages to the truth, for each shape of the covariance and each number of contributions."""

from __future__ import annotations

import math

import pytest
import torch

from gac.observe.ledger import Ledger
from tests.gac.statistics.sources import (
    DRAWS,
    ESTIMATES,
    FAMILIES,
    KINDS,
    assert_mean,
    error_of_variance,
    family,
    feed,
    noise,
    truth,
    variance,
)

COUNTS = [(2, 2), (3, 3), (8, 8), (2, 8), (8, 3)]
CPU = torch.device("cpu")


def estimates(x_s: torch.Tensor, x_r: torch.Tensor) -> dict[str, torch.Tensor]:
    """``[draws]`` of each estimator for contributions ``[draws, n, P]``; test_ledger has the package assemble them."""
    sigma_s2, sigma_r2 = noise(x_s), noise(x_r)
    distance2 = (x_s.sum(1) - x_r.sum(1)).square().sum(1)
    delta_g2 = distance2 - sigma_s2 - sigma_r2
    return dict(zip(ESTIMATES, (sigma_s2, sigma_r2, delta_g2, distance2), strict=True))


@pytest.mark.parametrize(("n_s", "n_r"), COUNTS)
@pytest.mark.parametrize("name", FAMILIES)
def test_formulas(name, n_s, n_r):
    """Means within 4 of theory's standard errors, and variances as theory says: standard errors are known too."""
    numels = (256, 96, 32)
    s, r = family(name, numels, 16, seed=1), family(name, numels, 16, seed=2)
    generator = torch.Generator().manual_seed(n_s * 100 + n_r)
    x_s = s.draw(DRAWS, n_s, generator=generator) / n_s
    x_r = r.draw(DRAWS, n_r, generator=generator) / n_r
    expected, spread = truth(s, n_s, r, n_r), variance(s, n_s, r, n_r)
    for key, values in estimates(x_s, x_r).items():
        assert_mean(values, expected[key], error=math.sqrt(spread[key] / DRAWS), what=f"{name} {n_s}+{n_r} {key}")
        assert abs(float(values.var()) - spread[key]) < 4 * error_of_variance(values), key


@pytest.mark.parametrize(
    ("kind", "name"), [(kind, "rows") for kind in KINDS] + [(kind, "direction") for kind in list(KINDS)[2:]]
)
def test_ledger(kind, name, monkeypatch):
    """The same through the ledger and the kernels, with 3 and 2 contributions weighted 0.3 and 0.7.

    Where elements share buckets, every draw has a seed of its own: over seeds the sketch adds variance and no bias, and
    the standard error is that of the draws. Elsewhere it is theory's.
    """
    monkeypatch.setattr("gac.observe.ledger.SMALLEST_SKETCH", 2048)
    numels, n_s, n_r = (3500, 1500, 70), 3, 2
    s, r = family(name, numels, 64, seed=1), family(name, numels, 64, seed=2)
    expected, spread = truth(s, n_s, r, n_r), variance(s, n_s, r, n_r)
    s, r = s.to(torch.float32), r.to(torch.float32)
    ledger = Ledger(numels, CPU, **KINDS[kind])
    lossy = not ledger.layout.lossless
    generator = torch.Generator().manual_seed(7)
    rows = []
    for _ in range(DRAWS // 100):
        x_s = s.draw(100, n_s, generator=generator) / n_s
        x_r = r.draw(100, n_r, generator=generator) / n_r
        for a, b in zip(x_s, x_r, strict=True):
            if lossy:
                ledger = Ledger(numels, CPU, **KINDS[kind], seed=len(rows))
            rows.append(feed(ledger, a, b, weights=(0.3, 0.7)).stacked())
    assert lossy == (ledger.layout.size < sum(numels))
    columns = torch.stack(rows)[:, : len(ESTIMATES)].unbind(1)
    for key, values in zip(ESTIMATES, columns, strict=True):
        error = None if lossy else math.sqrt(spread[key] / DRAWS)
        assert_mean(values, expected[key], error=error, what=f"{kind}, {name}, {key}")

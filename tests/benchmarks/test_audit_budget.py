"""Law gac run again over audits, under a budget: which steps are measured, and what the mix loses by it."""

from __future__ import annotations

import pytest
import torch

from benchmarks.audit_budget import (
    AUDITS,
    RESULTS,
    Record,
    Shares,
    coefficients,
    compare,
    every_so_many,
    excess,
    read,
    replay,
    shares_of,
)
from gac.audit.replicates import mean_squared_error
from gac.laws.base import noise_left
from gac.runs.folder import read_json

COMMITTED = read_json(RESULTS / "audit_budget.json")
AUDIT = read_json(RESULTS / "audit_intervals.json")["record"]
SHARES = shares_of(read_json(RESULTS / "budget_runs.json")["rows"])


def small(steps=40, points=4):
    """A record of estimates around a truth that is known to 3%."""
    generator = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    truth = torch.tensor([3.0, 12.0, 2.0, 0.1], dtype=torch.float64) * (1 + 0.2 * normal(points, 1))
    roots = 0.03 * torch.diag_embed(truth) + 0.01 * normal(points, 4, 4)
    nearest = torch.arange(steps) * points // steps
    means, deviations = truth[nearest, :3], 0.5 * truth[nearest, :3]
    estimates = means + deviations * normal(steps, 3)
    return Record(estimates, means, deviations, truth, roots @ roots.mT, nearest, alpha=0.4, momentum=0.9)


def test_with_every_step_measured_it_is_the_law_of_the_audit():
    mu, measured = replay(read(AUDIT).estimates.tolist(), AUDIT["momentum"])
    assert measured == len(mu) == 400
    assert mu == pytest.approx(AUDIT["mu"]["gac on exact"], abs=1e-4)  # what it was fed has five digits here


def test_the_costs_decide_which_steps_are_measured():
    series = read(AUDIT).estimates.tolist()
    every, _ = replay(series, 0.9)
    assert replay(series, 0.9, Shares(0.001, 0.0)) == (every, 400)
    mu, measured = replay(series, 0.9, Shares(0.09, 0.0))  # nine tenths of 1% pay for every tenth
    assert 10 + 30 <= measured <= 10 + 39
    assert mu[:11] == every[:11]
    assert mu != every
    other, measured = replay(series, 0.9, interval=4)
    assert measured == 107
    assert other == pytest.approx(AUDIT["mu"]["gac, every 4th step"], abs=1e-4)
    assert replay(series, 0.9, interval=4, phase=3)[0][:12] == every[:12]
    assert len({replay(series, 0.9, SHARES[0], seed)[1] for seed in range(4)}) > 1


def test_the_difference_and_its_error():
    record = small()
    every, found = (torch.linspace(a, b, 40, dtype=torch.float64) for a, b in ((0.5, 0.8), (0.5, 0.6)))
    noise = noise_left(record.momentum)

    def error(mu, truth):
        counted = truth * torch.tensor([noise, noise, 1.0, 1.0], dtype=torch.float64)
        return mean_squared_error(mu, counted[..., record.nearest, :], record.alpha).sum(-1)

    value, se = excess(coefficients(found.tolist(), record), coefficients(every.tolist(), record), record)
    assert value == pytest.approx(float(error(found, record.truth) / error(every, record.truth)) - 1, rel=1e-12)
    normal = torch.randn(20_000, 4, 4, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    truths = record.truth + (torch.linalg.cholesky(record.covariance) @ normal).squeeze(-1)
    drawn = error(found, truths) / error(every, truths)
    assert se == pytest.approx(float(drawn.std()), rel=0.03)  # 0.5% from 20,000 draws, the rest of second order


@pytest.mark.parametrize("redrawn", [False, True])
def test_draws_are_compared_with_every_step_measured_on_the_same_estimates(redrawn):
    free = compare(small(), [Shares(0.0, 0.0)], 3, redrawn=redrawn)
    assert free["of_draws"] == [0.0] * 3
    assert (free["excess"], free["truth_se"]) == pytest.approx((0.0, 0.0), abs=1e-12)
    assert (free["measured_least"], free["measured_most"]) == (40, 40)
    dear = compare(small(), SHARES, 6, redrawn=redrawn)
    assert dear["measured_most"] < 40
    assert dear["truth_se"] > 0
    assert dear["draws_sd"] > 0
    # the ratio of means is the mean of ratios where every draw has one denominator
    assert dear["excess"] == pytest.approx(sum(dear["of_draws"]) / 6, rel=0.5 if redrawn else 1e-9)


def test_the_committed_draws_come_out_again():
    rows = {(row["audit"], row["estimates"]): row for row in COMMITTED["rows"] if row["cost"] == 1}
    assert {audit for audit, _ in rows} == set(AUDITS)
    assert COMMITTED["shares"] == [pytest.approx(share._asdict()) for share in SHARES]
    again = compare(read(AUDIT), SHARES, 2)
    assert every_so_many(read(AUDIT), 4) == [pytest.approx(found, rel=1e-9) for found in COMMITTED["every_4th"]]
    assert again["of_draws"] == pytest.approx(rows[AUDITS[0], "recorded"]["of_draws"][:2], rel=1e-9)

import json
import math

import pytest
import torch

from gac.audit.figures import correlation, figures, mean_of_ratios, ratio_of_sums, search
from gac.audit.panel import COEFFICIENT_FORMS, GRADIENT_ESTIMATORS
from gac.audit.picture import draw_audit
from gac.audit.record import RUN
from gac.audit.replicates import oracle
from gac.audit.report import tables, verdict
from tests.gac.audit.synthetic import TRUE, record, true_values

VALUES = torch.tensor([[1.0, 3.0, 0.0, 0.0], [2.0, 1.0, 4.0, 0.0], [0.1, 5.0, -0.2, 0.5]], dtype=torch.float64)


def test_averages_by_hand():
    mu = torch.tensor([0.5, 0.5, 0.5], dtype=torch.float64)
    at_half = [1.0, 0.75, 1.275]  # (sigma_s2 + sigma_r2) / 4
    best = [0.75, 3 / 7, 5.15 / 5.9]
    least = [best[0] ** 2 + 3 * 0.25**2, (best[1] - 0.5) ** 2 * 4 + 2 * best[1] ** 2 + (1 - best[1]) ** 2]
    m = best[2]
    least.append(-0.2 * (m - 0.5) ** 2 + 0.1 * m**2 + 5 * (1 - m) ** 2 + 2 * m * (m - 0.5) * 0.5)
    assert float(ratio_of_sums(mu, VALUES, 0.5)) == pytest.approx(sum(at_half) / sum(least))
    by_ratios = sum(a / b for a, b in zip(at_half, least, strict=True)) / 3
    assert float(mean_of_ratios(mu, VALUES, 0.5)) == pytest.approx(by_ratios)


def test_search_finds_the_best_constant():
    """For the sum, the closed form of the mean numbers."""
    wanted = oracle(VALUES.mean(0), 0.5)
    assert search(VALUES, 0.5, False) == pytest.approx(float(wanted), abs=5e-4)
    by_ratios = search(VALUES, 0.5, True)
    tried = [float(mean_of_ratios(mu, VALUES, 0.5)) for mu in (by_ratios - 0.002, by_ratios, by_ratios + 0.002)]
    assert tried[1] == min(tried)


def test_estimators_without_bias_and_a_good_law():
    best = float(oracle(true_values(False), 0.5))
    made = record({"good": [best] * 4, "bad": [0.1] * 4}, scale=30.0)
    found = figures(made)
    assert (found.points, found.replicates, found.steps) == (4, 12, 4)
    for name in GRADIENT_ESTIMATORS:
        for true, (column, quality) in zip(TRUE.tolist(), found.estimators[name].items(), strict=True):
            assert abs(quality.bias.value) < 4 * quality.bias.se, (name, column)
            # of 48 draws about 4 means: known to 11%
            assert quality.deviation * found.truth[column].value == pytest.approx(0.1 * true, rel=0.4)
    for name in COEFFICIENT_FORMS:  # another unit: a scale is no bias, and only ratios matter
        assert not found.estimators[name]["sigma_s2"].bias.known
        assert found.estimators[name]["sigma_s2"].deviation == pytest.approx(0.1, rel=0.4)
        assert found.implied[name].ratio.value == pytest.approx(found.implied["exact"].ratio.value, abs=0.02)
    assert found.laws[RUN] == found.laws["good"]
    assert found.laws["good"].ratio.value < 1.1 < found.laws["bad"].ratio.value
    assert found.laws["best fixed, by sums"].ratio.value <= min(m.ratio.value for m in found.laws.values())
    for average in found.verdict.values():  # no constant beats the best one
        assert average == {"within_tolerance": True, "not_above_best_fixed": False}
    assert found.reported["sigma_s2"] == pytest.approx(1.0, rel=0.3)


def test_a_bias_and_a_lack_of_a_signal_show():
    made = record({"law": [0.9] * 4})
    for point in made.points:
        point.draws["sketch"] = point.draws["sketch"] * 1.5
        point.draws["temporal"] = point.draws["temporal"] * math.nan
    made.left_out = {"kl-ctrl": ["kl"]}
    found = figures(made)
    bias = found.estimators["sketch"]["sigma_r2"].bias
    assert abs(bias.value - 0.5) < 4 * bias.se + 0.02
    assert not found.estimators["temporal"]["sigma_r2"].bias.known
    assert "kl-ctrl left out: the run has no kl" in verdict(found)


def test_record_and_figures_are_plain_json_and_have_a_picture(tmp_path):
    made = record({"a law": [0.8] * 4, "chord-mu": [0.9, 0.8, 0.7, 0.6]})
    found = figures(made)
    text = json.dumps({"figures": found.as_json(), "record": made.as_json()})
    assert json.loads(text)["record"]["mu"]["chord-mu"][-1] == 0.6
    for _, columns, rows in tables(found):
        assert all(len(row) == len(columns) and all(isinstance(cell, str) for cell in row) for row in rows)
    draw_audit(made, tmp_path / "audit.png", title="made up")
    assert (tmp_path / "audit.png").stat().st_size > 20_000


def test_an_audit_of_before_an_estimator_was_there(tmp_path):
    """`gac audit --again` of an older record: what it lacks is left out."""
    made = record({RUN: [0.5] * 4})
    del made.estimates["sequence"]
    found = figures(made)
    assert "sequence" not in found.estimators
    assert tables(found)
    draw_audit(made, tmp_path / "audit.png")


def test_correlation():
    x = torch.tensor([1.0, 2.0, 3.0, math.nan])
    assert correlation(x, -2 * x) == pytest.approx(-1.0)
    assert math.isnan(correlation(x, torch.ones(4)))
    assert math.isnan(correlation(x[:2], x[:2]))

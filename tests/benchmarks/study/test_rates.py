"""Learning rates: losses, spreads, the top of a parabola."""

import math
import re

import pytest

from benchmarks.study import conduct
from benchmarks.study.analysis import study
from benchmarks.study.inference import compare
from benchmarks.study.measures import read_run
from benchmarks.study.rates import lr_sensitivity
from tests.benchmarks.study.fakes import record


def _runs(curve, **row):
    """Tuning runs of hpt, ``curve[lr]`` their late accuracy."""
    flat = lambda late: [[step, 0.3 if step == 0 else late] for step in range(0, 121, 20)]
    cell = {"phase": "tuning", "method": "hpt"} | row
    return [read_run(record(accuracy=flat(late), lr=lr, **cell)) for lr, late in curve.items()]


def test_losses_and_spreads():
    runs = _runs({3e-4: 0.4, 1e-3: 0.6, 3e-3: 0.5}) + _runs({3e-4: 0.5, 1e-3: 0.4, 3e-3: 0.3}, task="rotate")
    runs += _runs({1e-3: 0.9}, setting="gate=2")
    found = lr_sensitivity(runs)["hpt"]
    assert found.off_by_one == pytest.approx((0.15 + 0.1) / 2)
    assert found.spread == pytest.approx(0.2)
    assert found.tasks == 2
    assert found.means == pytest.approx({3e-4: 0.45, 1e-3: 0.5, 3e-3: 0.4})
    assert not found.at_end


def test_peak_of_a_parabola_is_found_wherever_it_lies():
    for top in (2e-5, 1e-4, 2e-4):
        curve = {lr: 0.5 - 0.02 * math.log(lr / top) ** 2 for lr in (1e-5, 3e-5, 1e-4, 3e-4)}
        assert lr_sensitivity(_runs(curve))["hpt"].peak == pytest.approx(top)


def test_peak_at_an_end():
    found = lr_sensitivity(_runs({1e-5: 0.29, 3e-5: 0.285, 1e-4: 0.255}))["hpt"]
    assert found.at_end
    assert 1e-5 < found.peak < 3e-5
    rising = lr_sensitivity(_runs({1e-5: 0.1, 3e-5: 0.2, 1e-4: 0.4}))["hpt"]
    assert rising.at_end
    assert math.isnan(rising.peak)


def test_page_says_where_the_top_lies_and_where_there_is_none():
    runs = _runs({1e-5: 0.29, 3e-5: 0.285, 1e-4: 0.255})
    runs += _runs({1e-5: 0.1, 3e-5: 0.2, 1e-4: 0.4}, method="srft") + _runs(
        {1e-5: 0.1, 3e-5: 0.3, 1e-4: 0.2}, method="luffy"
    )
    text = conduct.rates(study([run.record for run in runs])).split("\n\n")[0]
    assert re.search(r"has its top at: hpt 1\.\de-05\. At an end of the grid, with no such top: srft\.", text)
    assert "luffy" not in text.split("has its top")[1]


def test_change_that_rounds_to_nothing_has_no_minus():
    found = compare({"chain_sum": [math.log(change) for change in (0.95, 1.0, 1.046)]})
    assert found.mean < 0
    assert "(+0%, " in conduct._drift_sentence("kl-ctrl", found)

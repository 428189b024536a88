"""What is computed from times."""

import random

from gac.bench.timing import CpuTimer, ratio, ratio_interval


def test_the_interval_holds_the_median_as_often_as_it_says():
    """5% error asked for in 400 runs of 25 rounds with a skewed spread: misses above 7.5% have probability 1e-2."""
    draw = random.Random(0)
    missed = 0
    for _ in range(400):
        ours = [draw.lognormvariate(0.0, 0.3) for _ in range(25)]
        theirs = [mine * draw.choice((0.8, 1.25)) * draw.lognormvariate(0.0, 0.1) for mine in ours]
        low, high = ratio_interval(theirs, ours, error=0.05)
        assert low <= ratio(theirs, ours) <= high
        missed += not low <= 1.0 <= high
    assert missed / 400 <= 0.075
    assert missed > 0


def test_more_rounds_narrow_it_and_few_give_the_extremes():
    ratios = [1.0 + 0.01 * k for k in range(60)]
    low, high = ratio_interval(ratios, [1.0] * 60)
    assert 1.0 < low < ratio(ratios, [1.0] * 60) < high < 1.59
    assert ratio_interval([2.0, 1.0, 3.0], [1.0, 1.0, 1.0]) == (1.0, 3.0)


def test_slow_variants_do_not_keep_quick_ones_from_their_rounds():
    from time import sleep

    calls = {"quick": lambda k: None, "slow": lambda k: sleep(0.06), "slowest": lambda k: sleep(0.13)}
    samples = CpuTimer().measure(calls, 1, seconds=0.1)
    assert len(samples["quick"].time) >= 30
    assert len(samples["slow"].time) == 5
    assert len(samples["slowest"].time) == 1  # one call takes longer than the whole should

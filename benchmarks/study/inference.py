"""Paired comparisons of two arms over (task, seed): interval, test, correction for many comparisons, effect size.

Tasks are few and were chosen, seeds are draws. So tasks are strata: the estimand is the mean over these tasks, each
with the same weight, of the expected difference in the task, and all randomness is that of seeds within tasks. What an
interval says holds for these tasks; :func:`compare` also gives the interval that takes tasks as draws, which is wider.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence

import numpy as np

LEVEL = 0.95
EXACT_PAIRS = 14
"""Up to so many pairs the sign-flip test counts all 2^n flips."""

FLIPS = 19_999
"""Random flips beyond that; the smallest p is 1 / 20,000."""


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Arm minus reference, or the reverse: whatever the differences were.

    Attributes:
        mean: the mean over tasks of the mean difference within a task.
        low, high: 95% interval for these tasks; NaN where no task has two pairs.
        tasks_low, tasks_high: 95% interval that takes tasks as draws; NaN with a single task.
        p: two-sided, of the sign-flip test.
        effect: mean over the standard deviation of differences within a task, corrected for few pairs (Hedges).
        won: share of pairs with a positive difference, ties as half.
        pairs: number of pairs.
        by_task: mean difference in each task.
    """

    mean: float
    low: float
    high: float
    tasks_low: float
    tasks_high: float
    p: float
    effect: float
    won: float
    pairs: int
    by_task: Mapping[str, float]


def compare(differences: Mapping[str, Sequence[float]]) -> Comparison:
    """All that is said of one paired comparison.

    Args:
        differences: for each task those of its seeds, at least one.

    Raises:
        ValueError: no task, a task without pairs, or a difference that is not finite.
    """
    strata = {task: np.asarray(values, dtype=float) for task, values in differences.items()}
    if not strata or any(values.ndim != 1 or values.size == 0 for values in strata.values()):
        raise ValueError(f"differences: every task needs at least one pair, got {dict(differences)}")
    if not all(np.isfinite(values).all() for values in strata.values()):
        raise ValueError("differences must be finite")
    groups = list(strata.values())
    every = np.concatenate(groups)
    means = np.array([values.mean() for values in groups])
    mean, low, high = interval(groups)
    tasks_low = tasks_high = math.nan
    if len(means) > 1:
        reach = t_quantile(0.5 + LEVEL / 2, len(means) - 1) * means.std(ddof=1) / math.sqrt(len(means))
        tasks_low, tasks_high = mean - reach, mean + reach
    return Comparison(
        mean=mean,
        low=low,
        high=high,
        tasks_low=tasks_low,
        tasks_high=tasks_high,
        p=sign_flip(groups),
        effect=effect_size(groups),
        won=float((every > 0).mean() + (every == 0).mean() / 2),
        pairs=every.size,
        by_task={task: float(m) for task, m in zip(strata, means, strict=True)},
    )


def interval(groups: Sequence[np.ndarray], level: float = LEVEL) -> tuple[float, float, float]:
    """``(mean, low, high)`` of the stratified mean.

    The mean of T task means has the variance ``sum_t s_t^2 / n_t / T^2``, as seeds of different tasks are independent.
    Tasks differ in how noisy they are (a task near 100% hardly moves), so variances are not pooled: the degrees of
    freedom are Satterthwaite's, ``(sum v_t)^2 / sum v_t^2 / (n_t - 1)`` with ``v_t = s_t^2 / n_t``. They lie between
    the smallest ``n_t - 1`` and their sum. A spread between tasks is no part of it: tasks are not draws here. A task
    with a single pair tells nothing of its noise; then all tasks take the pooled variance. Low and high are NaN where
    no task has two pairs. Coverage: ``tests/benchmarks/study/test_inference.py``.
    """
    mean = float(np.mean([values.mean() for values in groups]))
    sizes = np.array([values.size for values in groups])
    freedom = sizes - 1
    if freedom.sum() == 0:
        return mean, math.nan, math.nan
    squares = np.array([((values - values.mean()) ** 2).sum() for values in groups])
    if (freedom == 0).any():
        each, dof = squares.sum() / freedom.sum() / sizes, float(freedom.sum())
    else:
        each = squares / freedom / sizes
        dof = float(each.sum() ** 2 / (each**2 / freedom).sum()) if each.any() else float(freedom.sum())
    reach = t_quantile(0.5 + level / 2, dof) * math.sqrt(each.sum()) / len(groups)
    return mean, mean - reach, mean + reach


def sign_flip(groups: Sequence[np.ndarray]) -> float:
    """Two-sided p of the paired sign-flip test, with the absolute stratified mean as its statistic.

    Were the two arms the same, every difference could as well have had the other sign; nothing else is assumed. Each
    pair is flipped on its own and keeps its task's weight. All flips are counted up to :data:`EXACT_PAIRS` pairs,
    beyond it :data:`FLIPS` random ones with a fixed seed, the observed one among them, so that p is never 0.
    """
    weighted = np.concatenate([values / values.size for values in groups]) / len(groups)
    observed = abs(weighted.sum())
    return float((np.abs(_signs(weighted.size) @ weighted) >= observed - 1e-12 * (1 + observed)).mean())


@functools.lru_cache(maxsize=4)
def _signs(n: int) -> np.ndarray:
    """``[flips, n]`` of -1 and 1; the first flip leaves everything as it was observed."""
    if n <= EXACT_PAIRS:
        return 1 - 2.0 * ((np.arange(2**n)[:, None] >> np.arange(n)) & 1)
    signs = 1 - 2.0 * np.random.default_rng(0).integers(0, 2, size=(FLIPS + 1, n))
    signs[0] = 1
    return signs


def effect_size(groups: Sequence[np.ndarray]) -> float:
    """Paired d_z with Hedges' correction: stratified mean over the pooled standard deviation within tasks.

    NaN where no task has two pairs or all differences within tasks are equal.
    """
    dof = sum(values.size - 1 for values in groups)
    squares = sum(float(((values - values.mean()) ** 2).sum()) for values in groups)
    if dof == 0 or squares <= 1e-24:
        return math.nan
    mean = float(np.mean([values.mean() for values in groups]))
    return mean / math.sqrt(squares / dof) * hedges(dof)


def hedges(dof: int) -> float:
    """Exact correction of a standardised mean difference for few degrees of freedom, about ``1 - 3 / (4 dof - 1)``.

    NaN below two: there the difference has no expectation to be corrected.
    """
    if dof < 2:
        return math.nan
    return math.exp(math.lgamma(dof / 2) - math.lgamma((dof - 1) / 2)) / math.sqrt(dof / 2)


def holm(p: Mapping[str, float]) -> dict[str, float]:
    """Holm's adjusted p values of one family: each is compared with the level as it stands."""
    adjusted, reached = {}, 0.0
    for index, name in enumerate(sorted(p, key=lambda name: (p[name], name))):
        reached = max(reached, min(1.0, (len(p) - index) * p[name]))
        adjusted[name] = reached
    return {name: adjusted[name] for name in p}


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Rank correlation, ties by their mean rank. NaN below three values or where one side is constant."""
    if len(a) != len(b):
        raise ValueError(f"a and b must have the same length, got {len(a)} and {len(b)}")
    x, y = (_ranks(np.asarray(values, dtype=float)) for values in (a, b))
    if len(a) < 3 or x.std() == 0 or y.std() == 0:
        return math.nan
    return float(np.corrcoef(x, y)[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    return ((values[:, None] > values).sum(1) + (values[:, None] >= values).sum(1) + 1) / 2


def t_cdf(t: float, dof: float) -> float:
    """Student's distribution function."""
    tail = 0.5 * _incomplete_beta(dof / (dof + t * t), dof / 2, 0.5)
    return 1 - tail if t > 0 else tail


@functools.lru_cache(maxsize=1024)
def t_quantile(p: float, dof: float) -> float:
    """Where Student's distribution function is `p`, to 1e-10 relative; `dof` may be fractional.

    Raises:
        ValueError: `p` outside (0, 1) or `dof` not positive.
    """
    if not 0 < p < 1 or not dof > 0:
        raise ValueError(f"t_quantile: p must be in (0, 1) and dof positive, got p={p}, dof={dof}")
    if p < 0.5:
        return -t_quantile(1 - p, dof)
    low, high = 0.0, 1.0
    while t_cdf(high, dof) < p:
        low, high = high, 2 * high
    # Newton's steps: right of 0 the distribution function is concave, so that from the left none goes too far
    log_peak = math.lgamma((dof + 1) / 2) - math.lgamma(dof / 2) - 0.5 * math.log(math.pi * dof)
    found = low
    for _ in range(100):
        density = math.exp(log_peak - (dof + 1) / 2 * math.log1p(found * found / dof))
        step = (p - t_cdf(found, dof)) / density
        found += step
        if abs(step) <= 1e-13 * (1 + found):
            break
    return found


def _incomplete_beta(x: float, a: float, b: float) -> float:
    """Regularised I_x(a, b), by its continued fraction (Lentz's method) on the side where it converges fast."""
    if x <= 0 or x >= 1:
        return 0.0 if x <= 0 else 1.0
    if x > (a + 1) / (a + b + 2):
        return 1 - _incomplete_beta(1 - x, b, a)
    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x))
    tiny = 1e-300
    c, d = 1.0, 1 / _away(1 - (a + b) * x / (a + 1), tiny)
    value = d
    for m in range(1, 500):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for term in (even, odd):
            d = 1 / _away(1 + term * d, tiny)
            c = _away(1 + term / c, tiny)
            value *= c * d
        if abs(c * d - 1) < 1e-15:
            break
    return front * value / a


def _away(value: float, tiny: float) -> float:
    return value if abs(value) > tiny else tiny

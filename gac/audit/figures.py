"""From the record of an audit to its figures: how good each estimator and each law was.

Laws are averaged over all steps of training, with the truth of the nearest point at which it was measured; estimators
over these points, which are the middles of equal stretches. Standard errors are jackknife errors over the truths'
replicates (`gac.audit.jackknife`): how well this run is known, not how much another seed would differ.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from gac.audit.jackknife import jackknife
from gac.audit.panel import COEFFICIENT_FORMS, ESTIMATORS, EXACT, GRADIENT_ESTIMATORS
from gac.audit.record import RUN, Record
from gac.audit.replicates import COLUMNS, TRUE_COLUMNS, mean_squared_error, oracle
from gac.audit.shadow import UNGUARDED
from gac.laws.controller import Controller
from gac.report.estimates import Estimate
from gac.statistics import Statistics

GRID = torch.linspace(0.0, 1.0, 1001, dtype=torch.float64)
"""The fixed mu that are searched."""

BEST_BY_SUMS, BEST_BY_RATIOS = "best fixed, by sums", "best fixed, by ratios"
"""Labels of the constants that were searched."""

IN_PARTS = (RUN, "gac without guardrails", BEST_BY_SUMS, BEST_BY_RATIOS)
"""Laws whose figures are also taken apart over training."""

TOLERANCE = 1.10
"""The mean squared error of the run's law, relative to the oracle's, is to stay within it."""


@dataclass(frozen=True)
class Quality:
    """One number of one estimator.

    Attributes:
        bias: mean over points of its mean less the truth, over the mean truth, at fixed parameters; unknown for
            coefficients, whose unit is another.
        deviation: standard deviation of a single step's estimate, root mean square over points, over the mean truth
            (over the estimator's own mean, for coefficients).
        drift: the mean over all training steps less the mean truth, over the mean truth.
        single, average: correlation over points of the truth with the estimate of the training step there, and with
            the average of a law ``gac`` before it.
    """

    bias: Estimate
    deviation: float
    drift: float
    single: float
    average: float


@dataclass(frozen=True)
class Mixing:
    """What a mu did.

    Attributes:
        mean_mu: over steps.
        distance: root mean square over steps of its distance from the oracle's.
        ratio: its mean squared errors, summed over steps, over the oracle's sum.
        corrected: `ratio` less its bias of order 1/J: the oracle is the best for the truth as measured, errors
            included, which makes everything else look worse than it is.
        mean_ratio: mean over steps of the ratio at each.
    """

    mean_mu: float
    distance: float
    ratio: Estimate
    corrected: float
    mean_ratio: Estimate


@dataclass(frozen=True)
class Figures:
    """All figures of an audit.

    Attributes:
        points, replicates, steps: how much was measured.
        truth: mean over points of the four numbers; ``oracle`` of its mu.
        reliability: share of the variance of the true numbers over points that is not error of measurement.
        estimators: for each estimator and number.
        implied: for each estimator the mixing by the closed form of its expectation at each point: what an average
            without end would give.
        reported: standard errors that ``exact`` gave with its numbers over their true standard deviations, over
            points (root mean squares).
        proxies: for each form of the coefficients and each population, the correlation with the disagreement.
        laws: for each law.
        parts: for some of them, `ratio` within parts of training; the keys are ``first-last`` step.
        replays: for law ``gac`` run again over the record, fed otherwise or with other options; see `replays`.
        best_fixed: the best constant mu by search, for both averages.
        difference: `ratio` of the run's law less that of the best constant, of the same truth.
    """

    points: int
    replicates: int
    steps: int
    truth: dict[str, Estimate]
    oracle: Estimate
    reliability: dict[str, float]
    estimators: dict[str, dict[str, Quality]]
    implied: dict[str, Mixing]
    reported: dict[str, float]
    proxies: dict[str, dict[str, float]]
    laws: dict[str, Mixing]
    parts: dict[str, dict[str, Estimate]]
    replays: dict[str, Mixing]
    best_fixed: dict[str, float]
    difference: Estimate
    mean_difference: Estimate
    left_out: dict[str, list[str]]

    @property
    def verdict(self) -> dict[str, dict[str, bool]]:
        """For both averages, whether the run's law stays within `TOLERANCE` and is not above the best constant."""
        law = self.laws[RUN]
        found = {"by sums": (law.ratio, self.difference), "by ratios": (law.mean_ratio, self.mean_difference)}
        return {
            name: {"within_tolerance": ratio.value <= TOLERANCE, "not_above_best_fixed": difference.value <= 0}
            for name, (ratio, difference) in found.items()
        }

    def as_json(self) -> dict[str, Any]:
        return {"verdict": self.verdict, **_plain(asdict(self))}


def figures(record: Record, gac_options: Mapping[str, Any] | None = None) -> Figures:
    """Figures of a record with at least one point.

    ``gac_options`` are those of the run's law, where that is ``gac``.
    """
    values, deleted = record.truths()
    counted = record.counted(values), record.counted(deleted)  # what laws are judged by
    alpha = record.alpha
    over_points = lambda function: _estimate(function, values, deleted)
    of_laws = lambda function: _estimate(function, *counted)
    mu = {label: torch.tensor(x, dtype=torch.float64) for label, x in record.mu.items()}
    nearest = _nearest(len(mu[RUN]), record.steps)
    at_steps = lambda v: v[..., nearest, :]
    best_sum, best_mean = (search(at_steps(counted[0]), alpha, by_ratios) for by_ratios in (False, True))
    constant = lambda x: torch.full_like(mu[RUN], x)
    mu |= {BEST_BY_SUMS: constant(best_sum), BEST_BY_RATIOS: constant(best_mean)}
    against = lambda ratio, best: of_laws(
        lambda v: ratio(mu[RUN], at_steps(v), alpha) - ratio(constant(best), at_steps(v), alpha)
    )
    measured = [name for name in ESTIMATORS if name in record.estimates]  # an older audit lacks newer ones
    return Figures(
        points=len(values),
        replicates=deleted.shape[1],
        steps=len(mu[RUN]),
        truth={name: over_points(lambda v, k=k: v[..., k].mean(-1)) for k, name in enumerate(TRUE_COLUMNS)},
        oracle=of_laws(lambda v: oracle(v, alpha).mean(-1)),
        reliability=dict(zip(TRUE_COLUMNS, _reliability(values, deleted).tolist(), strict=True)),
        estimators={name: _qualities(record, name, values, deleted) for name in measured},
        implied={name: _implied(record, name, *counted) for name in measured},
        reported=_reported(record),
        proxies={name: _populations(record, name, values) for name in COEFFICIENT_FORMS},
        laws={label: mixing(x, *counted, alpha, nearest) for label, x in mu.items()},
        parts={label: _in_parts(mu[label], *counted, alpha, nearest) for label in IN_PARTS if label in mu},
        replays={
            label: mixing(x, *counted, alpha, nearest)
            for label, x in replays(record, nearest, gac_options or {}).items()
        },
        best_fixed={"by sums": best_sum, "by ratios": best_mean},
        difference=against(ratio_of_sums, best_sum),
        mean_difference=against(mean_of_ratios, best_mean),
        left_out=record.left_out,
    )


def _nearest(steps: int, points: list[int]) -> Tensor:
    """``[S]``: for each step the index of the point nearest to it."""
    return (torch.arange(steps)[:, None] - torch.tensor(points)).abs().argmin(1)


# -- laws ---------------------------------------------------------------------------------------------------------


def ratio_of_sums(mu: Tensor | float, values: Tensor, alpha: float) -> Tensor:
    """Mean squared errors of ``mu`` (``[S]`` or a number) summed over steps, over those of the oracle.

    ``values``, the truth at each step, is ``[..., S, 4]``.
    """
    least = mean_squared_error(oracle(values, alpha), values, alpha)
    return mean_squared_error(mu, values, alpha).sum(-1) / least.sum(-1)


def mean_of_ratios(mu: Tensor | float, values: Tensor, alpha: float) -> Tensor:
    """Mean over steps of the mean squared error of ``mu`` over the oracle's; as :func:`ratio_of_sums`."""
    least = mean_squared_error(oracle(values, alpha), values, alpha)
    return (mean_squared_error(mu, values, alpha) / least).mean(-1)


def search(values: Tensor, alpha: float, by_ratios: bool) -> float:
    """The constant mu on `GRID` with the least :func:`ratio_of_sums`, or :func:`mean_of_ratios`."""
    ratio = mean_of_ratios if by_ratios else ratio_of_sums
    return float(GRID[ratio(GRID[:, None], values.expand(len(GRID), *values.shape), alpha).argmin()])


def mixing(mu: Tensor, values: Tensor, deleted: Tensor, alpha: float, nearest: Tensor) -> Mixing:
    """Figures of the mu ``[S]`` that were used in the steps; ``nearest`` is each step's point."""
    at_steps = lambda v: v[..., nearest, :]
    by_sums = jackknife(lambda v: ratio_of_sums(mu, at_steps(v), alpha), values, deleted)
    return Mixing(
        mean_mu=float(mu.mean()),
        distance=float((mu - oracle(at_steps(values), alpha)).square().mean().sqrt()),
        ratio=Estimate(float(by_sums.value), float(by_sums.se)),
        corrected=float(by_sums.corrected),
        mean_ratio=_estimate(lambda v: mean_of_ratios(mu, at_steps(v), alpha), values, deleted),
    )


def _in_parts(mu: Tensor, values: Tensor, deleted: Tensor, alpha: float, nearest: Tensor) -> dict[str, Estimate]:
    """`ratio_of_sums` within the first twentieth of training, the rest of its first quarter, and each other quarter."""
    steps = len(mu)
    bounds = sorted({0, steps // 20, steps // 4, steps // 2, 3 * steps // 4, steps})
    return {
        f"{begin}-{end - 1}": _estimate(
            lambda v, part=slice(begin, end): ratio_of_sums(mu[part], v[..., nearest[part], :], alpha), values, deleted
        )
        for begin, end in pairwise(bounds)
    }


def replays(record: Record, nearest: Tensor, options: Mapping[str, Any]) -> dict[str, Tensor]:
    """The mu ``[S]`` of law ``gac`` over the recorded steps: where its error comes from, and what its options do.

    Fed with the truth of the nearest point, what is left is the cost of the guardrails; fed with the estimates of drawn
    steps, those of `exact` at the nearest point, there is no drift between points either; the others are fed with what
    `exact` said in training.
    """
    options = {"momentum": record.momentum, **options}
    truths, _ = record.truths()
    draws = record.draws(EXACT)
    turn = torch.arange(len(nearest)) % draws.shape[1]
    trained = torch.tensor(record.estimates[EXACT], dtype=torch.float64)
    with_options = lambda **more: _replay(trained, {**options, **more})
    return {
        "fed with the truth": _replay(truths[nearest, :3], options),
        "the same, unguarded": _replay(truths[nearest, :3], {**options, **UNGUARDED}),
        "fed with drawn steps": _replay(draws[nearest, turn], options),
        **{f"half-life {x}": with_options(half_life=float(x)) for x in (2, 7, 20, 60)},
        **{f"cap {x}": with_options(cap=x) for x in (0.005, 0.02, 0.1, 1.0)},
        "unguarded": with_options(**UNGUARDED),
        "unguarded, half-life 20": with_options(**UNGUARDED, half_life=20.0),
    }


def _replay(series: Tensor, options: Mapping[str, Any]) -> Tensor:
    """The mu that law ``gac`` has before each step of a series ``[S, 3]`` of estimates."""
    controller = Controller("gac", **options)
    mu = []
    for row in series.tolist():
        mu.append(float(controller.mu))
        controller.update(Statistics(**dict(zip(COLUMNS, row, strict=True))))
    return torch.tensor(mu, dtype=torch.float64)


def _estimate(function: Callable[[Tensor], Tensor], values: Tensor, deleted: Tensor) -> Estimate:
    found = jackknife(function, values, deleted)
    return Estimate(float(found.value), float(found.se))


# -- estimators ---------------------------------------------------------------------------------------------------


def _qualities(record: Record, name: str, values: Tensor, deleted: Tensor) -> dict[str, Quality]:
    draws, same_unit = record.draws(name), name in GRADIENT_ESTIMATORS
    single, averages = record.single(name), _averages(record, name)
    series = torch.tensor(record.estimates[name], dtype=torch.float64)
    found = {}
    for k, column in enumerate(COLUMNS):
        mean = values[:, k].mean() if same_unit else draws[..., k].mean()
        found[column] = Quality(
            bias=_bias(values, deleted, draws, k) if same_unit else Estimate(),
            deviation=float(draws[..., k].var(1).mean().sqrt() / mean),
            drift=float(series[:, k].nanmean() / mean - 1) if same_unit else math.nan,
            single=correlation(single[:, k], values[:, k]),
            average=correlation(averages[:, k], values[:, k]) if averages is not None else math.nan,
        )
    return found


def _bias(values: Tensor, deleted: Tensor, draws: Tensor, k: int) -> Estimate:
    """Mean draw less truth, over the mean truth; both are left out together."""
    keep = draws.isfinite().all(1)[:, k]  # a first point may lie before the estimator can say anything
    if not keep.any():
        return Estimate()
    j = draws.shape[1]
    mean = draws[keep][..., k].mean(1)
    without = (j * mean[:, None] - draws[keep][..., k]) / (j - 1)
    pairs = torch.stack([mean, values[keep][:, k]], -1)
    deleted_pairs = torch.stack([without, deleted[keep][..., k]], -1)
    return _estimate(lambda v: v[..., 0].mean(-1) / v[..., 1].mean(-1) - 1, pairs, deleted_pairs)


def _implied(record: Record, name: str, values: Tensor, deleted: Tensor) -> Mixing:
    expected = record.draws(name).nanmean(1)
    mu = oracle(record.counted(pad(expected, (0, 1))), record.alpha).nan_to_num(
        0.5
    )  # no estimator knows of a cross term
    return mixing(mu, values, deleted, record.alpha, torch.arange(len(mu)))


def _averages(record: Record, name: str) -> Tensor | None:
    if any(name not in point.averages for point in record.points):
        return None
    return torch.stack([point.averages[name] for point in record.points]).to(torch.float64)


def _reported(record: Record) -> dict[str, float]:
    errors = torch.tensor([record.errors[step] for step in record.steps], dtype=torch.float64)
    actual = record.draws(EXACT).var(1)
    known = errors.isfinite().all(1)
    rms = (errors[known].square().mean(0) / actual[known].mean(0)).sqrt()
    return dict(zip(COLUMNS, rms.tolist(), strict=True))


def _reliability(values: Tensor, deleted: Tensor) -> Tensor:
    j = deleted.shape[1]
    errors = (j - 1) / j * (deleted - deleted.mean(1, keepdim=True)).square().sum(1)
    return 1 - errors.mean(0) / values.var(0)


# -- the coefficients against the disagreement --------------------------------------------------------------------


def _populations(record: Record, name: str, values: Tensor) -> dict[str, float]:
    """Correlation of the disagreement proxy with the disagreement, over several populations.

    The first four compare with the true disagreement at the points; the last two with what a step shows of it,
    ``|G_s - G_r|^2``, which is the true one plus both noises.
    """
    k = COLUMNS.index("delta_g2")
    true, draws = values[:, k], record.draws(name)[..., k]
    averages = _averages(record, name)
    observed = record.draws(EXACT).sum(-1)
    steps = torch.tensor(record.estimates[name], dtype=torch.float64)[:, k]
    distances = torch.tensor(record.estimates[EXACT], dtype=torch.float64).sum(-1)
    within = lambda x: (x - x.mean(1, keepdim=True)).flatten()
    return {
        "points, mean of the replicates": correlation(draws.mean(1), true),
        "points, one step": correlation(record.single(name)[:, k], true),
        "points, average of the law": correlation(averages[:, k], true) if averages is not None else math.nan,
        "changes between points": correlation(draws.mean(1).diff(), true.diff()),
        "training steps, observed distance": correlation(steps, distances),
        "one point's steps, observed distance": correlation(within(draws), within(observed)),
    }


def correlation(x: Tensor, y: Tensor) -> float:
    """Pearson's correlation over the pairs that are known; NaN for fewer than three, or a constant."""
    known = x.isfinite() & y.isfinite()
    if known.sum() < 3:
        return math.nan
    x, y = x[known] - x[known].mean(), y[known] - y[known].mean()
    norm = x.norm() * y.norm()
    return float(x @ y / norm) if norm > 0 else math.nan


def _plain(value: Any) -> Any:
    """Without what JSON does not know, to six digits."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items() if not (key == "bound" and not item)}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value

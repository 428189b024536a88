"""What law ``gac`` loses under the default budget: the error of its mix over committed audits.

    python -m benchmarks.audit_budget --json benchmarks/results/audit_budget.json

An audit's record has what the exact estimator said in every step, and the truth at every 16th. So the law can be run
again over the same steps without training, with those measured that a :class:`gac.cadence.BudgetCadence` chooses.
Steps cost what those of ``make train`` do (`results/budget_runs.json`): a measured one the share of the run in which
every step is measured, one that is not what the run under the budget leaves for it. Single steps vary by 20% (in GAC)
and 10% (the rest) around that, anew in each draw, as in ``tests/gac/test_cadence.py``.

``recorded`` runs over the estimates as they are, so that draws differ in the measured steps alone. ``redrawn`` takes
each step's estimates, the same for both cadences, from the normal distribution with the mean and standard deviation
that the audit found at the nearest point.

Differences are paired: both mu meet the same estimates and the same truth. ``truth_se`` is the error that comes with
the truth, to first order from its jackknife covariances; ``draws_sd`` is the spread over draws. ``cost`` multiplies
what steps cost; ``every_4th`` has the excess of that interval and its error, for each step that it may begin with.
Audits of before the law counted momentum are judged without it (`docs/audit.md`).
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gac.audit.replicates import COLUMNS, TRUE_COLUMNS, mean_squared_error
from gac.audit.run import compact_json
from gac.cadence import WARM_UP, Account, BudgetCadence, Costs
from gac.fused.law import update
from gac.fused.state import numbers_of
from gac.fused.statistics import UNMEASURED, attach_errors, has_moved
from gac.laws.base import Step, noise_left
from gac.laws.controller import Controller
from gac.laws.gac import GacLaw
from gac.options import OVERHEAD
from gac.runs.folder import read_json, write_text
from gac.statistics.uncertainty import StandardErrors

RESULTS = Path(__file__).parent / "results"
AUDITS = ("audit_intervals", "audit_default", "audit_seed1")
"""Default runs of 400 steps; the second and third are of before the law counted momentum."""

SPREAD, SPREAD_OUTSIDE = 0.2, 0.1
"""Of the costs of single steps: standard deviations of their logarithms, in GAC and outside."""


class Shares(NamedTuple):
    """What a step costs, over the time that it takes outside GAC."""

    measured: float
    unmeasured: float


class Record(NamedTuple):
    """What is needed of an audit.

    Attributes:
        estimates: ``[S, 3]``, of every step. means, deviations: ``[S, 3]``, of such estimates at the nearest point.
        truth: ``[T, 4]`` at the points. covariance: ``[T, 4, 4]``, of its errors.
        nearest: ``[S]``: each step's point. alpha: of the target. momentum: of the optimizer.
    """

    estimates: Tensor
    means: Tensor
    deviations: Tensor
    truth: Tensor
    covariance: Tensor
    nearest: Tensor
    alpha: float
    momentum: float


def read(record: Mapping[str, Any]) -> Record:
    """From ``record`` of an audit's JSON."""
    table = lambda rows: torch.tensor(rows, dtype=torch.float64)
    points, estimates = record["points"], table(record["estimates"]["exact"])
    steps = torch.tensor([point["step"] for point in points])
    nearest = (torch.arange(len(estimates))[:, None] - steps).abs().argmin(1)
    return Record(
        estimates,
        table([point["estimates_mean"]["exact"] for point in points])[nearest],
        table([point["estimates_sd"]["exact"] for point in points])[nearest],
        table([point["truth"] for point in points]),
        table([point["truth_covariance"] for point in points]),
        nearest,
        record["alpha"],
        record.get("momentum", 0.0),
    )


def shares_of(rows: Sequence[Mapping[str, Any]]) -> list[Shares]:
    """Of every seed of :mod:`benchmarks.budget_runs`; from the eleventh step on, as the budget counts."""
    found = []
    by = {(row["arm"], row["seed"]): row for row in rows}
    for seed in sorted({seed for _, seed in by}):
        every, budget = by["every step", seed], by["budget", seed]
        measured = every["share_from_11"]
        part = (budget["measured"] - 10) / (budget["steps"] - 10)
        found.append(Shares(measured, (budget["share_from_11"] - part * measured) / (1 - part)))
    return found


def replay(
    estimates: Sequence[Sequence[float]],
    momentum: float,
    shares: Shares | None = None,
    seed: int = 0,
    *,
    interval: int = 1,
    phase: int = 0,
) -> tuple[list[float], int]:
    """The mu of law ``gac`` before each step, and how many steps were measured.

    Args:
        estimates: ``[S, 3]``, what measuring would say in each step.
        momentum: of the optimizer.
        shares: what steps cost under the default budget; None: the interval decides.
        seed: of the costs of single steps.
        interval, phase: of fixed measurements after the first ten, the first of them so many steps earlier.
    """
    law = Controller("gac", momentum=momentum).law
    assert isinstance(law, GacLaw)
    state = numbers_of(law.state)
    errors = numbers_of(StandardErrors(torch.device("cpu"), torch.float64).state)
    cadence, account, draw = BudgetCadence(OVERHEAD), Account(), random.Random(seed)
    mus, measurements = [], 0
    for step, row in enumerate(estimates):
        mus.append(state["mu"])
        fixed = step < WARM_UP or (step - WARM_UP + 1 + phase) % interval == 0
        measured = fixed if shares is None else cadence.is_due(step)
        found = None
        if measured:
            measurements += 1
            found = {**UNMEASURED, **dict(zip(COLUMNS, row, strict=True)), "distance2": sum(row)}
            told = [*account.report(), float(account.moved)]
            cadence.measured(Costs(*told) if told[3] > 0 else None)
            last = errors["last"]
            errors, found = attach_errors(errors, found)
            account.moved = float(has_moved(last, found))
        else:
            cadence.passed()
        if shares is not None:
            rest = draw.lognormvariate(0, SPREAD_OUTSIDE)
            inside = shares.measured if measured else shares.unmeasured
            account.ended(inside * draw.lognormvariate(0, SPREAD), rest, measured=measured)
        state = update(law, state, found, Step(step))
    return mus, measurements


def coefficients(mu: Sequence[float], record: Record) -> Tensor:
    """``[T, 4]``: what the truth at each point is multiplied by in the mean squared error, summed over steps."""
    noise = noise_left(record.momentum)
    counted = torch.diag(torch.tensor([noise, noise, 1.0, 1.0], dtype=torch.float64))
    of_steps = mean_squared_error(torch.tensor(mu, dtype=torch.float64)[:, None], counted, record.alpha)
    return torch.zeros(len(record.truth), len(TRUE_COLUMNS), dtype=torch.float64).index_add(0, record.nearest, of_steps)


def excess(found: Tensor, every: Tensor, record: Record) -> tuple[float, float]:
    """The relative difference of two mean squared errors and its standard error from that of the truth.

    Args:
        found, every: ``[T, 4]`` by :func:`coefficients`; linear, so that means over draws are such coefficients, too.
    """
    base = (every * record.truth).sum()
    ratio = (found * record.truth).sum() / base
    slope = (found - ratio * every) / base
    variance = torch.einsum("ti,tij,tj->", slope, record.covariance, slope)
    return float(ratio) - 1, math.sqrt(float(variance))


def _series(record: Record, redrawn: bool, draws: int) -> Iterator[list[list[float]]]:
    generator = torch.Generator().manual_seed(0)
    for _ in range(draws):
        if redrawn:
            noise = torch.randn(record.means.shape, generator=generator, dtype=torch.float64)
            yield (record.means + record.deviations * noise).tolist()
        else:
            yield record.estimates.tolist()


def compare(record: Record, shares: Sequence[Shares], draws: int, *, redrawn: bool = False) -> dict[str, Any]:
    """The budget against every step measured, over ``draws`` draws of the costs."""
    of_budget, of_every, measured, single = [], [], [], []
    for seed, series in enumerate(_series(record, redrawn, draws)):
        if redrawn or not of_every:
            every = coefficients(replay(series, record.momentum)[0], record)
        mus, count = replay(series, record.momentum, shares[seed % len(shares)], seed)
        of_every.append(every)
        of_budget.append(coefficients(mus, record))
        measured.append(count)
        single.append(excess(of_budget[-1], every, record)[0])
    found, error = excess(torch.stack(of_budget).mean(0), torch.stack(of_every).mean(0), record)
    return {
        "draws": draws,
        "steps": len(record.estimates),
        "measured_mean": mean(measured),
        "measured_least": min(measured),
        "measured_most": max(measured),
        "excess": found,
        "truth_se": error,
        "draws_sd": stdev(single),
        "draws_se": stdev(single) / math.sqrt(draws),
        "draws_within_2_percent": sum(x <= 0.02 for x in single) / draws,
        "of_draws": single,
    }


def every_so_many(record: Record, interval: int) -> list[list[float]]:
    """The excess of a fixed interval and its error from that of the truth, at each phase, on the recorded estimates."""
    series = record.estimates.tolist()
    every = coefficients(replay(series, record.momentum)[0], record)
    mus = (replay(series, record.momentum, interval=interval, phase=phase)[0] for phase in range(interval))
    return [[*excess(coefficients(mu, record), every, record)] for mu in mus]


def main() -> None:
    """Compares over every audit and shows the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=50)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    shares = shares_of(read_json(RESULTS / "budget_runs.json")["rows"])
    rows = []
    for name in AUDITS:
        record = read(read_json(RESULTS / f"{name}.json")["record"])
        for cost in (1.0, 0.75, 0.5) if name == AUDITS[0] else (1.0,):
            cheaper = [Shares(cost * share.measured, cost * share.unmeasured) for share in shares]
            for redrawn in (False, True):
                about = {"audit": name, "momentum": record.momentum, "cost": cost}
                about["estimates"] = "redrawn" if redrawn else "recorded"
                rows.append(about | compare(record, cheaper, arguments.draws, redrawn=redrawn))
                print(json.dumps({**rows[-1], "of_draws": "..."}), flush=True)
    fixed = every_so_many(read(read_json(RESULTS / f"{AUDITS[0]}.json")["record"]), 4)
    if arguments.json is not None:
        told = {"budget": OVERHEAD, "shares": [share._asdict() for share in shares], "rows": rows}
        told["every_4th"] = fixed
        write_text(arguments.json, compact_json(told))


if __name__ == "__main__":
    main()

"""What a run is judged by, computed from its record alone."""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

LARGE_MU_EVENT = 0.005
"""A change of mu between successive steps above this counts as a large event."""

LATE = 3
"""Evaluations at the end of a run whose mean is its late accuracy."""

PROBLEMS = 512
"""Held-out problems of an evaluation."""

Points = tuple[tuple[int, float], ...]

_TEXT = ("key", "phase", "task", "domain", "role", "size", "method", "setting")
_NUMBERS = ("lr", "seed", "steps", "seconds_per_step", "gac_share")


@dataclasses.dataclass(frozen=True)
class Measures:
    """Of one run. Accuracies are shares in [0, 1].

    Attributes:
        warm: accuracy of the warm start, at step 0.
        final: accuracy after the last step.
        area: area under accuracy over steps by the trapezoid rule, over the number of steps: a mean accuracy.
        late: mean of the last :data:`LATE` evaluations; tuning selects by it, and it is the primary measure.
        gain: ``final - warm``.
        kl_area: area under KL(policy || warm start) in nats a token, over steps. None where any KL was not finite.
        large_mu_events: share of steps whose ``|mu_t - mu_{t-1}|`` is above :data:`LARGE_MU_EVENT`. None, like the two
            below, where the rule has no single mu in a step. A record's mu is what a step's update left, so all three
            are about steps 2 to the last; what the last update left is used by none.
        mu_variation: total variation of mu.
        mean_mu: over steps.
        collapsed: ``final < warm``, without allowing for the error of either accuracy.
        collapsed_beyond_chance: final below warm by more than 1.96 binomial standard errors of the difference between
            two accuracies over :data:`PROBLEMS` problems each. The problems are the same, so this asks for too much.
        seconds_per_step: wall time of a step.
        gac_share: share of it spent in GAC.
    """

    warm: float
    final: float
    area: float
    late: float
    gain: float
    kl_area: float | None
    large_mu_events: float | None
    mu_variation: float | None
    mean_mu: float | None
    collapsed: bool
    collapsed_beyond_chance: bool
    seconds_per_step: float
    gac_share: float


@dataclasses.dataclass(frozen=True)
class Run:
    """One checked record: its identity, its curves and its measures; `record` has the rest."""

    key: str
    phase: str
    task: str
    domain: str
    role: str
    size: str
    method: str
    setting: str
    lr: float
    seed: int
    steps: int
    accuracy: Points
    mu: tuple[float | None, ...]
    measures: Measures
    record: Mapping[str, Any] = dataclasses.field(repr=False, compare=False)


def read_run(record: Mapping[str, Any]) -> Run:
    """The run that a record tells of.

    Raises:
        ValueError: the record lacks something or holds what cannot be; the message names the run and the field.
    """
    key = record.get("key", "without a key")
    for name in _TEXT:
        if not isinstance(record.get(name), str):
            _refuse(key, name, "text", record.get(name))
    for name in _NUMBERS:
        if not _number(record.get(name)):
            _refuse(key, name, "a finite number", record.get(name))
    accuracy = _points(key, "accuracy", record.get("accuracy"), whole=record["steps"])
    if not all(0 <= value <= 1 for _, value in accuracy):
        _refuse(key, "accuracy", "shares in [0, 1]", record["accuracy"])
    if len(accuracy) <= LATE:
        _refuse(key, "accuracy", f"the warm start and at least {LATE} evaluations", record["accuracy"])
    kl = _points(key, "kl", record.get("kl"), whole=record["steps"], gaps=True)
    mu = record.get("mu") or [None] * record["steps"]
    if not isinstance(mu, Sequence) or isinstance(mu, str) or len(mu) != record["steps"]:
        _refuse(key, "mu", f"a list of {record['steps']} numbers or nulls, one a step", mu)
    if not all(value is None or _number(value) for value in mu):
        _refuse(key, "mu", "finite numbers or nulls", mu)
    return Run(
        **{name: record[name] for name in (*_TEXT, "lr", "seed", "steps")},
        accuracy=accuracy,
        mu=tuple(mu),
        measures=_measures(accuracy, kl, mu, record),
        record=record,
    )


def _measures(accuracy: Points, kl: Points, mu: Sequence[float | None], record: Mapping[str, Any]) -> Measures:
    warm, final = accuracy[0][1], accuracy[-1][1]
    error = math.sqrt((warm * (1 - warm) + final * (1 - final)) / PROBLEMS)
    used = mu[:-1]
    single = all(value is not None for value in used)
    changes = [abs(after - before) for before, after in itertools.pairwise(used)] if single else []
    return Measures(
        warm=warm,
        final=final,
        area=trapezoid(accuracy) / (accuracy[-1][0] - accuracy[0][0]),
        late=late_accuracy({"accuracy": accuracy}),
        gain=final - warm,
        kl_area=trapezoid(kl) if all(math.isfinite(value) for _, value in kl) else None,
        large_mu_events=sum(change > LARGE_MU_EVENT for change in changes) / len(changes) if changes else None,
        mu_variation=sum(changes) if single else None,
        mean_mu=sum(used) / len(used) if single and used else None,
        collapsed=final < warm,
        collapsed_beyond_chance=final < warm - 1.96 * error,
        seconds_per_step=record["seconds_per_step"],
        gac_share=record["gac_share"],
    )


def late_accuracy(record: Mapping[str, Any]) -> float:
    """Mean of the last :data:`LATE` evaluations of a record, checked no further."""
    last = record["accuracy"][-LATE:]
    return sum(value for _, value in last) / len(last)


def trapezoid(points: Sequence[tuple[float, float]]) -> float:
    """Area under a curve of ``(x, y)`` in the order of x."""
    return sum((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in itertools.pairwise(points))


def _points(key: str, name: str, value: Any, whole: float, gaps: bool = False) -> Points:
    """The curve ``[[step, number], ...]`` from step 0 to the last; nulls become NaN where `gaps` may be."""
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) < 2:
        _refuse(key, name, "a list of at least two [step, number]", value)
    if not all(isinstance(p, Sequence) and len(p) == 2 and _number(p[0]) for p in value):
        _refuse(key, name, "a list of [step, number]", value)
    if not all(_number(p[1]) or (gaps and (p[1] is None or isinstance(p[1], float))) for p in value):
        _refuse(key, name, "finite numbers", value)
    steps = [p[0] for p in value]
    if steps[0] != 0 or steps[-1] != whole or any(b <= a for a, b in itertools.pairwise(steps)):
        _refuse(key, name, f"rising steps from 0 to {whole}", steps)
    return tuple((int(step), math.nan if number is None else float(number)) for step, number in value)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _refuse(key: str, name: str, wanted: str, got: Any) -> None:
    text = repr(got)
    text = text if len(text) <= 80 else text[:77] + "..."
    raise ValueError(
        f"record {key}: {name} must be {wanted}, got {text}; run it again: python -m benchmarks.study row KEY"
    )

"""What an audit writes down while training runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gac.audit.panel import ESTIMATORS, EXACT
from gac.audit.replicates import COLUMNS, TRUE_COLUMNS, Truth
from gac.laws.base import noise_left
from gac.statistics import Statistics

RUN = "the run's law"
"""Label of the law in charge."""


@dataclass
class Point:
    """A place in training where the truth was measured, before the step of number ``step`` (from 0).

    Attributes:
        truth: at the parameters that this step starts from.
        draws: for each estimator ``[J, 3]``, its estimates from each of the truth's steps alone.
        averages: for each estimator that feeds a law ``gac``, ``[3]``: its averages over the training steps before.
    """

    step: int
    truth: Truth
    draws: dict[str, Tensor]
    averages: dict[str, Tensor]


@dataclass
class Record:
    """A run under audit.

    Attributes:
        alpha: weight of the SFT gradient in the target.
        points: where the truth was measured.
        mu: for each law the mu of each step, as chosen before it.
        estimates: for each estimator and step its three numbers (`COLUMNS`).
        errors: for each step the standard errors that ``exact`` gave with its numbers, of the first two.
        left_out: laws that lacked a signal.
        momentum: of the optimizer, as the law in charge counts it: errors are those of its average of gradients.
    """

    alpha: float
    points: list[Point] = field(default_factory=list)
    mu: dict[str, list[float]] = field(default_factory=dict)
    estimates: dict[str, list[list[float]]] = field(default_factory=lambda: {name: [] for name in ESTIMATORS})
    errors: list[list[float]] = field(default_factory=list)
    left_out: dict[str, list[str]] = field(default_factory=dict)
    momentum: float = 0.0

    def before_step(self, mu: dict[str, float]) -> None:
        """Every law's mu for the step to come."""
        for label, value in mu.items():
            self.mu.setdefault(label, []).append(value)

    def after_step(self, statistics: dict[str, Statistics]) -> None:
        """What the estimators said of the step."""
        for name, found in statistics.items():
            self.estimates[name].append(three(found).tolist())
        self.errors.append([float(getattr(statistics[EXACT], f"{name}_se")) for name in COLUMNS])

    @classmethod
    def restored(cls, saved: dict[str, Any]) -> Record:
        """The record of which ``dataclasses.asdict`` made ``saved``."""
        points = [Point(**{**point, "truth": Truth(**point["truth"])}) for point in saved["points"]]
        return cls(**{**saved, "points": points})

    # -- as tensors -----------------------------------------------------------------------------------------------

    @property
    def steps(self) -> list[int]:
        """Steps at which the truth was measured."""
        return [point.step for point in self.points]

    def truths(self) -> tuple[Tensor, Tensor]:
        """``[T, 4]`` and, with each replicate left out, ``[T, J, 4]``, in the order of `TRUE_COLUMNS`."""
        return (
            torch.stack([point.truth.values for point in self.points]),
            torch.stack([point.truth.deleted for point in self.points]),
        )

    def counted(self, values: Tensor) -> Tensor:
        """``[..., 4]``: truths with the noise that is left in the optimizer's average of gradients."""
        noise = noise_left(self.momentum)
        return values * torch.tensor([noise, noise, 1.0, 1.0], dtype=values.dtype)

    def draws(self, name: str) -> Tensor:
        """``[T, J, 3]``: an estimator's estimates from single steps at the points."""
        return torch.stack([point.draws[name] for point in self.points])

    def mu_at_points(self, label: str) -> Tensor:
        """``[T]``: the mu that a law had chosen for the steps at the points."""
        return torch.tensor([self.mu[label][step] for step in self.steps], dtype=torch.float64)

    def single(self, name: str) -> Tensor:
        """``[T, 3]``: an estimator's estimates from the training steps at the points."""
        return torch.tensor([self.estimates[name][step] for step in self.steps], dtype=torch.float64)

    def as_json(self) -> dict[str, Any]:
        """Everything but the single draws, of which means and standard deviations stay; five digits."""
        points = [
            {
                "step": point.step,
                "truth": _round(point.truth.values.tolist()),
                "truth_covariance": _round(point.truth.covariance.tolist()),
                "estimates_mean": {name: _round(x.mean(0).tolist()) for name, x in point.draws.items()},
                "estimates_sd": {name: _round(x.std(0).tolist()) for name, x in point.draws.items()},
                "averages": {name: _round(x.tolist()) for name, x in point.averages.items()},
            }
            for point in self.points
        ]
        return {
            "columns": list(TRUE_COLUMNS),
            "alpha": self.alpha,
            "momentum": self.momentum,
            "points": points,
            "mu": {label: _round(values) for label, values in self.mu.items()},
            "estimates": {name: _round(values) for name, values in self.estimates.items()},
            "exact_standard_errors": _round(self.errors),
            "left_out": self.left_out,
        }


def three(statistics: Statistics) -> Tensor:
    """``[3]`` float64 on the CPU: the three numbers of an estimate, in the order of `COLUMNS`."""
    return torch.stack([getattr(statistics, name) for name in COLUMNS]).to("cpu", torch.float64)


def _round(value: Any) -> Any:
    if isinstance(value, Sequence):
        return [_round(item) for item in value]
    return float(f"{value:.5g}")

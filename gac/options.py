"""The options of :func:`gac.patch`, checked in one place before anything is touched."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from gac.laws.base import Law, number
from gac.sequences.options import SequenceOptions
from gac.statistics.coefficient import CoefficientOptions

ESTIMATORS = ("auto", "sketch", "exact", "coefficient", "sequence")
"""How statistics are obtained."""

OF_TRAINERS = ("auto", "sketch", "exact", "coefficient")
"""Those that measure contributions of whole backward passes, or none."""

METRICS = ("gradient", "optimizer")
"""The spaces in which gradients are measured: as they are, or divided by Adam's ``sqrt(v) + eps``."""

OVERHEAD = 0.01
"""Share of a step's time that measuring may take, where nothing else is asked for."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a mixer was asked for; :func:`gac.patch` says what each means and has the defaults.

    Raises:
        TypeError, ValueError: an option that is wrong by itself or beside another; the message names it.
    """

    law: str
    law_options: Mapping[str, Any]
    estimator: str
    interval: int | None
    overhead: float | None
    optimizer: torch.optim.Optimizer | None
    process_group: dist.ProcessGroup | None
    metric: str
    report_interval: int | None
    coefficient: CoefficientOptions
    scaler: torch.amp.GradScaler | None
    hooks: bool
    carries_out_rules: bool
    name: str | None = None
    sequences: SequenceOptions = field(default_factory=SequenceOptions)

    def __post_init__(self) -> None:
        _require_name("estimator", self.estimator, ESTIMATORS)
        _require_name("metric", self.metric, METRICS)
        if self.interval is not None:
            _require_steps("interval", self.interval)
            if self.overhead is not None:
                raise ValueError(
                    f"interval={self.interval} and overhead={self.overhead}: measure every so many steps, or as many "
                    "as a share of the time pays for; leave one of them out"
                )
        if self.overhead is not None:
            number("overhead", self.overhead, 1e-6, 1.0)
        if self.report_interval is not None:
            _require_steps("report_interval", self.report_interval)
        if self.name is not None and (not isinstance(self.name, str) or not self.name):
            raise ValueError(f"name must be a text that is not empty, or None, got {self.name!r}")
        if self.optimizer is not None and not hasattr(self.optimizer, "register_step_post_hook"):
            raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(self.optimizer).__name__}")
        if self.in_optimizer_space and self.estimator == "coefficient":
            raise ValueError('estimator="coefficient" reads no gradients: metric="optimizer" does not apply to it')
        if self.estimator == "sequence" and self.in_optimizer_space:
            raise ValueError('metric="optimizer" reads gradients of parameters, estimator="sequence" those of layers')
        if self.estimator == "sequence" and not self.hooks:
            raise ValueError('estimator="sequence" has hooks on layers: hooks=False does not apply to it')
        if self.scaler is not None and not hasattr(self.scaler, "scale"):
            raise TypeError(f"scaler must be a torch.amp.GradScaler, got {type(self.scaler).__name__}")

    @property
    def budget(self) -> float | None:
        """Share of the time that measuring may take; None where steps are measured by number."""
        return (OVERHEAD if self.overhead is None else self.overhead) if self.interval is None else None

    @property
    def in_optimizer_space(self) -> bool:
        """Whether gradients are measured as the optimizer scales them."""
        return self.metric == "optimizer"

    def check_law(self, law: Law) -> None:
        """Raises ValueError for a law that a trainer has to carry out where none does."""
        if law.needs_trainer and not self.carries_out_rules:
            raise ValueError(
                f"law {law.name!r} acts per prompt or token: it needs gac.trainers.HybridGRPOTrainer (or gac train), "
                "which sees prompts, rollouts and demonstrations. With gac.patch alone, choose a law that sets mu"
            )


def _require_name(option: str, value: object, known: tuple[str, ...]) -> None:
    if value not in known:
        hint = ""
        if option == "metric" and hasattr(value, "param_groups"):
            hint = "; name the space here and the optimizer by optimizer= or mixer.follow(optimizer)"
            value = type(value).__name__
        raise ValueError(f"unknown {option} {value!r}; known: {', '.join(known)}{hint}")


def _require_steps(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a whole number of steps from 1 on, got {value!r}")

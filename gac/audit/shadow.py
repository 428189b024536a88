"""Laws that run beside the one in charge: on the same steps, each with the estimator it is fed from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from gac.audit.panel import COEFFICIENT, COEFFICIENT_RAW, EXACT, INCOMING, SEQUENCE, SKETCH, TEMPORAL
from gac.cadence import WARM_UP
from gac.laws.controller import Controller
from gac.laws.gac import GacLaw
from gac.statistics import Statistics


@dataclass(frozen=True)
class Contender:
    """A law with options, the estimator that feeds it, and the steps that this one measures.

    Attributes:
        interval: steps from one measurement to the next after the first ten, which are always measured, as a budget
            has it (:class:`gac.cadence.BudgetCadence`). In between the law goes on as it does without statistics.
    """

    label: str
    law: str
    estimator: str = EXACT
    options: Mapping[str, Any] = field(default_factory=dict)
    interval: int = 1

    def measures(self, step: int) -> bool:
        """Whether the step of this number, from 0, is measured."""
        return step < WARM_UP or (step - WARM_UP + 1) % self.interval == 0


UNGUARDED = {"cap": 1.0, "mu_min": 0.0, "mu_max": 1.0}
"""Options of ``gac`` that leave its averages and closed form alone."""

INTERVALS = (4, 16, 64)
"""Between measurements: what a budget of 1% comes to for models of different sizes."""


def default_contenders(gac_options: Mapping[str, Any]) -> list[Contender]:
    """The laws that an audit compares.

    Args:
        gac_options: of every contender that is law ``gac``: those of the run, if that is its law.
    """
    gac = lambda label, estimator, **more: Contender(label, "gac", estimator, {**gac_options, **more})
    return [
        gac("gac on exact", EXACT),
        gac("gac on sketch", SKETCH),
        gac("gac on sketch, incoming", INCOMING),
        gac("gac on temporal", TEMPORAL),
        gac("gac on sequence", SEQUENCE),
        gac("gac on coefficient", COEFFICIENT),
        gac("gac on coefficient, raw", COEFFICIENT_RAW),
        gac("gac without guardrails", EXACT, **UNGUARDED),
        *(Contender(f"gac, every {n}th step", "gac", EXACT, gac_options, interval=n) for n in INTERVALS),
        Contender("paper on coefficient, raw", "paper", COEFFICIENT_RAW),
        Contender("paper on exact", "paper", EXACT),
        Contender("chord-mu", "chord-mu"),
        Contender("sequential", "sequential"),
        Contender("kl-ctrl", "kl-ctrl"),
        Contender("entropy-ctrl", "entropy-ctrl"),
        *(Contender(f"fixed {mu}", "fixed", EXACT, {"mu": mu}) for mu in (0.1, 0.5, 0.9)),
    ]


class Shadows:
    """Controllers of the contenders, moved along with training and acting on nothing.

    A contender that needs a signal the run does not have (``kl`` without a reference model) is left out.

    Args:
        contenders: see :func:`default_contenders`.
        signals: names of the signals that :meth:`update` is going to bring.

    Attributes:
        left_out: labels of the contenders without their signals, and which these are.
    """

    def __init__(self, contenders: list[Contender], signals: frozenset[str]) -> None:
        self._running: list[tuple[Contender, Controller]] = []
        self._steps = 0
        self.left_out: dict[str, list[str]] = {}
        for contender in contenders:
            controller = Controller(contender.law, **contender.options)
            missing = sorted(set(controller.law.needs) - signals)
            if missing:
                self.left_out[contender.label] = missing
            else:
                self._running.append((contender, controller))

    def follow(self, optimizer: Optimizer) -> None:
        """Tells every contender which optimizer takes the steps, as the law in charge is told."""
        for _, controller in self._running:
            controller.law.follow(optimizer)

    def mu(self) -> dict[str, float]:
        """Each contender's mu for the step to come."""
        return {c.label: float(x.mu) for c, x in self._running}

    def averages(self) -> dict[str, Tensor]:
        """``[3]`` for each estimator that feeds a law ``gac`` in every step: its averages so far."""
        gac = ((c, x.law) for c, x in self._running if isinstance(x.law, GacLaw) and c.interval == 1)
        return {contender.estimator: law.smoothed().cpu() for contender, law in gac}

    def update(self, statistics: Mapping[str, Statistics], signals: Mapping[str, float]) -> None:
        """Ends a step: every contender takes in what its estimator says."""
        for contender, controller in self._running:
            found = statistics[contender.estimator] if contender.measures(self._steps) else None
            controller.update(found, **{name: signals[name] for name in controller.law.needs})
        self._steps += 1

"""The end of a step: from its sums to the weights of the next one, in one piece where that is served."""

from __future__ import annotations

from collections.abc import Mapping
from time import perf_counter
from typing import Any

import torch

from gac.fused import law as fused_law
from gac.fused.state import HostState, numbers_of
from gac.fused.statistics import UNMEASURED, cosine_of
from gac.laws.base import Law
from gac.laws.controller import Controller
from gac.laws.gac import GacLaw
from gac.measurement import Measurement
from gac.metrics import StepMetrics
from gac.statistics.step import Statistics
from gac.weights import HostWeights, Weights


class Ending:
    """Ends the steps of a mixer.

    Args:
        measurement: of the steps; another one takes its place where other parameters are watched.
        controller: of the law.
        metrics: where a step's numbers go.
    """

    def __init__(self, measurement: Measurement, controller: Controller, metrics: StepMetrics) -> None:
        self.measurement, self.metrics = measurement, metrics
        self._controller = controller
        self._found: Statistics | Mapping[str, float] | None = None

    @property
    def statistics(self) -> Statistics | None:
        """Of the last step; None where it measured none."""
        if isinstance(self._found, Mapping):
            self._found = Statistics.of(self._found)
        return self._found

    def end(self, weights: Weights, told: Mapping[str, Any], since: float) -> Weights:
        """The weights of the next step.

        Args:
            weights: of the step that ends.
            told: what :meth:`gac.Mixer.step` was told of it.
            since: when the host began to end it (:func:`time.perf_counter`).
        """
        measurement, law = self.measurement, self._controller.law
        seconds = lambda: measurement.observer.seconds + perf_counter() - since
        number = self._controller.steps
        if isinstance(weights, HostWeights) and not measurement.from_tokens:
            statistics = measurement.finish_on_host(weights.present_on_host, number)
            self._found = statistics
            step = self._controller.told(**told)
            state = fused_law.update(law, numbers_of(law.state), statistics, step)  # type: ignore[arg-type]
            law.state = HostState(state)  # type: ignore[assignment]
            self._controller.steps = step.number + 1
            new = HostWeights(state["mu"])
            numbers = UNMEASURED if statistics is None else statistics
            row = [new.number, state["raw"], state["mu_se"], state["prior"], measurement.skipped_on_host]
            row += [*numbers.values(), cosine_of(numbers)]
            self.metrics.publish_numbers(step.number, row, seconds=seconds(), estimator=measurement.used)
            return new
        found = measurement.finish(weights.present, number)
        self._found = found
        self._controller.update(found, **told)
        after = present_weights(self._controller, measurement.device)
        self.metrics.publish(
            self._controller.steps - 1,
            mu=after.mu,
            law=law.state,
            skipped=measurement.skipped,
            statistics=found,
            seconds=seconds(),
            estimator=measurement.used,
        )
        return after


def present_weights(controller: Controller, device: torch.device) -> Weights:
    """The weights of the step to come: those that the law begins with, or goes on with."""
    if why_in_torch(controller.law, device) is None:
        return HostWeights(float(controller.mu))
    return Weights(controller.mu)


def why_in_torch(law: Law, device: torch.device) -> str | None:
    """Why a step is ended in torch rather than in one piece; None where it is not."""
    if type(law) is not GacLaw:
        return f"law {law.name!r} is written in torch alone"
    if device.type != "cpu":
        return f"the numbers are on {device.type}"
    return None

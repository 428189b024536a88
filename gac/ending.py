"""The end of a step: from its sums to the weights of the next one, in one piece where that is served."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from time import perf_counter
from typing import Any

import torch

from gac.cadence import BudgetCadence, Cadence, FixedCadence
from gac.fused import law as fused_law
from gac.fused.state import HostState, Numbers, numbers_of
from gac.fused.statistics import UNMEASURED, cosine_of
from gac.laws.base import Law
from gac.laws.controller import Controller
from gac.laws.gac import GacLaw
from gac.measurement import Measurement
from gac.metrics import StepMetrics
from gac.options import Options
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
        self.measurement, self._metrics = measurement, metrics
        self._controller = controller
        self._found: Statistics | Mapping[str, float] | None = None
        self._left = 0  # steps to come that are not measured
        self._quiet = 0  # steps that have passed without being ended
        self._state: HostState | None = None  # the law's, where it can pass steps by itself ...
        self._mu, self._target = 0.5, 0.5  # ... and the numbers that it moves between
        self._told_by: tuple[float, float] = (0.0, 0.0)  # momentum and alpha at the last estimate

    @property
    def statistics(self) -> Statistics | None:
        """Of the last step; None where it measured none."""
        if isinstance(self._found, Mapping):
            self._found = Statistics.of(self._found)
        return self._found

    def metrics(self, *, wait: bool) -> dict[str, float | str]:
        """Those of :class:`gac.metrics.StepMetrics`."""
        if self._quiet:  # host time of the steps that were passed by, in equal parts
            seconds = self.measurement.observer.now.seconds / self._quiet
            self._publish(UNMEASURED, self._numbers_of_law(), self._controller.steps - 1, seconds)
        return self._metrics.latest(wait=wait)

    # -- a step -------------------------------------------------------------------------------------------------------

    def plan(self) -> None:
        """Prepares the step to come, whose number the controller knows."""
        begin = perf_counter()
        self.measurement.plan(self._controller.steps)
        self._left = self.measurement.spending.cadence.until_due(self._controller.steps)
        self.measurement.observer.now.seconds = perf_counter() - begin

    def pass_by(self, weights: Weights, since: float) -> Weights | None:
        """The weights of the next step after one that measured nothing and told the law nothing; None: :meth:`end` it.

        Law ``gac`` then only goes on towards its estimate, for which no statistics, state or metrics have to be made.
        """
        law: Any = self._controller.law
        state = self._state
        if self._left <= 1 or state is None or law.state is not state or state.was_read:
            return None
        if self._told_by != (law.momentum, law.alpha):
            return None
        self._left -= 1
        self._quiet += 1
        self._controller.steps += 1
        self._found = self.measurement.coefficient = None
        if self.measurement.worth is not None:
            self.measurement.worth.latest = None
        state.passed += 1
        if self._mu != self._target:
            moved = fused_law.towards(law, self._mu, self._target)
            if moved != self._mu:
                with torch.inference_mode(False):  # backward passes to come save them
                    self._mu, weights = moved, HostWeights(moved)
        measurement, now = self.measurement, perf_counter()
        inside = measurement.observer.now
        inside.seconds += now - since
        measurement.spending.clock.tick(now, inside.seconds)
        return weights

    def ended(self, gac: float) -> None:
        """A step has ended, and those before it that were passed by; :meth:`plan` comes next.

        Args:
            gac: seconds in GAC.
        """
        spending = self.measurement.spending
        spending.clock.tick(perf_counter(), gac)
        spending.ended(gac, measured=self.measurement.is_measured)
        self._quiet = 0

    def catch_up(self) -> None:
        """Ends what was passed by, for a state that can be kept."""
        if self._quiet:
            observer = self.measurement.observer
            self.measurement.spending.ended(observer.now.seconds, measured=False)
            observer.now.seconds, self._quiet = 0.0, 0

    def end(self, weights: Weights, told: Mapping[str, Any], since: float) -> Weights:
        """The weights of the next step.

        Args:
            weights: of the step that ends.
            told: what :meth:`gac.Mixer.step` was told of it.
            since: when the host began to end it (:func:`time.perf_counter`).
        """
        measurement, law = self.measurement, self._controller.law
        number = self._controller.steps
        if isinstance(weights, HostWeights):
            assert isinstance(law, GacLaw)
            if measurement.from_tokens:
                statistics = _numbers(measurement.finish(weights.present, number))
            else:
                statistics = measurement.finish_on_host(weights.present_on_host, number)
            self._found = statistics
            step = self._controller.told(**told)
            state = fused_law.update(law, numbers_of(law.state), statistics, step)
            self._controller.steps = step.number + 1
            self._keep(law, state, alone=all(value is None for value in told.values()))
            seconds = measurement.observer.now.seconds + perf_counter() - since
            self._publish(UNMEASURED if statistics is None else statistics, state, step.number, seconds)
            return HostWeights(state["mu"])
        found = measurement.finish(weights.present, number)
        self._found, self._state = found, None
        self._controller.update(
            found, worth=measurement.worth.latest if measurement.worth is not None else None, **told
        )
        after = present_weights(self._controller, measurement.device)
        self._metrics.publish(
            self._controller.steps - 1,
            mu=after.mu,
            law=law.state,
            skipped=measurement.skipped,
            statistics=found,
            seconds=measurement.observer.now.seconds + perf_counter() - since,
            estimator=measurement.used,
            overhead=measurement.spending.account.share,
        )
        return after

    def _keep(self, law: GacLaw, state: Numbers, *, alone: bool) -> None:
        """Keeps the law's state; ``alone``: the law was told nothing beside statistics."""
        kept = HostState(state, functools.partial(fused_law.coast, law))
        law.state = kept  # type: ignore[assignment]
        idle = alone and law.prior is None and not law.follows_kl
        self._state = kept if idle else None
        self._mu = state["mu"]
        self._target = fused_law.target_of(state)
        self._told_by = law.momentum, law.alpha

    def _numbers_of_law(self) -> Numbers:
        return numbers_of(self._controller.law.state)

    def _publish(self, statistics: Mapping[str, float], state: Numbers, number: int, seconds: float) -> None:
        measurement = self.measurement
        row = [HostWeights.rounded(state["mu"]), state["raw"], state["mu_se"], state["prior"]]
        row += [measurement.skipped_on_host, *statistics.values(), cosine_of(statistics)]
        self._metrics.publish_numbers(
            number, row, seconds=seconds, estimator=measurement.used, overhead=measurement.spending.account.share
        )


def _numbers(statistics: Statistics | None) -> dict[str, float] | None:
    if statistics is None:
        return None
    return dict(zip(Statistics.names(), statistics.stacked().tolist(), strict=True))


def cadence_of(options: Options, ranks: int) -> Cadence:
    """Which steps are measured."""
    if options.budget is None:
        assert options.interval is not None
        return FixedCadence(options.interval)
    if options.estimator == "coefficient" and ranks > 1:  # every rank waits for the others' rows in any case
        return FixedCadence(1)
    return BudgetCadence(options.budget)


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

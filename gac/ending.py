"""The end of a step: from its sums to the weights of the next one, in one piece where that is served."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from time import perf_counter
from typing import Any

import torch

from gac.cadence import BudgetCadence, Cadence, FixedCadence
from gac.fused import device as fused_device
from gac.fused import law as fused_law
from gac.fused.host import HostProgram, HostVector
from gac.fused.state import HostState, Numbers, numbers_of
from gac.fused.statistics import UNMEASURED, cosine_of
from gac.fused.vector import StepVector, VectorState
from gac.laws.base import Law, Step
from gac.laws.controller import Controller
from gac.laws.gac import GacLaw
from gac.measurement import Measurement
from gac.metrics import StepMetrics
from gac.modes import Lasting
from gac.options import Options
from gac.quiet import Quiet
from gac.statistics.step import Statistics
from gac.weights import DeviceWeights, HostWeights, Slots, Weights
from gac_kernels.cpu import ending

UNTOLD: Mapping[str, Any] = dict.fromkeys(("step", "prior", "alpha", "kl", "entropy"))
"""What :meth:`gac.Mixer.step` was told where it was told nothing."""


class Ending:
    """Ends the steps of a mixer.

    Args:
        measurement: of the steps; another one takes its place where other parameters are watched.
        controller: of the law.
        metrics: where a step's numbers go.
        quiet: the steps that pass without being ended.
    """

    def __init__(self, measurement: Measurement, controller: Controller, metrics: StepMetrics, quiet: Quiet) -> None:
        self.measurement, self._metrics = measurement, metrics
        self._controller = controller
        self._found: Statistics | StepVector | HostVector | Mapping[str, float] | None = None
        self._left = 0  # steps to come that may pass by
        self._quiet = quiet
        quiet.begins = self._begin_quietly
        self._program: fused_device.DeviceProgram | None = None  # made with the first step that it ends
        self._on_host: HostProgram | None = None  # likewise
        self._slots = Slots()
        self._vector: StepVector | None = None  # of the last step that it has ended
        self._told: StepVector | None = None  # the last one that the metrics have

    @property
    def statistics(self) -> Statistics | None:
        """Of the last step; None where it measured none."""
        if isinstance(self._found, Mapping):
            self._found = Statistics.of(self._found)
        if isinstance(self._found, (StepVector, HostVector)):
            self._found = self._found.statistics()
        return self._found

    @property
    def why_in_torch(self) -> str | None:
        """Why its steps end in torch rather than in one piece; None where they do not."""
        return why_in_torch(self._controller.law, self.measurement.device)

    def metrics(self, *, wait: bool, measured: bool = False) -> dict[str, float | str]:
        """Those of :class:`gac.metrics.StepMetrics`."""
        if self._quiet.passed:  # host time of the steps that were passed by, in equal parts
            seconds = self.measurement.observer.now.seconds / self._quiet.passed
            if self._vector is None:
                self._publish(UNMEASURED, self._numbers_of_law(), self._controller.steps - 1, seconds)
            elif self._vector is not self._told:
                self._publish_vector(self._vector, self._controller.steps - 1, seconds)
        return self._metrics.latest(wait=wait, measured=measured)

    # -- a step -------------------------------------------------------------------------------------------------------

    def plan(self) -> None:
        """Prepares the step to come, whose number the controller knows."""
        begin = perf_counter()
        measurement = self.measurement
        measurement.plan(self._controller.steps)
        left = max(measurement.spending.cadence.until_due(self._controller.steps) - 1, 0)
        self._left = left
        self._quiet.plan(left, measurement.observer, measurement.spending.clock)
        measurement.observer.now.seconds = perf_counter() - begin

    def _begin_quietly(self) -> None:
        """What was found is no news any more."""
        self._found = self.measurement.coefficient = None
        if self.measurement.worth is not None:
            self.measurement.worth.latest = None

    def pass_by(self, weights: Weights, since: float) -> Weights | None:
        """The weights of the next step after one that measured nothing and told the law nothing; None: :meth:`end` it.

        By one launch: where ``mu`` goes the host does not know. On the host :class:`Quiet` does it.
        """
        if not isinstance(weights, DeviceWeights):
            return None
        law: Any = self._controller.law
        state, vector = law.state, self._vector
        if self._left == 0 or law.follows_kl or vector is None:
            return None
        if not isinstance(state, VectorState) or state.vector is not vector:
            return None
        with Lasting():
            after = self._run(weights, Step(self._controller.steps), None)
        self.measurement.carry(after[0])
        self._left -= 1
        self._quiet.passed += 1
        self._controller.steps += 1
        self._begin_quietly()
        now, inside = perf_counter(), self.measurement.observer.now
        inside.seconds += now - since
        self.measurement.spending.clock.tick(now, inside.seconds)
        return after[1]

    def ended(self, gac: float) -> None:
        """A step has ended, and those before it that were passed by; :meth:`plan` comes next.

        Args:
            gac: seconds in GAC.
        """
        spending = self.measurement.spending
        spending.clock.tick(perf_counter(), gac)
        spending.ended(gac, measured=self.measurement.is_measured)
        self._quiet.passed = 0

    def catch_up(self) -> None:
        """Ends what was passed by, for a state that can be kept."""
        if self._quiet.passed:
            observer = self.measurement.observer
            self.measurement.spending.ended(observer.now.seconds, measured=False)
            observer.now.seconds, self._quiet.passed = 0.0, 0

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
            if measurement.worth is None and ending.serves():  # products with earlier steps: on Python numbers
                return self._end_on_host(law, weights, told, since)
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
        if isinstance(weights, DeviceWeights):
            return self._end_on_device(weights, self._controller.told(**told), since)
        found = measurement.finish(weights.present, number)
        self._found, self._vector = found, None
        self._quiet.keep(None)
        worth = None if measurement.worth is None else measurement.worth.latest
        self._controller.update(found, worth=worth, **told)
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

    def _end_on_host(self, law: GacLaw, weights: HostWeights, told: Mapping[str, Any], since: float) -> Weights:
        """By one call of the CPU library."""
        measurement, controller = self.measurement, self._controller
        untold = told is UNTOLD and not law.needs
        step = Step(controller.steps) if untold else controller.told(**told)
        slot, measured = self._slots.next(), False
        if self._on_host is None:
            self._on_host = HostProgram(law)
        program = self._on_host

        def end(source: Any, **more: Any) -> HostVector:
            nonlocal measured
            measured, present = source is not None, weights.present_on_host
            errors, skipped = measurement.state_of_errors, measurement.skipped_on_host
            return program(errors, skipped, step, source, weights=slot.address, present=present, **more)

        vector = measurement.finish_in_program(end, weights, controller.steps)
        self._found = vector if measured else None
        controller.steps = step.number + 1
        alone = untold or all(value is None for value in told.values())
        idle = alone and law.prior is None and not law.follows_kl
        state: Any = law.state  # a HostState
        self._quiet.keep(state if idle else None, vector["mu"], vector.target)
        seconds = measurement.observer.now.seconds + perf_counter() - since
        self._publish_row(vector.row, step.number, seconds)
        return HostWeights.written(slot, vector.numbers[0])

    def _end_on_device(self, weights: DeviceWeights, step: Step, since: float) -> Weights:
        measurement, after = self.measurement, weights
        measured = False

        def end(source: torch.Tensor | None, **more: Any) -> StepVector:
            nonlocal after, measured
            vector, after = self._run(weights, step, source, **more)
            measured = source is not None
            return vector

        vector = measurement.finish_on_device(end, weights, self._controller.steps)
        self._found = vector if measured else None
        self._controller.steps = step.number + 1
        seconds = measurement.observer.now.seconds + perf_counter() - since
        self._publish_vector(vector, step.number, seconds)
        return after

    def _run(
        self, weights: DeviceWeights, step: Step, source: torch.Tensor | None, **more: Any
    ) -> tuple[StepVector, DeviceWeights]:
        """One run of the program, whose state becomes the law's."""
        law: Any = self._controller.law
        if self._program is None or self._program.device != self.measurement.device:
            self._program = fused_device.DeviceProgram(law, self.measurement.device)
        before = self.measurement.vector_of(law.state, len(law.rates))
        vector, numbers = self._program(before, weights.numbers, step, source, **more)
        law.state = VectorState(vector, tuple(law.state))
        self._vector = vector
        return vector, DeviceWeights(numbers)

    def _keep(self, law: GacLaw, state: Numbers, *, alone: bool) -> None:
        """Keeps the law's state; ``alone``: the law was told nothing beside statistics."""
        kept = HostState(state, functools.partial(fused_law.coast, law))
        law.state = kept  # type: ignore[assignment]
        idle = alone and law.prior is None and not law.follows_kl
        self._quiet.keep(kept if idle else None, state["mu"], fused_law.target_of(state))

    def _numbers_of_law(self) -> Numbers:
        return numbers_of(self._controller.law.state)

    def _publish_vector(self, vector: StepVector, number: int, seconds: float) -> None:
        self._told = vector
        self._publish_row(vector.row, number, seconds)

    def _publish(self, statistics: Mapping[str, float], state: Numbers, number: int, seconds: float) -> None:
        row = [HostWeights.rounded(state["mu"]), state["raw"], state["mu_se"], state["prior"]]
        row += [self.measurement.skipped_on_host, *statistics.values(), cosine_of(statistics)]
        self._publish_row(row, number, seconds)

    def _publish_row(self, row: Any, number: int, seconds: float) -> None:
        measurement = self.measurement
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
    if why_in_torch(controller.law, device) is not None:
        return Weights(controller.mu)
    if fused_device.why_not(device) is None:
        return DeviceWeights.first(controller.mu)
    return HostWeights(float(controller.mu))


def why_in_torch(law: Law, device: torch.device) -> str | None:
    """Why a step is ended in torch rather than in one piece; None where it is not."""
    if type(law) is not GacLaw:
        return f"law {law.name!r} is written in torch alone"
    return None if device.type == "cpu" else fused_device.why_not(device)

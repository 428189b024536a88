"""The end of a measurement by the program that ends steps on a device: what it is given, and what goes on from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from gac.fused.vector import OF_ERRORS, StepVector, VectorState, vector_of
from gac.observe.temporal import take_in
from gac.statistics.branch import Branch
from gac.statistics.by_module import take_apart
from gac.weights import Weights

_COUNTS = {Branch.SFT: "n_s", Branch.RL: "n_r"}


class FinishOnDevice:
    """The part of a measurement that is told what :class:`gac.fused.device.DeviceProgram` finds."""

    def finish_on_device(self: Any, end: Callable[..., StepVector], weights: Weights, step: int) -> StepVector:
        """``finish`` of the measurement, by a program and without copies or waits.

        Args:
            end: the program: takes the step's sums, or with ``from_statistics`` its statistics, or None, and of which
                branches the noise is that from time (``lone``).
            weights: of the step. step: its number, from 0.
        """
        self.used = self.estimator + ("+time" if self._uses_time() else "")
        reduction, self._reduction = self._reduction, None
        source = whole = None
        lone = [False, False]
        if reduction is not None:
            lone = [self._uses_time(branch) for branch in Branch]
            whole = reduction.finish() if self.observer.by_module or self.from_tokens else None
            source = reduction.finish_on_device() if whole is None else whole.stacked()
        if reduction is not None or self.is_measured:
            self.spending.decide(self.spending.report() if reduction is None else reduction.costs)
        if source is not None and not self.confirmed:
            silent, n_s, n_r = source[[7, 4, 5]].tolist()
            self._confirm(silent, n_s + n_r)
        if self.from_tokens:
            if whole is not None and any(lone):
                self._from_sums(whole, weights.present, step)  # for the moving means
            self.used, lone, whole = "coefficient", [False, False], None
            source = None if self.coefficient is None else self.coefficient.stacked()
        vector = end(source, from_statistics=self.from_tokens, lone=lone)
        for k, branch in enumerate(Branch):
            if lone[k]:
                known = (vector[_COUNTS[branch]] > 0) & (vector["nonfinite"] == 0)
                take_in(branch, self.observer.ledgers, self._means, known, step)
        self.carry(vector)
        if source is not None and self.spending.cadence.counts_costs:
            self.spending.account.moved = vector["moved"]
        if whole is not None:
            self.modules.append(take_apart(whole, vector.statistics(), self.observer.module_labels, step + 1))
        return vector

    def carry(self: Any, vector: StepVector) -> None:
        """Goes on from this vector."""
        self._skipped, self._errors.state = vector["skipped"], VectorState(vector, OF_ERRORS)

    def vector_of(self: Any, law: Mapping[str, Tensor], averages: int) -> StepVector:
        """The state before a step, with that of the law; see :func:`gac.fused.vector.vector_of`."""
        return vector_of(law, self._errors.state, self.skipped, averages, self.device)

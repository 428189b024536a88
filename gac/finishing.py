"""The end of a measurement by what ends a step in one piece: what that is given, and what goes on from it."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gac.fused.host import HostVector, state_of_errors
from gac.fused.state import HostState, numbers_of
from gac.fused.statistics import attach_errors, has_moved, statistics_of
from gac.fused.vector import OF_ERRORS, StepVector, VectorState, vector_of
from gac.observe.temporal import take_in
from gac.statistics.branch import Branch
from gac.statistics.by_module import take_apart
from gac.statistics.step import Statistics
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
        self.used = self.estimator + ("+time" if any(self._lone()) else "")
        reduction, self._reduction = self._reduction, None
        source = whole = None
        lone = [False, False]
        if reduction is not None:
            lone = list(self._lone())
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


class FinishOnHost:
    """The part of a measurement whose numbers are the host's: in Python, or by a program of the CPU library."""

    def finish_on_host(self: Any, present: Sequence[bool], step: int) -> dict[str, float] | None:
        """:meth:`finish` in numbers, by the names of :class:`gac.Statistics`: for gradients on the CPU."""
        lone = self._lone()
        self.used = self.estimator + ("+time" if any(lone) else "")
        if self.worth is not None:
            self.worth.latest = None
        if self._reduction is None:
            return None
        reduction, self._reduction = self._reduction, None
        whole = reduction.finish() if self.observer.by_module else None
        sums = reduction.finish_on_host() if whole is None else whole.on_host()
        self.spending.decide(reduction.costs)
        if not self.confirmed:
            self._confirm(sums.silent, sum(sums.n))
        statistics = statistics_of(sums, present, lone)
        healthy = statistics["nonfinite"] == 0
        for k, branch in enumerate(Branch):
            if lone[k]:
                known = torch.tensor(healthy and statistics[_COUNTS[branch]] > 0)
                take_in(branch, self.observer.ledgers, self._means, known, step)
        if self.worth is not None and sums.worth is not None:
            there = [healthy and statistics[name] > 0 for name in _COUNTS.values()]
            self.worth.take_on_host(sums.worth, reduction.totals, there, step)
        if not healthy:
            self._skipped = float(self._skipped) + 1.0
        before = numbers_of(self._errors.state)
        state, statistics = attach_errors(before, statistics)
        self._errors.state = HostState(state)
        self.spending.account.moved = float(has_moved(before["last"], statistics))
        if whole is not None:
            self.modules.append(take_apart(whole, Statistics.of(statistics), self.observer.module_labels, step + 1))
        return statistics

    def finish_in_program(self: Any, end: Callable[..., HostVector], weights: Weights, step: int) -> HostVector:
        """:meth:`finish_on_host` by a program.

        Args:
            end: the program: takes the step's sums, or with ``from_statistics`` its statistics, or None, and of which
                branches the noise is that from time (``lone``).
            weights: of the step. step: its number, from 0.
        """
        lone = self._lone()
        self.used = self.estimator + ("+time" if any(lone) else "")
        reduction, self._reduction = self._reduction, None
        source = whole = None
        if reduction is not None:
            if self.observer.by_module or self.from_tokens:
                whole = reduction.finish()
                source = array("d", whole.stacked().tolist())
            else:
                source = reduction.finish_in_numbers(lone=any(lone))
        if reduction is not None or self.is_measured:
            self.spending.decide(self.spending.report() if reduction is None else reduction.costs)
        if source is not None and not self.confirmed:
            self._confirm(source[7], source[4] + source[5])
        if self.from_tokens:
            if whole is not None and any(lone):
                self._from_sums(whole, weights.present, step)  # for the moving means
            self.used, lone, whole = "coefficient", (False, False), None
            source = None if self.coefficient is None else array("d", self.coefficient.stacked().tolist())
        vector = end(source, from_statistics=self.from_tokens, lone=lone)
        self._skipped, self._errors.state = vector["skipped"], state_of_errors(vector)
        if source is None:
            return vector
        for k, branch in enumerate(Branch):
            if lone[k]:
                known = torch.tensor(vector["nonfinite"] == 0 and vector[_COUNTS[branch]] > 0)
                take_in(branch, self.observer.ledgers, self._means, known, step)
        if self.spending.cadence.counts_costs:
            self.spending.account.moved = vector["moved"]
        if whole is not None:
            self.modules.append(take_apart(whole, vector.statistics(), self.observer.module_labels, step + 1))
        return vector

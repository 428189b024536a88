"""The end of a step as one call of the CPU library: statistics, standard errors, law ``gac`` and the weights to come.

:mod:`gac.fused.statistics` and :mod:`gac.fused.law` are the same on Python's numbers and serve where there is no
library; the tests hold both against the reference in torch.
"""

from __future__ import annotations

import functools
from array import array
from collections.abc import Mapping, Sequence
from math import isfinite

from torch import Tensor

from gac.fused.law import coast
from gac.fused.state import HostState, Numbers, numbers_of
from gac.fused.told import changing, options, told_of
from gac.fused.vector import OF_ERRORS
from gac.laws.base import Step
from gac.laws.gac import GacLaw
from gac.statistics.step import Statistics
from gac.statistics.uncertainty import table_of_weights
from gac_kernels.cpu.ending import StepEnd
from gac_kernels.step_vector import OFFSETS, ROW, SHAPES, SIZE, STATISTICS

_BY_AVERAGE = ("sums", "squares")
_ROW = len(ROW)
_SKIPPED = ROW.index("skipped")


class HostVector:
    """A state vector (:mod:`gac_kernels.step_vector`) in memory of the host. Never changed by a later step.

    Args:
        numbers: of the vector. names: of the law's state, in order. averages: that the law keeps.
    """

    __slots__ = ("averages", "names", "numbers")

    def __init__(self, numbers: array[float], names: tuple[str, ...], averages: int) -> None:
        self.numbers, self.names, self.averages = numbers, names, averages

    def __getitem__(self, name: str) -> float:
        """One number, by its name in the row or the vector."""
        return self.numbers[OFFSETS[name] if name in OFFSETS else ROW.index(name)]

    @property
    def row(self) -> array[float]:
        """What the metrics tell of the step."""
        return self.numbers[:_ROW]

    @property
    def target(self) -> float:
        """What ``mu`` goes towards without a prior: the estimate where there is one."""
        raw = self["raw"]
        return raw if isfinite(raw) else self["mu"]

    def statistics(self) -> Statistics:
        """Those of the step."""
        return Statistics.of(dict(zip(Statistics.names(), self.numbers[STATISTICS], strict=True)))

    def of(self, names: Sequence[str]) -> Numbers:
        """Parts by name: floats, or lists of them in their shape."""
        return {name: self._part(name) for name in names}

    def _part(self, name: str) -> float | list:
        shape = SHAPES.get(name, ())
        if not shape:
            return self[name]
        begin, size = OFFSETS[name], functools.reduce(int.__mul__, shape)
        part: list = self.numbers[begin : begin + size].tolist()
        for length in reversed(shape[1:]):
            part = [part[k : k + length] for k in range(0, len(part), length)]
        return part[: self.averages] if name in _BY_AVERAGE else part


def _flat(value: float | list) -> list[float]:
    return [x for item in value for x in _flat(item)] if isinstance(value, list) else [value]


def vector_of(
    law: Mapping[str, Tensor], errors: Mapping[str, Tensor], skipped: float | Tensor, averages: int
) -> tuple[HostVector, int]:
    """The vector that holds these, or a new one, and how many steps of the law's have passed since.

    Args:
        law: its state. errors: those of statistics. skipped: steps dropped so far.
        averages: that the law keeps.
    """
    skipped = float(skipped)
    if type(law) is HostState is type(errors):
        found = law.vector
        if found is not None and found is errors.vector and skipped == found.numbers[_SKIPPED]:
            return found, law.passed
    numbers = array("d", bytes(8 * SIZE))
    for name, value in (numbers_of(law) | numbers_of(errors) | {"skipped": skipped}).items():
        part = array("d", _flat(value))
        begin = OFFSETS[name] if name in OFFSETS else ROW.index(name)
        numbers[begin : begin + len(part)] = part
    return HostVector(numbers, tuple(law), averages), 0


class HostProgram:
    """Runs it for one law."""

    def __init__(self, law: GacLaw) -> None:
        self._law, self._averages = law, len(law.rates)
        self._end = StepEnd(table_of_weights(), self._averages)
        self._told: tuple[float | None, ...] = ()
        self._options = array("d")
        self._ahead = functools.partial(coast, law)

    def __call__(
        self,
        errors: Mapping[str, Tensor],
        skipped: float | Tensor,
        step: Step,
        source: array[float] | None,
        *,
        weights: int,
        present: Sequence[bool],
        from_statistics: bool = False,
        lone: Sequence[bool] = (False, False),
    ) -> HostVector:
        """The state after a step, which becomes the law's.

        Args:
            errors: state of the statistics' errors. skipped: steps dropped so far.
            step: what the law is told beside statistics; tensors are read.
            source: sums of the step or, with ``from_statistics``, statistics; None where it measured none.
            weights: address of four float32 numbers, which become the weights of the next step and what undoes them.
            present: of SFT and RL, whether the step's weight was above 0.
            lone: of SFT and RL, whether the noise is that from time.
        """
        law = self._law
        before, passed = vector_of(law.state, errors, skipped, self._averages)
        now = changing(law)
        if now != self._told:
            self._told, self._options = now, array("d", options(law))
        told, numbers = told_of(law, step), before.numbers[:]
        of_tensor = isinstance(told.get("prior"), Tensor)
        self._end(
            source,
            numbers,
            weights,
            options=self._options,
            **{name: float(value) for name, value in told.items()},
            prior_is_tensor=of_tensor,
            follows_kl="kl" in told,
            from_statistics=from_statistics,
            passed=passed,
            present=present,
            lone=lone,
        )
        vector = HostVector(numbers, before.names, self._averages)
        law.state = HostState(functools.partial(vector.of, vector.names), self._ahead, vector)  # type: ignore[assignment]
        return vector


def state_of_errors(vector: HostVector) -> HostState:
    """The part of it that is the state of the statistics' errors."""
    return HostState(functools.partial(vector.of, OF_ERRORS), None, vector)

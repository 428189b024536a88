"""The end of a step as one program on its device: statistics, standard errors, law ``gac`` and the weights to come.

:mod:`gac.fused.statistics` and :mod:`gac.fused.law` are the same on numbers of the host, and the tests hold both
against the reference in torch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gac.fused.told import changing, options, told_of
from gac.fused.vector import StepVector
from gac.laws.base import Step
from gac.laws.gac import GacLaw
from gac.statistics.uncertainty import table_of_weights
from gac_kernels import backends

ON = {"cuda"}
"""Types of devices whose steps it may end. Tests add the CPU, in Triton's interpreter; comparisons take the GPU out."""


def why_not(device: torch.device) -> str | None:
    """Why no program can end the steps of ``device``; None where one can."""
    if device.type not in ON:
        return f"the numbers are on {device.type}"
    if device.type == "cpu":
        return None
    _, name, reason = backends.select(device.type)
    return None if name == "triton" else f"the numbers are on {device.type}, which Triton does not serve: {reason}"


class DeviceProgram:
    """Runs it for one law.

    Attributes:
        device: where.
    """

    def __init__(self, law: GacLaw, device: torch.device) -> None:
        from gac_kernels.triton import ending  # it imports Triton

        self._ending, self._law, self.device = ending, law, device
        self._table = ending.upload(table_of_weights(), device)
        self._told: tuple[float | None, ...] = ()
        self._options = self._table

    def __call__(
        self,
        before: StepVector,
        weights: Tensor,
        step: Step,
        source: Tensor | None,
        *,
        from_statistics: bool = False,
        lone: Sequence[bool] = (False, False),
    ) -> tuple[StepVector, Tensor]:
        """The state after a step, whose weights are those of the next one.

        Args:
            before: the state; left as it is.
            weights: of the step that ends, as :class:`gac.weights.DeviceWeights` keeps them.
            step: what the law is told beside statistics.
            source: sums of the step or, with ``from_statistics``, statistics; None where it measured none.
            lone: of SFT and RL, whether the noise is that from time.
        """
        law = self._law
        follows_kl = law.follows_kl and step.alpha is None
        told = {name: self._number(value) for name, value in told_of(law, step).items()}
        numbers, after = self._ending.finish(
            source,
            before.numbers,
            weights,
            table=self._table,
            options=self._uploaded(),
            averages=len(law.rates),
            from_statistics=from_statistics,
            follows_kl=follows_kl,
            lone=(bool(lone[0]), bool(lone[1])),
            **told,
        )
        return StepVector(numbers, len(law.rates)), after

    def _number(self, value: float | Tensor) -> float | Tensor:
        return self._law.beside(value).reshape(()) if isinstance(value, Tensor) else float(value)

    def _uploaded(self) -> Tensor:
        """The law's options on the device; most steps find them there."""
        told = changing(self._law)
        if told != self._told:
            self._told, self._options = told, self._ending.upload(options(self._law), self.device)
        return self._options

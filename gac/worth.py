"""What steps were worth, measured from step to step, for the laws that ask."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gac.fused.state import HostState, numbers_of
from gac.fused.statistics import attach_errors
from gac.observe.crossing import Crossing
from gac.statistics.step import NAN
from gac.statistics.uncertainty import SuccessiveDifferences
from gac.statistics.worth import WORTH, Worth


class WorthOfSteps:
    """Products of each measured step's gradients with those before it, and their standard errors.

    Args:
        devices: of the ledgers that hold the gradients; empty where the estimator keeps none: nothing is then found.
        device, dtype: of the numbers.

    Attributes:
        crossing: what a step's reduction makes products with; None where there are no ledgers.
        latest: of the last step; None where it was not measured.
    """

    def __init__(self, devices: Sequence[torch.device], device: torch.device, dtype: torch.dtype) -> None:
        self.crossing = Crossing(devices) if devices else None
        self.latest: Worth | None = None
        self._errors = SuccessiveDifferences(len(WORTH), device, dtype)
        self._dtype = dtype

    def take(self, found: Tensor, totals: Sequence[Tensor], there: Tensor, step: int) -> None:
        """Takes the products ``[4]`` of ``step``, then its gradients; ``there``: ``[2]`` bool, of which branches."""
        values = torch.where(there[:, None].expand(2, 2).reshape(4), found.to(self._dtype), NAN)
        self.latest = Worth(values, self._errors.update(values, there.any()))
        self._keep(totals, there, step)

    def take_on_host(self, found: Sequence[float], totals: Sequence[Tensor], there: Sequence[bool], step: int) -> None:
        """:meth:`take` for numbers of the host."""
        told = {name: value if there[k // 2] else NAN for k, (name, value) in enumerate(zip(WORTH, found, strict=True))}
        state, told = attach_errors(numbers_of(self._errors.state), told | {"nonfinite": 0.0}, WORTH)
        self._errors.state = HostState(state)  # type: ignore[assignment]
        table = [[told[name] for name in WORTH], [told[f"{name}_se"] for name in WORTH]]
        self.latest = Worth(*torch.tensor(table, dtype=self._dtype).unbind())
        self._keep(totals, torch.tensor(there), step)

    def _keep(self, totals: Sequence[Tensor], there: Tensor, step: int) -> None:
        assert self.crossing is not None  # there are no products without it
        self.crossing.take_in(totals, there, step)

    def state_dict(self, *, alone: bool) -> dict[str, Any]:
        """What the next step needs; moving means where this process is the only one, whose own they are."""
        means = self.crossing.means if alone and self.crossing is not None else []
        return {"means": [_on_cpu(mean.state) for mean in means], "errors": _on_cpu(self._errors.state)}

    def take_state(self, state: dict[str, Any]) -> None:
        """Continues where :meth:`state_dict` left off, as :class:`gac.saved.MixerState` has read it."""
        self._errors.state = state["errors"]
        for k, mean in enumerate(self.crossing.means if self.crossing is not None else []):
            mean.state = state["means"][k] if state["means"] else {}


def _on_cpu(state: Any) -> dict[str, Tensor]:
    return {name: value.to("cpu", copy=True) for name, value in state.items()}

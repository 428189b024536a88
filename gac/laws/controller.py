"""From statistics to mu, step by step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gac.laws.base import Step, create
from gac.statistics import Statistics


class Controller:
    """Turns the statistics of each optimizer step into the mu of the next one, by a named law.

    Args:
        law: a name of :func:`gac.laws.available`.
        **options: the law's options; see its class.

    Raises:
        ValueError: unknown law, or a value out of range. TypeError: an option that the law lacks.
    """

    def __init__(self, law: str = "gac", **options: Any) -> None:
        self.law = create(law, **options)
        self.steps = 0

    @property
    def mu(self) -> Tensor:
        """The current mu, 0-dim float64."""
        return self.law.mu

    def update(
        self,
        statistics: Statistics | None,
        *,
        step: int | None = None,
        prior: float | None = None,
        alpha: float | None = None,
        kl: float | Tensor | None = None,
        entropy: float | Tensor | None = None,
    ) -> Tensor:
        """Takes the statistics of a step and returns the next mu; nothing is read on the host.

        Args:
            statistics: None when the step measured none: schedules go on, averages keep their values.
            step: the optimizer step just done, from 0; counted from the last one when None.
            prior, alpha: replace the law's own prior and alpha in this update; in [0, 1].
            kl, entropy: of the policy in this step, in nats per token, for the laws that need them.

        Returns:
            The next mu, 0-dim, on the statistics' device.
        """
        if statistics is not None and not isinstance(statistics, Statistics):
            raise TypeError(f"statistics must be gac.Statistics or None, got {type(statistics).__name__}")
        for name, value in (("prior", prior), ("alpha", alpha)):
            if value is not None and not isinstance(value, Tensor) and not 0.0 <= value <= 1.0:
                raise ValueError(f"{name} must be in [0, 1], got {value}")
        told = Step(self.steps if step is None else int(step), prior, alpha, kl, entropy)
        for name in self.law.needs:
            if getattr(told, name) is None:
                raise ValueError(f"law {self.law.name!r} follows {name}: pass {name}=... in every step")
        if statistics is not None and statistics.device != self.law.mu.device:
            self.law.to(statistics.device)
        with torch.no_grad():
            mu = self.law.update(statistics, told)
        self.steps = told.number + 1
        return mu

    def state_dict(self) -> dict:
        """Tensors and numbers alone: loads with ``torch.load(..., weights_only=True)``."""
        state = {name: value.detach().to("cpu", copy=True) for name, value in self.law.state.items()}
        return {"law": self.law.name, "steps": self.steps, "state": state}

    def load_state_dict(self, state_dict: dict) -> None:
        """Continues where :meth:`state_dict` left off. Raises ValueError for the state of another law."""
        missing = {"law", "steps", "state"} - set(state_dict)
        if missing:
            raise ValueError(f"state_dict lacks {sorted(missing)}: pass what Controller.state_dict() returned")
        if state_dict["law"] != self.law.name:
            raise ValueError(
                f"the state is of law {state_dict['law']!r}, this controller has {self.law.name!r}: "
                "build it with the same law"
            )
        state, mine = state_dict["state"], self.law.state
        shapes, wanted = ({name: tuple(value.shape) for name, value in x.items()} for x in (state, mine))
        if shapes != wanted:
            names = sorted(name for name in {*state, *mine} if shapes.get(name) != wanted.get(name))
            raise ValueError(
                f"the saved state of law {self.law.name!r} does not fit this controller in {', '.join(names)}: it "
                "comes from another version of gac or from other options (such as alpha='kl'). Use those, or start anew"
            )
        self.law.state = {k: v.to(mine[k].device, mine[k].dtype, copy=True) for k, v in state.items()}
        self.steps = int(state_dict["steps"])

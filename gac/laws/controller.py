"""From statistics to mu, step by step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gac.laws.base import Step, create
from gac.state import Range, Same, Table, Whole, like, read
from gac.statistics import Statistics
from gac.statistics.worth import Worth

THEN = "pass what {whose}.state_dict() returned with the same law, options and model, or start anew without a state"
"""What to do about a state that is refused."""


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
        self.law.to(self.law.mu.device)  # a law of a user may begin with other dtypes than it goes on with
        self.steps = 0
        self._begins_unknown = {name for name, value in self.law.state.items() if value.isnan().any()}

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
        worth: Worth | None = None,
    ) -> Tensor:
        """Takes the statistics of a step and returns the next mu; nothing is read on the host.

        Args:
            statistics: None when the step measured none: schedules go on, averages keep their values.
            step: the optimizer step just done, from 0; counted from the last one when None.
            prior, alpha: replace the law's own prior and alpha in this update; in [0, 1].
            kl, entropy: of the policy in this step, in nats per token, for the laws that need them.
            worth: what steps were worth, for the laws that measure their aim.

        Raises TypeError, ValueError for what is none of these, or where a law lacks what it follows.

        Returns:
            The next mu, 0-dim, on the statistics' device.
        """
        if statistics is not None and not isinstance(statistics, Statistics):
            raise TypeError(f"statistics must be gac.Statistics or None, got {type(statistics).__name__}")
        told = self.told(step=step, prior=prior, alpha=alpha, kl=kl, entropy=entropy, worth=worth)
        if statistics is not None and statistics.device != self.law.mu.device:
            self.law.to(statistics.device)
        with torch.no_grad():
            mu = self.law.update(statistics, told)
        self.steps = told.number + 1
        return mu

    def told(
        self,
        *,
        step: int | None = None,
        prior: float | None = None,
        alpha: float | None = None,
        kl: float | Tensor | None = None,
        entropy: float | Tensor | None = None,
        worth: Worth | None = None,
    ) -> Step:
        """What the law is told of a step, checked; see :meth:`update`."""
        for name, value in (("prior", prior), ("alpha", alpha)):
            if value is not None and not isinstance(value, Tensor) and not 0.0 <= value <= 1.0:
                raise ValueError(f"{name} must be in [0, 1], got {value}")
        if step is not None and (isinstance(step, bool) or int(step) != step or step < 0):
            raise ValueError(f"step must be a whole number from 0 on, got {step!r}")
        told = Step(self.steps if step is None else int(step), prior, alpha, kl, entropy, worth)
        for name in self.law.needs:
            if getattr(told, name) is None:
                raise ValueError(f"law {self.law.name!r} follows {name}: pass {name}=... in every step")
        return told

    def state_dict(self) -> dict:
        """Tensors and numbers alone: loads with ``torch.load(..., weights_only=True)``."""
        state = {name: value.detach().to("cpu", copy=True) for name, value in self.law.state.items()}
        return {"law": self.law.name, "steps": self.steps, "state": state}

    def entries(self) -> Table:
        """What a state that fits this controller may hold."""
        law = self.law
        ranges = {name: law.range_of(name) or Range(unknown=name in self._begins_unknown) for name in law.state}
        otherwise = f"the state is of law {{got!r}}, this controller has {law.name!r}: build it with the same law"
        misfit = f"it comes from another version of law {law.name!r} or from other options (such as alpha='kl')"
        return Table(
            {
                "law": Same(law.name, otherwise),
                "steps": Whole(),
                "state": Table(like(law.state, ranges), misfit=misfit),
            }
        )

    def load_state_dict(self, state_dict: dict) -> None:
        """Continues where :meth:`state_dict` left off. The state is checked first: it is taken whole or not at all.

        Raises:
            TypeError, ValueError: it is of another law, or an entry is not what this one's may be: a name, a shape, a
                dtype, a value out of range. The message names the entry.
        """
        taken = read(state_dict, self.entries(), then=THEN.format(whose="Controller"))
        self.law.state, self.steps = taken["state"], taken["steps"]

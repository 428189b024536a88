"""Laws that hold one quantity of the policy at a target and look at no gradient."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from gac.laws.base import Law, Step, bounds, number, register
from gac.state import Range
from gac.statistics import Statistics


class _Feedback(Law):
    """Moves mu within bounds by what ``signal`` says; holds it where the signal is not finite."""

    def __init__(self, start: float, mu_min: float, mu_max: float) -> None:
        super().__init__(start)
        self.mu_min, self.mu_max = bounds(mu_min, mu_max, start=start)

    def _move(self, signal: float | Tensor, change: Any) -> Tensor:
        mu = self.mu
        value = self.beside(signal)
        moved = change(mu, value).clamp(self.mu_min, self.mu_max)
        self.record("mu", torch.where(torch.isfinite(value), moved, mu))
        return self.mu


@register("kl-ctrl")
class KlLaw(_Feedback):
    """``mu *= 1 + clip(KL/target - 1, -.2, .2) * n/horizon``: the adaptive KL controller of Ziegler et al. 2019, on mu.

    A policy that drifts from its reference is pulled towards the demonstrations. Needs ``kl`` in every step.

    Args:
        target: wanted KL per token, in nats.
        gain: ``n/horizon``, episodes in a step over the controller's horizon.
        start, mu_min, mu_max: the first mu and its bounds.
    """

    needs = ("kl",)

    def __init__(
        self, target: float = 0.02, gain: float = 0.1, start: float = 0.5, mu_min: float = 0.05, mu_max: float = 0.9
    ) -> None:
        super().__init__(start, mu_min, mu_max)
        self.target = number("target", target, 1e-12, 1e12)
        self.gain = number("gain", gain, 0.0, 1e6)

    def update(self, statistics: Statistics | None, step: Step) -> Tensor:
        return self._move(step.kl, lambda mu, kl: mu * (1 + (kl / self.target - 1).clamp(-0.2, 0.2) * self.gain))


@register("entropy-ctrl")
class EntropyLaw(_Feedback):
    """``mu += rate * (target - entropy)``: the entropy term of AMFT, without its meta-gradient.

    A policy that grows too sure is pulled towards the demonstrations. Needs ``entropy`` in every step.

    Args:
        target: wanted entropy per token, in nats; None takes that of the first step.
        rate: change of mu for each nat.
        start, mu_min, mu_max: the first mu and its bounds.
    """

    needs = ("entropy",)
    ranges: ClassVar[dict[str, Range]] = {"target": Range(-math.inf, math.inf, unknown=True)}  # a first entropy's

    def __init__(
        self,
        target: float | None = None,
        rate: float = 5e-4,
        start: float = 0.5,
        mu_min: float = 0.05,
        mu_max: float = 0.95,
    ) -> None:
        super().__init__(start, mu_min, mu_max)
        self.rate = number("rate", rate, 0.0, 1e6)
        self.record("target", float("nan") if target is None else number("target", target, 0.0, 1e6))

    def update(self, statistics: Statistics | None, step: Step) -> Tensor:
        target = self.state["target"]
        first = self.beside(step.entropy)
        self.record("target", torch.where(torch.isfinite(target), target, first))
        return self._move(step.entropy, lambda mu, entropy: mu + self.rate * (self.state["target"] - entropy))

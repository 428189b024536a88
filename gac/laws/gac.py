"""The default law: smooth the measured statistics, then take the mu of least expected error, within guardrails."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from gac.laws.base import Law, bounds, closed_form, number, register, unit_interval
from gac.schedules import Schedule, as_schedule
from gac.statistics import Statistics


@register("gac")
class GacLaw(Law):
    """Noise-aware mu with smoothing, an optional prior, bounded steps and bounds.

    Each update smooths the unbiased ``sigma_s2``, ``sigma_r2`` and ``delta_g2`` with a bias-corrected moving average,
    clamps them at 0 (after smoothing: clamping first would push ``delta_g2`` up), takes the closed form, blends it with
    the prior, limits the step and clips. A number that was not measured (NaN) leaves its average as it was; a step
    with non-finite gradients changes nothing.

    Args:
        half_life: optimizer steps after which a measurement's weight has halved.
        alpha: weight of the SFT gradient in the target ``alpha*g_s + (1-alpha)*g_r``.
        prior: what mu leans on: a number, a function of the step, ``dict(warmup, decay, peak, valley)``, or None.
        prior_weight: share of the prior in the blend; 0 without a prior.
        cap: largest change of mu in one step.
        mu_min, mu_max: bounds of mu.
        start: the first mu.
    """

    def __init__(
        self,
        half_life: float = 7.0,
        alpha: float = 0.5,
        prior: Schedule | Mapping | float | None = None,
        prior_weight: float = 0.5,
        cap: float = 0.02,
        mu_min: float = 0.05,
        mu_max: float = 0.95,
        start: float = 0.5,
    ) -> None:
        super().__init__(start)
        self.half_life = number("half_life", half_life, 1e-3, 1e9)
        self.alpha = unit_interval("alpha", alpha)
        self.prior = as_schedule(prior)
        self.prior_weight = unit_interval("prior_weight", prior_weight)
        self.cap = unit_interval("cap", cap)
        self.mu_min, self.mu_max = bounds(mu_min, mu_max)
        if not self.mu_min <= self.start <= self.mu_max:
            raise ValueError(f"start must be in [mu_min, mu_max] = [{mu_min}, {mu_max}], got {start}")
        self.state["average"] = torch.zeros(3, dtype=torch.float64)  # of sigma_s2, sigma_r2, delta_g2
        self.state["weight"] = torch.zeros(3, dtype=torch.float64)  # how much was averaged: corrects the bias
        self.state["waiting"] = torch.zeros((), dtype=torch.float64)  # updates since statistics were measured

    def smoothed(self) -> Tensor:
        """``[3]``: sigma_s2, sigma_r2, delta_g2, averaged and then clamped at 0; NaN before the first measurement."""
        return (self.state["average"] / self.state["weight"]).clamp(min=0.0)

    def update(self, statistics: Statistics | None, *, step: int, prior: float | None, alpha: float | None) -> Tensor:
        mu = self.mu
        healthy = torch.ones((), dtype=torch.bool, device=mu.device)
        waiting = self.state["waiting"] + 1
        if statistics is not None:
            healthy = statistics.nonfinite == 0
            self._smooth(statistics, healthy, waiting)
            waiting = torch.where(healthy, 0.0, waiting)
        self.state["waiting"] = waiting

        alpha = self.alpha if alpha is None else alpha
        sigma_s2, sigma_r2, delta_g2 = self.smoothed().unbind()
        raw = closed_form(sigma_s2, sigma_r2, delta_g2, alpha)
        known = torch.isfinite(raw)
        self.record("raw", raw)

        if prior is None and self.prior is not None:
            prior = self.prior(step + 1)  # of the step to come
        if prior is None:
            target = torch.where(known, raw, mu)
        else:
            blend = (1 - self.prior_weight) * raw + self.prior_weight * prior
            target = torch.where(known, blend, prior)
        self.record("prior", float("nan") if prior is None else prior)
        moved = (mu + (target - mu).clamp(-self.cap, self.cap)).clamp(self.mu_min, self.mu_max)
        self.record("mu", torch.where(healthy, moved, mu))
        return self.mu

    def _smooth(self, statistics: Statistics, healthy: Tensor, waiting: Tensor) -> None:
        value = torch.stack([statistics.sigma_s2, statistics.sigma_r2, statistics.delta_g2])
        use = torch.isfinite(value) & healthy
        keep = torch.exp2(-waiting / self.half_life)  # a measurement after k steps counts for k
        average, weight = self.state["average"], self.state["weight"]
        self.state["average"] = torch.where(use, keep * average + (1 - keep) * value, average)
        self.state["weight"] = torch.where(use, keep * weight + (1 - keep), weight)

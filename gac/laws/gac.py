"""The default law: smooth the measured statistics, then take the mu of least expected error, within guardrails."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from gac.laws.base import Law, Step, bounds, closed_form, number, register, unit_interval
from gac.schedules import Schedule, as_schedule
from gac.statistics import Statistics

KL_TARGET, KL_DECAY, HYSTERESIS = 0.02, 0.90, 0.10
ETA_UP, ETA_DOWN = 0.20, 0.30
ALPHA_MIN, ALPHA_MAX = 0.10, 0.95


@register("gac")
class GacLaw(Law):
    """Noise-aware mu with smoothing, an optional prior, bounded steps and bounds.

    Each update smooths the unbiased ``sigma_s2``, ``sigma_r2`` and ``delta_g2`` with a bias-corrected moving average,
    clamps them at 0 (after smoothing: clamping first would push ``delta_g2`` up), takes the closed form, blends it with
    the prior, limits the step and clips. A number that was not measured (NaN) leaves its average as it was; a step
    with non-finite gradients changes nothing.

    ``alpha="kl"`` lets the target follow the policy's drift. The constants are the authors'; their update rule is not
    public, so this one is ours: with ``e = clip(KL/target - 1, -1, 1)`` of the smoothed KL (decay .9, target .02 nats a
    token), nothing moves while ``|e| <= .10``; above, ``alpha += .20*(e - .10)*(.95 - alpha)``, so that a drifting
    policy is pulled to the demonstrations; below, ``alpha -= .30*(-e - .10)*(alpha - .10)``. It is continuous, stays
    within [.10, .95] by construction and has the dead band as hysteresis.

    Args:
        half_life: optimizer steps after which a measurement's weight has halved.
        alpha: weight of the SFT gradient in the target ``alpha*g_s + (1-alpha)*g_r``: a number in [0, 1], or ``"kl"``,
            which needs ``kl`` in every step and starts at .5.
        prior: what mu leans on: a number, a function of the step, ``dict(warmup, decay, peak, valley)``, or None.
        prior_weight: share of the prior in the blend; 0 without a prior.
        cap: largest change of mu in one step.
        mu_min, mu_max: bounds of mu.
        start: the first mu.
    """

    def __init__(
        self,
        half_life: float = 7.0,
        alpha: float | str = 0.5,
        prior: Schedule | Mapping | float | None = None,
        prior_weight: float = 0.5,
        cap: float = 0.02,
        mu_min: float = 0.05,
        mu_max: float = 0.95,
        start: float = 0.5,
    ) -> None:
        super().__init__(start)
        self.half_life = number("half_life", half_life, 1e-3, 1e9)
        self.follows_kl = alpha == "kl"
        self.alpha = 0.5 if self.follows_kl else unit_interval("alpha", alpha)
        if self.follows_kl:
            self.needs = ("kl",)
            self.record("alpha", self.alpha)
            self.record("kl", float("nan"))
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

    def update(self, statistics: Statistics | None, step: Step) -> Tensor:
        mu = self.mu
        healthy = torch.ones((), dtype=torch.bool, device=mu.device)
        waiting = self.state["waiting"] + 1
        if statistics is not None:
            healthy = statistics.nonfinite == 0
            self._smooth(statistics, healthy, waiting)
            waiting = torch.where(healthy, 0.0, waiting)
        self.state["waiting"] = waiting

        alpha = self._alpha(step)
        sigma_s2, sigma_r2, delta_g2 = self.smoothed().unbind()
        raw = closed_form(sigma_s2, sigma_r2, delta_g2, alpha)
        known = torch.isfinite(raw)
        self.record("raw", raw)

        prior = step.prior
        if prior is None and self.prior is not None:
            prior = self.prior(step.number + 1)  # of the step to come
        if prior is None:
            target = torch.where(known, raw, mu)
        else:
            blend = (1 - self.prior_weight) * raw + self.prior_weight * prior
            target = torch.where(known, blend, prior)
        self.record("prior", float("nan") if prior is None else prior)
        moved = (mu + (target - mu).clamp(-self.cap, self.cap)).clamp(self.mu_min, self.mu_max)
        self.record("mu", torch.where(healthy, moved, mu))
        return self.mu

    def _alpha(self, step: Step) -> float | Tensor:
        """The target's weight in this step."""
        if step.alpha is not None:
            return step.alpha
        if not self.follows_kl:
            return self.alpha
        kl, alpha = self.state["kl"], self.state["alpha"]
        new = self.beside(step.kl)
        smoothed = torch.where(torch.isfinite(kl), KL_DECAY * kl + (1 - KL_DECAY) * new, new)
        smoothed = torch.where(torch.isfinite(new), smoothed, kl)
        error = (smoothed / KL_TARGET - 1).clamp(-1.0, 1.0)
        up = ETA_UP * (error - HYSTERESIS).clamp(min=0.0) * (ALPHA_MAX - alpha)
        down = ETA_DOWN * (-error - HYSTERESIS).clamp(min=0.0) * (alpha - ALPHA_MIN)
        self.record("kl", smoothed)
        self.record("alpha", torch.where(torch.isfinite(smoothed), alpha + up - down, alpha))
        return self.state["alpha"]

    def _smooth(self, statistics: Statistics, healthy: Tensor, waiting: Tensor) -> None:
        value = torch.stack([statistics.sigma_s2, statistics.sigma_r2, statistics.delta_g2])
        use = torch.isfinite(value) & healthy
        keep = torch.exp2(-waiting / self.half_life)  # a measurement after k steps counts for k
        average, weight = self.state["average"], self.state["weight"]
        self.state["average"] = torch.where(use, keep * average + (1 - keep) * value, average)
        self.state["weight"] = torch.where(use, keep * weight + (1 - keep), weight)

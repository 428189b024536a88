"""The authors' published controller, to the digit (GAC, arXiv 2605.26184)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from gac.laws.base import Law, Step, bounds, closed_form, number, register, unit_interval, whole
from gac.schedules import Schedule, as_schedule
from gac.state import Range
from gac.statistics import Statistics

EPSILON = 1e-8
"""The authors add it to the denominator of the closed form."""

DEFAULT_PRIOR = {"warmup": 200, "decay": 800, "peak": 0.85, "valley": 0.15}


@register("paper")
class PaperLaw(Law):
    """Smooths both the statistics and mu, blends with a prior, caps and clips.

    ``ada = clip(beta*mu + (1-beta)*raw)``, ``mu <- clip(mu + cap((1-blend)*prior + blend*ada - mu))``. Statistics are
    taken over when ``mu_update_freq`` steps have passed, mu moves at every update. With the defaults, ``raw`` carries a
    weight of ``blend*(1-beta)/(1-blend*beta)``: in steady state the statistics move mu by at most 0.0099.

    Two departures, where the authors' code has no statistic: it takes a branch that a batch lacks for noise-free
    (``sigma2 = 0``) and ``sigma_s2 = sigma_r2 = 1`` before the first batch; here what was not measured changes nothing.
    Averages are clamped at 0, which their proxies never fall below and gradient statistics may.

    Args:
        ema_beta: decay of the averages of the statistics and of mu.
        mu_min, mu_max: bounds of mu.
        mu_update_freq: steps between two uses of the statistics.
        alpha_static: weight of the SFT gradient in the target.
        init_mu: the first mu.
        mu_change_cap: largest change of mu in one update.
        delta_g2_cap_ratio: where positive, ``delta_g2`` is at most this times ``sigma_s2 + sigma_r2``; 0 is off.
        blend: weight of the adaptive part; the prior has the rest.
        prior: as for :class:`gac.laws.gac.GacLaw`; the published schedule by default.
    """

    ranges: ClassVar[dict[str, Range]] = {
        "average": Range(unknown=True),
        "last_refresh": Range(low=-math.inf, whole=True),  # -inf: never
    }

    def __init__(
        self,
        ema_beta: float = 0.99,
        mu_min: float = 0.05,
        mu_max: float = 0.9,
        mu_update_freq: int = 10,
        alpha_static: float = 0.5,
        init_mu: float = 0.5,
        mu_change_cap: float = 0.01,
        delta_g2_cap_ratio: float = 0.0,
        blend: float = 0.5,
        prior: Schedule | Mapping | float | None = DEFAULT_PRIOR,
    ) -> None:
        super().__init__(start=unit_interval("init_mu", init_mu))  # by its own name in errors
        self.ema_beta = unit_interval("ema_beta", ema_beta)
        self.mu_min, self.mu_max = bounds(mu_min, mu_max, init_mu=init_mu)
        self.mu_update_freq = whole("mu_update_freq", mu_update_freq, 1)
        self.alpha = unit_interval("alpha_static", alpha_static)
        self.cap = unit_interval("mu_change_cap", mu_change_cap)
        self.delta_g2_cap_ratio = number("delta_g2_cap_ratio", delta_g2_cap_ratio, 0.0, 1e30)
        self.blend = unit_interval("blend", blend)
        self.prior = as_schedule(prior)
        self.state["average"] = torch.full((3,), float("nan"), dtype=torch.float64)  # sigma_s2, sigma_r2, delta_g2
        self.state["last_refresh"] = torch.tensor(float("-inf"), dtype=torch.float64)

    def update(self, statistics: Statistics | None, step: Step) -> Tensor:
        mu = self.mu
        healthy = torch.ones((), dtype=torch.bool, device=mu.device)
        if statistics is not None:
            healthy = statistics.nonfinite == 0
            self._refresh(statistics, healthy, step.number)
        sigma_s2, sigma_r2, delta_g2 = self.state["average"].clamp(min=0.0).unbind()
        if self.delta_g2_cap_ratio > 0:
            delta_g2 = torch.minimum(delta_g2, self.delta_g2_cap_ratio * (sigma_s2 + sigma_r2 + EPSILON))
        raw = closed_form(
            sigma_s2, sigma_r2, delta_g2, self.alpha if step.alpha is None else step.alpha, epsilon=EPSILON
        )
        self.record("raw", raw)
        adaptive = self.ema_beta * mu + (1 - self.ema_beta) * torch.where(torch.isfinite(raw), raw, mu)
        target = adaptive.clamp(self.mu_min, self.mu_max)
        prior = self.leaning(step, self.prior if self.blend < 1 else None, step.number)
        if prior is not None:
            target = (1 - self.blend) * prior + self.blend * target
        moved = (mu + (target - mu).clamp(-self.cap, self.cap)).clamp(self.mu_min, self.mu_max)
        self.record("mu", torch.where(healthy, moved, mu))
        return self.mu

    def _refresh(self, statistics: Statistics, healthy: Tensor, step: int) -> None:
        value = torch.stack([statistics.sigma_s2, statistics.sigma_r2, statistics.delta_g2])
        due = healthy & (step - self.state["last_refresh"] >= self.mu_update_freq)
        use = torch.isfinite(value) & due
        average = self.state["average"]
        first = torch.isnan(average)
        blended = torch.where(first, value, self.ema_beta * average + (1 - self.ema_beta) * value)
        self.state["average"] = torch.where(use, blended, average)
        self.state["last_refresh"] = torch.where(use.any(), float(step), self.state["last_refresh"])

"""A law that measures its aim: how far demonstrations are to be followed, by what they were worth to the reward."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from gac.laws.averages import Averages
from gac.laws.base import Law, Step, bounds, momentum_of, noise_left, number, register, unit_interval
from gac.state import Range
from gac.statistics import Statistics, SuccessiveDifferences
from gac.statistics.trust import probability_right

MEASURED = ("size_s", "size_r", "own_s", "own_r", "dot", "worth_ss", "worth_sr", "worth_rs", "worth_rr")
"""What is averaged: squared lengths, squared signals, inner product within a step; the four products over steps."""

_WITHIN = 5
"""The first so many are of one step; products bring standard errors of their own."""

LATE = 276.0
"""Half-life, in steps, of the average that a branch's unit does not fall below: four times the long averages'."""

ALIVE = 7.0
"""Half-life, in steps, of the share of steps in which a branch's gradient was not exactly 0."""


@register("aim")
class AimLaw(Law):
    """Weights of two normalised gradients by their signal, aimed by what SFT's steps were worth to the reward.

    ``docs/laws.md`` derives it. With averages over steps of squared lengths ``E|G_b|^2``, signals ``|g_b|^2`` and the
    inner product ``c = <g_s, g_r>``, and ``k = (1-m)/(1+m)`` of the optimizer's momentum ``m``:

    1. Units. ``u_b^2 = |g_b|^2 + k sigma_b2`` is the squared length of branch b's part in what the optimizer moves by;
       from here on gradients are in units of it: ``f_b = |g_b|^2 / u_b^2`` is signal, ``q = c / (u_s u_r)``.
    2. Aim. ``alpha`` (at most ``alpha_max``) times ``P``, the probability that the demonstrations point the way of the
       reward, given the measured ``c`` and its standard error.
    3. Weights. ``x G_s/u_s + y G_r/u_r`` nearest to ``alpha g_s/u_s + (1-alpha) g_r/u_r``:
       ``[[1, q], [q, 1]] (x, y) = (alpha f_s + (1-alpha) q, alpha q + (1-alpha) f_r)``, not below 0. A branch that
       is all noise gets nothing.
    4. ``share = x / (x + y)`` moves by at most ``cap``, stays within its bounds, and
       ``mu = (share/w_s) / (share/w_s + (1-share)/w_r)``, ``w_b`` the larger of ``u_b`` and its own average of late: a
       loss in another unit is weighted by it, a gradient that vanishes is not blown up.

    The products over steps are measured where the estimator is ``exact`` or ``sketch``; otherwise signals and inner
    product are those within a step. ``prior`` of a step is not looked at.

    Args:
        alpha: ``"worth"``, or a number in [0, 1] that pins it.
        alpha_max: of ``"worth"``, where demonstrations are surely right.
        trust: probability that they are, before anything is measured.
        spread: of the cosine between the true gradients of demonstrations that are right (root mean square).
        mu: pins mu; everything is measured still.
        cap: largest change of the share in a step, once ``n`` measurements make it more than ``1/n``.
        share_min, share_max: bounds of SFT's share in what the optimizer moves by.
        mu_min, mu_max: bounds of mu, which has both losses' units in it.
        start: the first mu.
        momentum: of the optimizer; as for law ``gac``.
    """

    measures_worth: ClassVar[bool] = True
    shows: ClassVar[tuple[str, ...]] = ("alpha", "alpha_se", "share", "trust")
    ranges: ClassVar[dict[str, Range]] = {
        **Averages.RANGES,
        "alpha": Range(0.0, 1.0),
        "alpha_se": Range(0.0, math.inf, unknown=True),
        "share": Range(0.0, 1.0),
        "trust": Range(0.0, 1.0),
        "alive": Range(0.0, 1.0),
        "count": Range(0.0, whole=True),
        "late": Range(0.0),
        "lengths": Range(0.0, unknown=True),
        "wanted": Range(0.0, 1.0, unknown=True),
        **{f"differences.{name}": kind for name, kind in SuccessiveDifferences.RANGES.items()},
    }

    def __init__(
        self,
        alpha: float | str = "worth",
        alpha_max: float = 0.5,
        trust: float = 0.7,
        spread: float = 0.2,
        mu: float | None = None,
        cap: float = 0.02,
        share_min: float = 0.05,
        share_max: float = 0.95,
        mu_min: float = 0.001,
        mu_max: float = 0.999,
        start: float = 0.5,
        momentum: float | None = None,
    ) -> None:
        self.mu_min, self.mu_max = bounds(mu_min, mu_max, start=start)
        self.pinned = None if mu is None else unit_interval("mu", mu)
        super().__init__(start if self.pinned is None else self.pinned)
        self._own_momentum = momentum is None
        self.momentum = 0.0 if momentum is None else number("momentum", momentum, 0.0, 0.9999)
        if isinstance(alpha, str) and alpha != "worth":
            raise ValueError(f"alpha must be a number in [0, 1] or 'worth', got {alpha!r}")
        self.alpha = None if isinstance(alpha, str) else unit_interval("alpha", alpha)
        self.alpha_max = unit_interval("alpha_max", alpha_max)
        self.trust = number("trust", trust, 1e-6, 1 - 1e-6)
        self.spread = number("spread", spread, 1e-6, 1.0)
        self.cap = unit_interval("cap", cap)
        self.share_min, self.share_max = unit_interval("share_min", share_min), unit_interval("share_max", share_max)
        if self.share_min > self.share_max:
            raise ValueError(f"share_min must not exceed share_max, got {share_min} > {share_max}")
        self.record("alpha", self.alpha_max * self.trust if self.alpha is None else self.alpha)
        self.record("alpha_se", float("nan"))
        self.record("share", min(max(0.5, self.share_min), self.share_max))
        self.record("trust", self.trust)
        self.record("count", 0.0)
        self.record("wanted", float("nan"))  # share
        self.state["lengths"] = torch.full((2,), float("nan"), dtype=torch.float64)
        self.state["late"] = torch.zeros(2, 2, dtype=torch.float64)  # of w*length and of w, for SFT and RL
        self.state["alive"] = torch.ones(2, dtype=torch.float64)
        self._averages = Averages(self.state, len(MEASURED))
        self._differences = SuccessiveDifferences(_WITHIN, torch.device("cpu"), torch.float64)
        self._keep_differences()

    def follow(self, optimizer: torch.optim.Optimizer) -> None:
        """Takes the optimizer's momentum, unless the option was given."""
        if self._own_momentum:
            self.momentum = momentum_of(optimizer)

    def to(self, device: torch.device) -> None:
        super().to(device)
        self._averages.to(self.mu)
        self._differences = SuccessiveDifferences(_WITHIN, device, self.mu.dtype)

    def _keep_differences(self) -> None:
        self.state.update({f"differences.{name}": value for name, value in self._differences.state.items()})

    def update(self, statistics: Statistics | None, step: Step) -> Tensor:
        self.state["waiting"] = self.state["waiting"] + 1
        healthy = None
        if statistics is not None:
            healthy = self.beside(statistics.nonfinite) == 0
            self._take(statistics, step, healthy)
        if statistics is not None or step.alpha is not None:
            self._estimate(step, healthy)
        wanted, share, count = self.state["wanted"], self.state["share"], self.state["count"]
        news = torch.where(count > 0, torch.exp2(-count / 69) / count, 0.0)
        reach = self.cap + news * (healthy is not None)
        moved = share + (wanted - share).clamp(-reach, reach)
        known = torch.isfinite(wanted) if healthy is None else torch.isfinite(wanted) & healthy
        self.record("share", torch.where(known, moved, share).clamp(self.share_min, self.share_max))
        if self.pinned is None:
            mu = self._mixed(self.state["share"]).clamp(self.mu_min, self.mu_max)
            self.record("mu", torch.where(known & torch.isfinite(mu), mu, self.mu))
        return self.mu

    def _take(self, statistics: Statistics, step: Step, healthy: Tensor) -> None:
        """Takes a step's measurements into the averages."""
        names = ("norm_s2", "norm_r2", "sigma_s2", "sigma_r2", "n_s", "n_r", "dot")
        told = torch.stack([getattr(statistics, name) for name in names]).to(self.mu)
        size, noise, n, dot = told.split([2, 2, 2, 1])
        there = (n > 0) & torch.isfinite(size) & healthy
        heard = size > 0
        keep = 0.5 ** (1 / ALIVE)
        alive = torch.lerp(heard.to(self.mu), self.state["alive"], keep)
        self.state["alive"] = torch.where(there, alive, self.state["alive"])
        self.record("count", self.state["count"] + there.any().to(self.mu))
        # a branch that is silent says nothing of what it is when it speaks
        s, r = torch.where(heard, 1.0, float("nan")).unbind()
        within = torch.cat([size, size - noise, dot]) * torch.stack([s, r, s, r, s * r])
        self._differences.state = {
            name: self.state[f"differences.{name}"] for name in ("last", "level", "average", "count")
        }
        errors = self._differences.update(within, healthy)
        self._keep_differences()
        if step.worth is None:
            nothing = self.mu.new_full((4,), float("nan"))
            values, errors = torch.cat([within, nothing]), torch.cat([errors, nothing])
        else:
            values = torch.cat([within, step.worth.values.to(self.mu) * torch.stack([s, s, r, r])])
            errors = torch.cat([errors, step.worth.errors.to(self.mu)])
        self._averages.take(self.state, values, errors, healthy)

    def _estimate(self, step: Step, healthy: Tensor | None) -> None:
        """Records the share that is wanted, aim, estimates and standard errors."""
        mean, error = self._averages.read(self.state)
        # standard errors by differences: each average moved by its own, either way
        moves = torch.diag_embed(torch.nan_to_num(error, 0.0, 0.0, 0.0))
        many = torch.cat([mean[None], mean + moves, mean - moves])
        share, lengths, alpha, trust = self._weigh(many, error, step)
        if healthy is not None:
            self._take_lengths(lengths[0], healthy)
        known = torch.isfinite(share[0])
        raw = self._mixed(share, lengths)
        self.record("wanted", share[0])
        self.state["lengths"] = lengths[0]
        self.record("alpha", torch.where(torch.isfinite(alpha[0]), alpha[0], self.state["alpha"]))
        self.record("alpha_se", torch.where(known, _half_spread(alpha), float("nan")))
        self.record("trust", torch.where(torch.isfinite(trust[0]), trust[0], self.state["trust"]))
        self.record("raw", raw[0])
        self.record("mu_se", torch.where(torch.isfinite(raw[0]), _half_spread(raw), float("nan")))

    def _take_lengths(self, lengths: Tensor, healthy: Tensor) -> None:
        """Takes the lengths of both branches into their averages of late."""
        use = torch.isfinite(lengths) & (lengths > 0) & healthy
        keep = 0.5 ** (1 / LATE)
        late = torch.lerp(torch.stack([lengths, torch.ones_like(lengths)]), self.state["late"], keep)
        self.state["late"] = torch.where(use, late, self.state["late"])

    def _mixed(self, share: Tensor, lengths: Tensor | None = None) -> Tensor:
        """mu that gives SFT this share; of gradients of these lengths ``[..., 2]``, else of the present ones."""
        total, weight = self.state["late"].unbind()
        lengths = self.state["lengths"] if lengths is None else lengths
        units = torch.maximum(lengths, torch.where(weight > 0, total / weight, 0.0))
        of_s, of_r = share * units[..., 1], (1 - share) * units[..., 0]
        return of_s / (of_s + of_r)

    def _weigh(self, many: Tensor, error: Tensor, step: Step) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Shares ``[B]``, lengths ``[B, 2]``, alphas and trusts ``[B]`` of so many sets ``[B, 9]`` of averages."""
        size, own, dot, ss, sr, rs, rr = many.split([2, 2, 1, 1, 1, 1, 1], dim=-1)
        _, own_se, dot_se, ss_se, sr_se, rs_se, rr_se = error.split([2, 2, 1, 1, 1, 1, 1], dim=-1)
        # products over steps where there are any; of the two inner products each shows one branch's noise, see docs
        signal = _first(torch.cat([ss, rr], dim=-1), own)
        signal_se = torch.where(torch.isfinite(ss + rr), torch.cat([ss_se, rr_se], dim=-1), own_se)
        inner = _first((rs + sr) / 2, dot).squeeze(-1)
        inner_se = torch.where(torch.isfinite(rs + sr), torch.hypot(rs_se, sr_se), dot_se).squeeze(-1)
        # what is sure of a signal says whether an aim can be judged; what is plausible of it, whether it is noise
        sure = (1 - torch.nan_to_num(signal_se / signal, 0.0).square()).clamp(min=0.0)
        sure = torch.minimum(signal.clamp(min=0.0) * sure, size)
        signal = torch.minimum(_above_zero(signal, signal_se), size)
        noise = noise_left(self.momentum)
        squared = signal + noise * (size - signal)
        lengths = squared.sqrt()
        trust = probability_right(inner, inner_se, self.spread * sure.prod(-1).sqrt(), self.trust)
        alpha = self._alpha(step, trust)
        alive = self.state["alive"]
        share_of_signal = torch.where(squared > 0, signal / squared, 0.0)
        most = share_of_signal.prod(-1).sqrt()
        q = (inner / lengths.prod(-1)).clamp(-most, most)
        q = torch.where(torch.isfinite(q), q, 0.0) * alive.prod()
        f_s, f_r = (share_of_signal * alive).unbind(-1)
        to_s, to_r = alpha * f_s + (1 - alpha) * q, alpha * q + (1 - alpha) * f_r
        x, y = (to_s - q * to_r).clamp(min=0.0), (to_r - q * to_s).clamp(min=0.0)
        return x / (x + y), lengths, alpha, trust

    def _alpha(self, step: Step, trust: Tensor) -> Tensor:
        if step.alpha is not None:
            return self.beside(step.alpha).expand_as(trust)
        return self.alpha_max * trust if self.alpha is None else torch.full_like(trust, self.alpha)


def _first(values: Tensor, otherwise: Tensor) -> Tensor:
    return torch.where(torch.isfinite(values), values, otherwise)


def _above_zero(values: Tensor, errors: Tensor) -> Tensor:
    """Expected truth of numbers that are measured with Gaussian errors and cannot be below 0, all others being alike.

    The mean of the normal distribution above 0: the value itself where it is sure, 0.8 of its error where it is 0.
    """
    t = values / errors
    log_ratio = -t.square() / 2 - math.log(2 * math.pi) / 2 - torch.special.log_ndtr(t)
    found = values + errors * log_ratio.exp()
    return torch.where(torch.isfinite(found), found, values).clamp(min=0.0)


def _half_spread(values: Tensor) -> Tensor:
    """Standard error of the first of ``[1 + 2n]`` values, the others made by moving ``n`` arguments up, then down."""
    up, down = values[1:].chunk(2)
    return ((up - down) / 2).nan_to_num(0.0).square().sum().sqrt()

"""The default law: smooth the measured statistics, then take the mu of least expected error, within guardrails."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from gac.laws.base import Law, Step, bounds, closed_form, momentum_of, noise_left, number, register, unit_interval
from gac.schedules import Schedule, as_schedule
from gac.state import MAX, Range
from gac.statistics import Statistics

KL_TARGET, KL_DECAY, HYSTERESIS = 0.02, 0.90, 0.10
ETA_UP, ETA_DOWN = 0.20, 0.30
ALPHA_MIN, ALPHA_MAX = 0.10, 0.95

SHORT, LONG = 7.0, 69.0
"""Half-lives, in steps, between which ``half_life="auto"`` chooses: about 20 steps, and the authors' decay of .99."""

UNKNOWN_WEIGHT = 0.5
"""Of the prior while ``prior_weight="se"`` has no standard error to go by: the authors' blend."""


@register("gac")
class GacLaw(Law):
    """Noise-aware mu with smoothing, an optional prior, bounded steps and bounds.

    Each update smooths the unbiased ``sigma_s2``, ``sigma_r2`` and ``delta_g2`` with a bias-corrected moving average,
    clamps them at 0 (after smoothing: clamping first would push ``delta_g2`` up), takes the closed form, blends it with
    the prior, limits the step and clips. A measurement's weight depends on its age alone. A number that was not
    measured (NaN) leaves its average as it was; a step with non-finite gradients changes nothing.

    **What the optimizer leaves of the noise.** An optimizer with momentum ``m`` (Adam's ``beta1``) moves by an average
    of gradients. That leaves ``k = (1-m)/(1+m)`` of the variance of noise, which is new in every step, and all of the
    error of a wrong ``mu``, which is the same in every step. So the closed form is the one with ``k*sigma_s2`` and
    ``k*sigma_r2``; below, the two stand for these.

    **How long to average.** A long average is calm, a short one follows. ``half_life="auto"`` keeps one of each, and
    every step says which was better: its unbiased statistics are independent of the steps before it, so that for the
    ``mu`` of an average over these, ``(mu-alpha)^2*delta_g2 + mu^2*sigma_s2 + (1-mu)^2*sigma_r2`` measures without bias
    the error that this ``mu`` makes now. With ``t``, the sum of the long average's errors minus the short one's, older
    steps discounted by the long half-life, over the root of the sum of the squared differences, the estimate is

        mu = long + (short - long) / (1 + exp(-2(t - 2)))

    half way where the short average has been better by two standard errors, and the long one where nothing tells.

    **How sure the estimate is.** An average with weights ``w_k`` (which sum to 1) of independent steps has the variance
    ``V = sum w_k^2 SE_k^2``; a step of unknown standard error counts with the average of the known ones. The closed
    form is ``alpha + ((1-alpha)*sigma_r2 - alpha*sigma_s2)/D`` with ``D = delta_g2 + sigma_s2 + sigma_r2``, the average
    of ``distance2``. Under Gaussian noise the three averages are independent, so to first order

        mu_se^2 = ((1-alpha)^2 V_r + alpha^2 V_s + (mu-alpha)^2 V_D) / D^2

    with ``delta_g2`` clamped in ``mu`` and ``D``. Where it is clamped, ``mu`` itself no longer moves with ``D``, yet
    the true ``delta_g2`` may be as large as its error: dropping the last term there would understate the error. With
    momentum, ``V_s`` and ``V_r`` of the statistics as measured and ``Q = delta_g2 + k*(sigma_s2 + sigma_r2)``,

        mu_se^2 = ((k-alpha + (1-k)*mu)^2 V_r + (alpha - (1-k)*mu)^2 V_s + (mu-alpha)^2 V_D) / Q^2

    ``mu_se`` measures sampling error alone: neither staleness of an average nor bias of the estimators is in it.

    ``alpha="kl"`` lets the target follow the policy's drift. The constants are the authors'; their update rule is not
    public, so this one is ours: with ``e = clip(KL/target - 1, -1, 1)`` of the smoothed KL (decay .9, target .02 nats a
    token), nothing moves while ``|e| <= .10``; above, ``alpha += .20*(e - .10)*(.95 - alpha)``, so that a drifting
    policy is pulled to the demonstrations; below, ``alpha -= .30*(-e - .10)*(alpha - .10)``. It is continuous, stays
    within [.10, .95] by construction and has the dead band as hysteresis: within it ``alpha`` keeps the value with
    which it came.

    Args:
        half_life: optimizer steps after which a measurement's weight has halved, or ``"auto"``: 7 or 69, by which of
            the two predicts better.
        alpha: weight of the SFT gradient in the target ``alpha*g_s + (1-alpha)*g_r``: a number in [0, 1], or ``"kl"``,
            which needs ``kl`` in every step and starts at .5.
        prior: what mu leans on: a number, a function of the step, ``dict(warmup, decay, peak, valley)``, or None.
        prior_weight: share of the prior in the blend: a number in [0, 1], or ``"se"`` for
            ``mu_se^2 / (mu_se^2 + prior_sd^2)``, which has the least expected error if the prior misses the best mu by
            ``prior_sd`` (root mean square); .5 while no standard error is known. Nothing without a prior.
        prior_sd: how far the prior may be off, for ``"se"``.
        cap: largest change of mu in one step once the averages have settled. Before that, a step that measured may add
            the share of its measurement, by as much as the average lacks of its full weight: 1 for the first
            measurement, at most ``1/n`` for the ``n``-th, 0 in the long run, and times the estimate's share in the
            blend where there is a prior. A branch that returns after an absence adds nothing again.
        mu_min, mu_max: bounds of mu.
        start: the first mu.
        momentum: of the optimizer, in [0, 0.9999]; None for that of the optimizer which :meth:`follow` tells, else 0.
    """

    ranges: ClassVar[dict[str, Range]] = {
        "alpha": Range(0.0, 1.0),
        "kl": Range(unknown=True),
        "sums": Range(low=((-MAX,), (0.0,))),  # of values, of weights
        "squares": Range(0.0, math.inf),  # of standard errors, which float32 may not hold
        "waiting": Range(0.0, whole=True),
        "unsettled": Range(0.0, 1.0),
        "mus": Range(-math.inf, math.inf, unknown=True),
        "evidence": Range((-MAX, 0.0), (MAX, math.inf)),
    }

    def __init__(
        self,
        half_life: float | str = "auto",
        alpha: float | str = 0.5,
        prior: Schedule | Mapping | float | None = None,
        prior_weight: float | str = "se",
        prior_sd: float = 0.2,
        cap: float = 0.02,
        mu_min: float = 0.05,
        mu_max: float = 0.95,
        start: float = 0.5,
        momentum: float | None = None,
    ) -> None:
        super().__init__(start)
        self._own_momentum = momentum is None  # nobody set it: the optimizer may
        self.momentum = 0.0 if momentum is None else number("momentum", momentum, 0.0, 0.9999)
        self.chooses = _is_word("half_life", half_life, "auto", "a number of steps")
        self.half_life = LONG if self.chooses else number("half_life", half_life, 1e-3, 1e9)
        self.follows_kl = _is_word("alpha", alpha, "kl")
        self.alpha = 0.5 if self.follows_kl else unit_interval("alpha", alpha)
        if self.follows_kl:
            self.needs = ("kl",)
            self.record("alpha", self.alpha)
            self.record("kl", float("nan"))
        self.prior = as_schedule(prior)
        follows_se = _is_word("prior_weight", prior_weight, "se")
        self.prior_weight = None if follows_se else unit_interval("prior_weight", prior_weight)
        self.prior_sd = number("prior_sd", prior_sd, 1e-6, 1e6)
        self.cap = unit_interval("cap", cap)
        self.mu_min, self.mu_max = bounds(mu_min, mu_max, start=start)
        # [averages, ...], the long one last; columns: sigma_s2, sigma_r2, delta_g2 (in "squares" distance2, which is
        # measured when delta_g2 is). With a step's weight w:
        self.rates = [math.log(2) / half_life for half_life in ((SHORT, LONG) if self.chooses else (self.half_life,))]
        self._rates = torch.tensor(self.rates, dtype=torch.float64).view(-1, 1, 1)
        keep = 2.0 ** (-1 / LONG)  # of the evidence, and of its squares, in a step
        self._kept = torch.tensor([keep, keep * keep], dtype=torch.float64)
        averages = len(self.rates)
        self.state["sums"] = torch.zeros(averages, 2, 3, dtype=torch.float64)  # of w*value and of w
        self.state["squares"] = torch.zeros(averages, 3, 3, dtype=torch.float64)  # w^2 SE^2; w^2 with known SE; w^2
        self.state["waiting"] = torch.zeros(3, dtype=torch.float64)  # updates since it was measured
        self.state["unsettled"] = torch.ones(3, dtype=torch.float64)  # what is left of 1 since its first measurement
        self._estimated_from: tuple[Tensor | None, float, float | None] = (None, 0.0, None)  # sums, noise, alpha
        if self.chooses:
            self.state["mus"] = torch.full((2,), float("nan"), dtype=torch.float64)  # of both averages
            self.state["evidence"] = torch.zeros(2, dtype=torch.float64)  # long minus short: sum, and sum of squares

    def follow(self, optimizer: torch.optim.Optimizer) -> None:
        """Takes the optimizer's momentum, unless the option was given."""
        if self._own_momentum:
            self.momentum = momentum_of(optimizer)

    @property
    def noise(self) -> float:
        """Share of a gradient's noise that is left in what the optimizer moves by: 1 without momentum."""
        return noise_left(self.momentum)

    def to(self, device: torch.device) -> None:
        super().to(device)
        self._rates, self._kept = self._rates.to(self.mu), self._kept.to(self.mu)

    def smoothed(self, average: int = -1) -> Tensor:
        """``[3]``: sigma_s2, sigma_r2, delta_g2, averaged and then clamped at 0; NaN before the first measurement.

        ``average=0`` for the short one of two.
        """
        return self._smoothed()[average]

    def standard_errors(self, average: int = -1) -> Tensor:
        """``[3]``: of the averages of sigma_s2, sigma_r2 and distance2; NaN where unknown."""
        return self._standard_errors()[average]

    def _smoothed(self) -> Tensor:
        total, weight = self.state["sums"].unbind(1)
        return (total / weight).clamp(min=0.0)

    def _standard_errors(self) -> Tensor:
        known, weights, all_weights = self.state["squares"].unbind(1)
        return (known * all_weights / weights).sqrt() / self.state["sums"][:, 1]

    def follows(self) -> Tensor:
        """Weight of the short average, 0-dim."""
        total, squares = self.state["evidence"].unbind()
        return torch.sigmoid(2 * (torch.where(squares > 0, total / squares.sqrt(), 0.0) - 2))

    def update(self, statistics: Statistics | None, step: Step) -> Tensor:
        mu = self.mu
        healthy, news = None, 0.0
        wanted = self._alpha(step)
        self.state["waiting"] = self.state["waiting"] + 1
        if statistics is None and self._is_estimated(wanted):
            raw, error = self.state["raw"], self.state["mu_se"]
        else:
            alpha = self.beside(wanted)
            if statistics is not None:
                healthy = statistics.nonfinite == 0
                news = self._smooth(statistics, healthy, alpha)
            raw, error = self._estimate(alpha)
            self._estimated_from = (self.state["sums"], self.noise, wanted if isinstance(wanted, float) else None)
        known = torch.isfinite(raw)
        prior = self.leaning(step, self.prior, step.number + 1)  # of the step to come
        if prior is None:
            target = torch.where(known, raw, mu)
        else:
            weight = self._weight_of_prior(error)
            target = torch.where(known, torch.lerp(raw, prior, weight), prior)
            news = torch.where(known, news * (1 - weight), 0.0)  # a prior alone has no news
        reach = self.cap + news
        moved = (mu + (target - mu).clamp(-reach, reach)).clamp(self.mu_min, self.mu_max)
        self.record("mu", moved if healthy is None else torch.where(healthy, moved, mu))
        return self.mu

    def _is_estimated(self, alpha: float | Tensor) -> bool:
        """Whether the recorded estimate is what :meth:`_estimate` would give, which is most of a step without news.

        An alpha that is a tensor is not looked at on the host, and counts as another each time. Averages are never
        changed in place, so the same tensor is the same numbers.
        """
        sums, noise, known = self._estimated_from
        return sums is self.state["sums"] and noise == self.noise and isinstance(alpha, float) and alpha == known

    def _estimate(self, alpha: Tensor) -> tuple[Tensor, Tensor]:
        """The estimate of mu and its standard error, recorded; NaN where unknown."""
        noise = self.noise
        sigma_s2, sigma_r2, delta_g2 = self._smoothed().unbind(1)
        raws = closed_form(noise * sigma_s2, noise * sigma_r2, delta_g2, alpha)
        error_of_mean = delta_g2 + noise * (sigma_s2 + sigma_r2)
        # of the three averages on mu, times that
        levers = torch.stack([alpha - (1 - noise) * raws, alpha - noise - (1 - noise) * raws, raws - alpha], dim=1)
        errors = torch.linalg.vector_norm(levers * (self._standard_errors() / error_of_mean[:, None]), dim=1)
        raw, error = raws[-1], errors[-1]
        if self.chooses:
            self.state["mus"] = raws
            follows = self.follows()
            # both averages hold the newest steps, so that their errors go together; infinite ones are equal
            error = torch.where(error == errors[0], error, torch.lerp(error, errors[0], follows))
            raw = torch.lerp(raw, raws[0], follows)
        self.record("raw", raw)
        self.record("mu_se", error)
        return raw, error

    def _weight_of_prior(self, error: Tensor) -> Tensor:
        if self.prior_weight is not None:
            return self.beside(self.prior_weight)
        weight = 1 / (1 + (self.prior_sd / error).square())  # 0 at error 0, 1 at an infinite one
        return torch.where(torch.isnan(weight), UNKNOWN_WEIGHT, weight)

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

    def _smooth(self, statistics: Statistics, healthy: Tensor, alpha: Tensor) -> Tensor:
        """Takes the measurements into the averages; returns what they add to the cap, 0-dim."""
        names = ("sigma_s2", "sigma_r2", "delta_g2", "sigma_s2_se", "sigma_r2_se", "distance2_se")
        told = torch.stack([getattr(statistics, name) for name in names]).view(2, 3)
        finite = torch.isfinite(told)
        use, sure = finite[0] & healthy, finite[1]
        value, error = told.unbind()
        if self.chooses:
            self._compare(value, use, alpha)
        one = torch.ones_like(value)
        keep, new = torch.exp(-self._rates * self.state["waiting"]), -torch.expm1(-self._rates)
        sums = torch.addcmul(new * torch.stack([value, one]), keep, self.state["sums"])
        known = torch.stack([torch.where(sure, error.square(), 0.0), sure.to(one), one])
        squares = torch.addcmul(new.square() * known, keep.square(), self.state["squares"])
        unsettled = self.state["unsettled"]
        unsettled = torch.where(self.state["sums"][-1, 1] == 0, unsettled, keep[-1, 0] * unsettled)
        self.state["sums"] = torch.where(use, sums, self.state["sums"])
        self.state["squares"] = torch.where(use, squares, self.state["squares"])
        self.state["waiting"] = torch.where(use, 0.0, self.state["waiting"])
        self.state["unsettled"] = torch.where(use, unsettled, self.state["unsettled"])
        return torch.where(use, unsettled * (new[-1, 0] / sums[-1, 1]), 0.0).max()

    def _compare(self, value: Tensor, use: Tensor, alpha: Tensor) -> None:
        """Measures in this step the errors of the mu that both averages of the steps before gave."""
        delta_g2, sigma_s2, sigma_r2 = value[2], self.noise * value[0], self.noise * value[1]
        short, long = self.state["mus"].unbind()
        apart = long - short
        apart = torch.where(apart.abs() > 1e-9, apart, 0.0)  # what rounding makes of equal averages is no evidence
        # the error is Q*mu^2 - 2*(alpha*delta_g2 + sigma_r2)*mu and a constant, Q the sum of the three
        total = delta_g2 + sigma_s2 + sigma_r2
        difference = apart * ((long + short) * total - 2 * (alpha * delta_g2 + sigma_r2))
        known = use.all() & torch.isfinite(difference)
        keep = torch.pow(self._kept, self.state["waiting"].max())
        evidence = keep * self.state["evidence"] + torch.stack([difference, difference.square()])
        self.state["evidence"] = torch.where(known, evidence, self.state["evidence"])


def _is_word(name: str, value: float | str, word: str, number: str = "a number in [0, 1]") -> bool:
    """Whether an option that is a number or one word is that word."""
    if isinstance(value, str) and value != word:
        raise ValueError(f"{name} must be {number} or {word!r}, got {value!r}")
    return value == word

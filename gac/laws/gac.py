"""The default law: smooth the measured statistics, then take the mu of least expected error, within guardrails."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from gac.laws.base import Law, Step, bounds, closed_form, number, register, unit_interval
from gac.schedules import Schedule, as_schedule
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
    the true ``delta_g2`` may be as large as its error: dropping the last term there would understate the error.
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
    """

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
    ) -> None:
        super().__init__(start)
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
        # columns: sigma_s2, sigma_r2, delta_g2; in "squares" the third is distance2, measured when delta_g2 is
        self.state["sums"] = torch.zeros(2, 3, dtype=torch.float64)  # of w*value and of w, with a step's weight w
        self.state["squares"] = torch.zeros(3, 3, dtype=torch.float64)  # of w^2 SE^2; of w^2 where SE is known; of w^2
        self.state["waiting"] = torch.zeros(3, dtype=torch.float64)  # updates since it was measured
        self.state["unsettled"] = torch.ones(3, dtype=torch.float64)  # what is left of 1 since its first measurement
        if self.chooses:
            self.state["short_sums"] = self.state["sums"].clone()
            self.state["short_squares"] = self.state["squares"].clone()
            self.state["mus"] = torch.full((2,), float("nan"), dtype=torch.float64)  # of both averages: short, long
            self.state["evidence"] = torch.zeros(2, dtype=torch.float64)  # long minus short: sum, and sum of squares

    def smoothed(self, prefix: str = "") -> Tensor:
        """``[3]``: sigma_s2, sigma_r2, delta_g2, averaged and then clamped at 0; NaN before the first measurement.

        ``prefix="short_"`` for the short one of two averages.
        """
        total, weight = self.state[f"{prefix}sums"].unbind()
        return (total / weight).clamp(min=0.0)

    def standard_errors(self, prefix: str = "") -> Tensor:
        """``[3]``: of the averages of sigma_s2, sigma_r2 and distance2; NaN where unknown."""
        known, weights, all_weights = self.state[f"{prefix}squares"].unbind()
        return (known * all_weights / weights).sqrt() / self.state[f"{prefix}sums"][1]

    def follows(self) -> Tensor:
        """Weight of the short average, 0-dim."""
        total, squares = self.state["evidence"].unbind()
        return torch.sigmoid(2 * (torch.where(squares > 0, total / squares.sqrt(), 0.0) - 2))

    def update(self, statistics: Statistics | None, step: Step) -> Tensor:
        mu = self.mu
        healthy, news = None, 0.0
        alpha = self.beside(self._alpha(step))
        self.state["waiting"] = self.state["waiting"] + 1
        if statistics is not None:
            healthy = statistics.nonfinite == 0
            news = self._smooth(statistics, healthy, alpha)

        raw, error = self._estimate(alpha)
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

    def _estimate(self, alpha: Tensor) -> tuple[Tensor, Tensor]:
        """The estimate of mu and its standard error, recorded; NaN where unknown."""
        raw, error = self._of_average("", alpha)
        if self.chooses:
            short, short_error = self._of_average("short_", alpha)
            self.state["mus"] = torch.stack([short, raw])
            follows = self.follows()
            # both averages hold the newest steps, so that their errors go together; infinite ones are equal
            error = torch.where(error == short_error, error, torch.lerp(error, short_error, follows))
            raw = torch.lerp(raw, short, follows)
        self.record("raw", raw)
        self.record("mu_se", error)
        return raw, error

    def _of_average(self, prefix: str, alpha: Tensor) -> tuple[Tensor, Tensor]:
        """The closed form of an average and its standard error."""
        smoothed = self.smoothed(prefix)
        raw = closed_form(*smoothed.unbind(), alpha)
        levers = torch.stack([alpha, 1 - alpha, raw - alpha])  # of the three averages on mu, times D
        return raw, torch.linalg.vector_norm(levers * (self.standard_errors(prefix) / smoothed.sum()))

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
        value = torch.stack([statistics.sigma_s2, statistics.sigma_r2, statistics.delta_g2])
        error = torch.stack([statistics.sigma_s2_se, statistics.sigma_r2_se, statistics.distance2_se])
        use = torch.isfinite(value) & healthy
        if self.chooses:
            self._compare(value, use.all(), alpha)
            self._average("short_", SHORT, value, error, use)
        first = self.state["sums"][1] == 0
        keep, new = self._average("", self.half_life, value, error, use)
        unsettled = torch.where(first, self.state["unsettled"], keep * self.state["unsettled"])
        self.state["waiting"] = torch.where(use, 0.0, self.state["waiting"])
        self.state["unsettled"] = torch.where(use, unsettled, self.state["unsettled"])
        return torch.where(use, unsettled * (new / self.state["sums"][1]), 0.0).max()

    def _average(
        self, prefix: str, half_life: float, value: Tensor, error: Tensor, use: Tensor
    ) -> tuple[Tensor, float]:
        """One average, where ``use`` says so; returns what is kept of the earlier weights, and the new one."""
        sure = torch.isfinite(error)
        one = torch.ones_like(value)
        rate = math.log(2) / half_life
        keep, new = torch.exp(-rate * self.state["waiting"]), -math.expm1(-rate)
        sums = keep * self.state[f"{prefix}sums"] + new * torch.stack([value, one])
        variance = torch.where(sure, error.square(), 0.0)
        added = new**2 * torch.stack([variance, sure.to(one), one])
        squares = keep.square() * self.state[f"{prefix}squares"] + added
        self.state[f"{prefix}sums"] = torch.where(use, sums, self.state[f"{prefix}sums"])
        self.state[f"{prefix}squares"] = torch.where(use, squares, self.state[f"{prefix}squares"])
        return keep, new

    def _compare(self, value: Tensor, use: Tensor, alpha: Tensor) -> None:
        """Measures in this step the errors of the mu that both averages of the steps before gave."""
        sigma_s2, sigma_r2, delta_g2 = value.unbind()
        mu = self.state["mus"]
        errors = (mu - alpha).square() * delta_g2 + mu.square() * sigma_s2 + (1 - mu).square() * sigma_r2
        short, long = errors.unbind()
        difference = long - short
        # what rounding makes of equal averages is no evidence
        difference = torch.where(difference.abs() > 1e-6 * errors.abs().max(), difference, 0.0)
        keep = 2.0 ** (-1 / LONG)
        total, squares = self.state["evidence"].unbind()
        evidence = torch.stack([keep * total + difference, keep**2 * squares + difference.square()])
        self.state["evidence"] = torch.where(use & torch.isfinite(long - short), evidence, self.state["evidence"])


def _is_word(name: str, value: float | str, word: str, number: str = "a number in [0, 1]") -> bool:
    """Whether an option that is a number or one word is that word."""
    if isinstance(value, str) and value != word:
        raise ValueError(f"{name} must be {number} or {word!r}, got {value!r}")
    return value == word

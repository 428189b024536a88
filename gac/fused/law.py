"""Law ``gac`` on Python floats; :class:`gac.laws.gac.GacLaw` is the reference, and says why each line is as it is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from math import isfinite

from torch import Tensor

from gac.fused.arithmetic import NAN, clamp, divide, length, lerp, root, sigmoid
from gac.fused.state import Numbers
from gac.laws.base import Step
from gac.laws.gac import (
    ALPHA_MAX,
    ALPHA_MIN,
    ETA_DOWN,
    ETA_UP,
    HYSTERESIS,
    KL_DECAY,
    KL_TARGET,
    LONG,
    UNKNOWN_WEIGHT,
    GacLaw,
)

_VALUES = ("sigma_s2", "sigma_r2", "delta_g2")
_ERRORS = ("sigma_s2_se", "sigma_r2_se", "distance2_se")
_EACH = (0, 1, 2)


def update(law: GacLaw, state: Numbers, statistics: Mapping[str, float] | None, step: Step) -> Numbers:
    """The state after a step, whose ``mu`` is that of the next one.

    Args:
        law: its options.
        state: before the step, as :func:`gac.fused.state.numbers_of` reads it; left as it is.
        statistics: of the step, by the names of :class:`gac.Statistics`; None where it measured none.
        step: what the law is told of it besides; tensors are read.
    """
    new = dict(state)
    alpha = _alpha(law, new, step)
    new["waiting"] = [updates + 1 for updates in state["waiting"]]
    news, healthy = 0.0, True
    if statistics is not None:
        healthy = statistics["nonfinite"] == 0
        news = _smooth(law, new, statistics, healthy, alpha)
    raw, error = _estimate(law, new, alpha)
    new["raw"], new["mu_se"] = raw, error
    mu = state["mu"]
    prior = new["prior"] = _prior(law, step, mu)
    known = isfinite(raw)
    target = raw if known else mu
    if prior == prior:
        weight = _weight_of_prior(law, error)
        target = lerp(raw, prior, weight) if known else prior
        news = news * (1 - weight) if known else 0.0
    if healthy:
        reach = law.cap + news
        new["mu"] = clamp(mu + clamp(target - mu, -reach, reach), law.mu_min, law.mu_max)
    return new


def coast(law: GacLaw, state: Numbers, steps: int) -> Numbers:
    """The state after so many steps without statistics, for a law that is told nothing in them and has no prior."""
    waiting = [updates + steps for updates in state["waiting"]]
    mu, target = state["mu"], target_of(state)
    return state | {"mu": towards(law, mu, target, steps), "waiting": waiting}


def target_of(state: Numbers) -> float:
    """What mu goes towards without a prior: the estimate where there is one."""
    return state["raw"] if isfinite(state["raw"]) else state["mu"]


def towards(law: GacLaw, mu: float, target: float, steps: int = 1) -> float:
    """``mu`` after so many steps towards ``target``."""
    for _ in range(steps):
        moved = clamp(mu + clamp(target - mu, -law.cap, law.cap), law.mu_min, law.mu_max)
        if moved == mu:
            break
        mu = moved
    return mu


def _number(value: float | Tensor) -> float:
    return float(value)


def _prior(law: GacLaw, step: Step, mu: float) -> float:
    """What mu leans on; NaN where there is nothing."""
    prior = step.prior
    if prior is None and law.prior is not None:
        prior = law.prior(step.number + 1)
    if prior is None:
        return NAN
    if isinstance(prior, Tensor):
        prior = float(prior)
        return clamp(prior, 0.0, 1.0) if isfinite(prior) else mu
    return float(prior)


def _weight_of_prior(law: GacLaw, error: float) -> float:
    if law.prior_weight is not None:
        return law.prior_weight
    ratio = divide(law.prior_sd, error)
    weight = 1 / (1 + ratio * ratio)
    return weight if weight == weight else UNKNOWN_WEIGHT


def _alpha(law: GacLaw, new: Numbers, step: Step) -> float:
    """The target's weight in this step; where it follows KL, ``new`` gets what it has become."""
    if step.alpha is not None:
        return _number(step.alpha)
    if not law.follows_kl:
        return law.alpha
    assert step.kl is not None  # the controller has asked for it
    kl, alpha, told = new["kl"], new["alpha"], _number(step.kl)
    if isfinite(told):
        kl = KL_DECAY * kl + (1 - KL_DECAY) * told if isfinite(kl) else told
    error = clamp(kl / KL_TARGET - 1, -1.0, 1.0)
    up = ETA_UP * clamp(error - HYSTERESIS, 0.0) * (ALPHA_MAX - alpha)
    down = ETA_DOWN * clamp(-error - HYSTERESIS, 0.0) * (alpha - ALPHA_MIN)
    new["kl"] = kl
    if isfinite(kl):
        new["alpha"] = alpha + up - down
    return new["alpha"]


def _smooth(law: GacLaw, new: Numbers, statistics: Mapping[str, float], healthy: bool, alpha: float) -> float:
    """Takes the measurements into the averages; returns what they add to the cap."""
    value = [statistics[name] for name in _VALUES]
    error = [statistics[name] for name in _ERRORS]
    use = [healthy and isfinite(x) for x in value]
    if law.chooses and all(use):
        _compare(law, new, value, alpha)
    waiting, unsettled = new["waiting"], list(new["unsettled"])
    sums = [[list(row) for row in average] for average in new["sums"]]
    squares = [[list(row) for row in average] for average in new["squares"]]
    news = 0.0
    for k in _EACH:
        if not use[k]:
            continue
        first = sums[-1][1][k] == 0
        sure = isfinite(error[k])
        squared = error[k] * error[k] if sure else 0.0
        keep = share = 0.0
        for rate, (total, weight), (known, sure_weights, weights) in zip(law.rates, sums, squares, strict=True):
            keep, share = math.exp(-rate * waiting[k]), -math.expm1(-rate)
            total[k] = share * value[k] + keep * total[k]
            weight[k] = share + keep * weight[k]
            share2, keep2 = share * share, keep * keep
            known[k] = share2 * squared + keep2 * known[k]
            sure_weights[k] = (share2 if sure else 0.0) + keep2 * sure_weights[k]
            weights[k] = share2 + keep2 * weights[k]
        if not first:
            unsettled[k] *= keep
        news = max(news, unsettled[k] * divide(share, sums[-1][1][k]))
    new["waiting"] = [0.0 if used else updates for used, updates in zip(use, waiting, strict=True)]
    new["sums"], new["squares"], new["unsettled"] = sums, squares, unsettled
    return news


def _compare(law: GacLaw, new: Numbers, value: list[float], alpha: float) -> None:
    """Measures in this step the errors of the mu that both averages of the steps before gave."""
    delta_g2, sigma_s2, sigma_r2 = value[2], law.noise * value[0], law.noise * value[1]
    short, long = new["mus"]
    apart = long - short
    if not abs(apart) > 1e-9:
        apart = 0.0
    total = delta_g2 + sigma_s2 + sigma_r2
    difference = apart * ((long + short) * total - 2 * (alpha * delta_g2 + sigma_r2))
    if isfinite(difference):
        keep = 2.0 ** (-max(new["waiting"]) / LONG)
        evidence, squares = new["evidence"]
        new["evidence"] = [keep * evidence + difference, keep * keep * squares + difference * difference]


def _estimate(law: GacLaw, new: Numbers, alpha: float) -> tuple[float, float]:
    """The estimate of mu and its standard error; NaN where unknown."""
    noise = law.noise
    raws, errors = [], []
    for (total, weight), (known, sure_weights, weights) in zip(new["sums"], new["squares"], strict=True):
        sigma_s2, sigma_r2, delta_g2 = (clamp(divide(total[k], weight[k]), 0.0) for k in _EACH)
        error = [divide(root(divide(known[k] * weights[k], sure_weights[k])), weight[k]) for k in _EACH]
        whole = delta_g2 + noise * (sigma_s2 + sigma_r2)
        raw = divide(alpha * delta_g2 + noise * sigma_r2, delta_g2 + noise * sigma_s2 + noise * sigma_r2)
        levers = (alpha - (1 - noise) * raw, alpha - noise - (1 - noise) * raw, raw - alpha)
        errors.append(length(lever * divide(e, whole) for lever, e in zip(levers, error, strict=True)))
        raws.append(raw)
    raw, error_of_mu = raws[-1], errors[-1]
    if law.chooses:
        new["mus"] = raws
        evidence, squares = new["evidence"]
        follows = sigmoid(2 * ((evidence / math.sqrt(squares) if squares > 0 else 0.0) - 2))
        if error_of_mu != errors[0]:
            error_of_mu = lerp(error_of_mu, errors[0], follows)
        raw = lerp(raw, raws[0], follows)
    return raw, error_of_mu

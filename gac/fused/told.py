"""What the programs that end steps are told of a law and of a step beside its sums."""

from __future__ import annotations

import math
from typing import Any

from gac.fused.arithmetic import NAN
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
from gac.statistics.uncertainty import SURPRISE
from gac_kernels.step_vector import OPTIONS


def told_of(law: GacLaw, step: Step) -> dict[str, Any]:
    """``alpha``, or ``kl`` where that follows it, and the ``prior`` where there is one: numbers, or tensors as told."""
    if law.follows_kl and step.alpha is None:
        assert step.kl is not None  # the controller has asked for it
        told: dict[str, Any] = {"kl": step.kl}
    else:
        told = {"alpha": law.alpha if step.alpha is None else step.alpha}
    prior = step.prior
    if prior is None and law.prior is not None:
        prior = law.prior(step.number + 1)  # of the step to come
    if prior is not None:
        told["prior"] = prior
    return told


def changing(law: GacLaw) -> tuple[float | None, ...]:
    """What :func:`options` depends on; an optimizer may change the momentum in any step."""
    return (law.cap, law.mu_min, law.mu_max, law.momentum, law.prior_weight, law.prior_sd, *law.rates)


def options(law: GacLaw) -> list[float]:
    """The law's options, as :data:`gac_kernels.step_vector.OPTIONS` has them."""
    found = {
        "cap": law.cap,
        "mu_min": law.mu_min,
        "mu_max": law.mu_max,
        "noise": law.noise,
        "forget": math.log(2) / LONG,
        "prior_weight": NAN if law.prior_weight is None else law.prior_weight,
        "prior_sd": law.prior_sd,
        "unknown_weight": UNKNOWN_WEIGHT,
        "kl_target": KL_TARGET,
        "kl_decay": KL_DECAY,
        "hysteresis": HYSTERESIS,
        "eta_up": ETA_UP,
        "eta_down": ETA_DOWN,
        "alpha_min": ALPHA_MIN,
        "alpha_max": ALPHA_MAX,
        "surprise": SURPRISE * math.sqrt(2),
        "rate_0": law.rates[0],
        "share_0": -math.expm1(-law.rates[0]),
        "rate_1": law.rates[-1],
        "share_1": -math.expm1(-law.rates[-1]),
    }
    return [found[name] for name in OPTIONS]

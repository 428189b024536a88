"""What is compared: each method with its published constants and the settings that tuning tries.

Every method gets the same number of trials: five learning rates at its default, then `len(Method.trials)` settings of
its own main constant at the best of them; an arm that is no default then gets the learning rates next to its own, until
neither is better. Schedules that are published in steps are scaled to the length of a run.
"""

import dataclasses
from typing import Any

STEPS = 200
"""Optimizer steps of a run."""
ROLLOUTS, GENERATIONS, STEP_DEMONSTRATIONS = 64, 8, 32
"""Rollouts of a step, rollouts of a prompt, demonstrations of a step."""


@dataclasses.dataclass(frozen=True)
class Method:
    """One method.

    Attributes:
        law: name of the law or rule.
        default: its default setting, ``key=value,...``; empty where the law's own defaults are it.
        trials: settings of its main constant that tuning tries besides.
        prior: its prior schedule, ``warmup,decay,peak,valley``.
        beta: coefficient of TRL's KL term; above 0 where the law needs KL to be measured.
        sft_weights: of demonstrations, as ``HybridGRPOConfig`` has them.
    """

    law: str
    default: str
    trials: tuple[str, str]
    prior: str | None = None
    beta: float = 0.0
    sft_weights: str | None = None


MEASURE_KL = 1e-6
"""A KL coefficient that makes TRL measure KL and moves no parameter that anyone could tell."""

PRIOR = "40,160,0.85,0.15"
"""The published prior (200 steps up, 800 down, between .85 and .15) at a run's length."""

METHODS = {
    "gac": Method("gac", "", ("alpha=0.25", "alpha=0.75")),
    "paper": Method("paper", "", ("ema_beta=0.9", "ema_beta=0.9,blend=0.9,mu_change_cap=0.05"), PRIOR),
    "fixed": Method("fixed", "mu=0.5", ("mu=0.1", "mu=0.9")),
    "sequential": Method("sequential", "split=100", ("split=50", "split=150")),
    "chord-mu": Method("chord-mu", "", ("decay=100", "valley=0.3")),
    "chord-phi": Method("chord-phi", "", ("mu=0.5", "mu=0.9")),
    "hpt": Method("hpt", "gate=2", ("gate=1", "gate=4")),
    "superrl": Method("superrl", "", ("sft_coefficient=0.3", "sft_coefficient=3.0")),
    "srft": Method("srft", "", ("sft_weight=2.0", "rl_weight=0.5")),
    "luffy": Method("luffy", "", ("shaping=0.01", "shaping=1.0")),
    "relift": Method("relift", "queue=32", ("queue=16", "queue=64")),
    "kl-ctrl": Method("kl-ctrl", "", ("target=0.1", "target=0.1,gain=1.0"), beta=MEASURE_KL),
    "entropy-ctrl": Method("entropy-ctrl", "", ("rate=0.01", "rate=0.1")),
}

CANDIDATES = {
    "aim": Method("aim", "", ("trust=0.5", "alpha=0.5")),
    "gac-reward": Method("gac", "", ("alpha=0.25", "alpha=0.75"), sft_weights="reward"),
    "aim-reward": Method("aim", "", ("trust=0.5", "alpha=0.5"), sft_weights="reward"),
    "gac-source": Method("gac", "", ("alpha=0.25", "alpha=0.75"), sft_weights="source"),
}
"""What runs in the regimes alone, at the learning rate of ``gac``, without trials of its own: laws, and demonstrations
that are weighed by their rewards or by the gradients of their sources."""

WITHOUT_MOMENTUM = "momentum=0"
"""Of ``gac``: the law as it was before it counted what the optimizer's momentum leaves of the noise."""

VARIANTS: dict[str, dict[str, Any]] = {
    "sketch": {"estimator": "sketch"},
    "temporal": {"micro_batches": 1},
    "coefficient": {"estimator": "coefficient"},
    "no-average": {"law": "gac:half_life=0.001"},
    "half_life=7": {"law": "gac:half_life=7"},
    "half_life=69": {"law": "gac:half_life=69"},
    "with-prior": {"prior": PRIOR},
    "no-cap": {"law": "gac:cap=1.0"},
    "no-disagreement": {"law": "gac-no-disagreement"},
    "no-variance": {"law": "gac-no-variance"},
    "direction": {"law": "gac-direction"},
    "optimizer-metric": {"metric": "optimizer"},
    "alpha=kl": {"law": "gac:alpha=kl", "beta": MEASURE_KL},
}
"""Forms of ``gac`` with one thing changed."""


PER_PROMPT = ("hpt", "superrl", "srft", "luffy", "relift")
"""Rules that take demonstrations from the prompts that a step happens to draw."""

_EVERY_PROMPT = "every-prompt"


def with_every_prompt(setting: str) -> str:
    """The setting of an arm whose demonstrations are the solutions of all prompts, not of the usual third."""
    return f"{setting};{_EVERY_PROMPT}" if setting else _EVERY_PROMPT


def own_setting(setting: str) -> str:
    """The method's own part of a setting."""
    return setting.removesuffix(_EVERY_PROMPT).removesuffix(";")


@dataclasses.dataclass(frozen=True)
class Arm:
    """What the trainer is told.

    Attributes:
        law: name and options, as ``gac train --law`` takes them.
        prior: the law's prior schedule, or None.
        estimator, metric: as for ``gac.patch``.
        micro_batches: of each branch; the rows of a step are the same whatever it is.
        beta: coefficient of the KL term.
        every_prompt: whether the solution of every prompt is a demonstration.
        sft_weights: of demonstrations, as ``HybridGRPOConfig`` has them.
    """

    law: str
    prior: str | None = None
    estimator: str = "auto"
    metric: str = "gradient"
    micro_batches: int = 4
    beta: float = 0.0
    every_prompt: bool = False
    sft_weights: str | None = None


def arm_of(method: str, setting: str) -> Arm:
    """The arm that a method and one of its settings mean.

    Raises:
        ValueError: unknown method.
    """
    known = METHODS | CANDIDATES
    if method not in known:
        raise ValueError(f"unknown method {method!r}; known: {', '.join(known)}")
    chosen = known[method]
    if method == "gac" and setting in VARIANTS:
        return Arm(**{"law": "gac"} | VARIANTS[setting])
    own = own_setting(setting) or chosen.default
    law = f"{chosen.law}:{own}" if own else chosen.law
    return Arm(
        law,
        prior=chosen.prior,
        beta=chosen.beta,
        every_prompt=setting.endswith(_EVERY_PROMPT),
        sft_weights=chosen.sft_weights,
        estimator="sequence" if chosen.sft_weights == "source" else "auto",
    )

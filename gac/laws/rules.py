"""Rules that act per prompt or per token rather than through one mu.

A rule is registered as a law, so that it has a name, checked options and a mu that it keeps. What it does to prompts,
rollouts and demonstrations is in the module of the same name in ``gac/trainers/rules/``; only
:class:`gac.trainers.HybridGRPOTrainer` sees these. `docs/rules.md` has formulas and sources.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from gac.laws.base import Law, Step, number, register, unit_interval
from gac.statistics import Statistics


class RuleLaw(Law):
    """A law whose mu is constant and whose work is done in the trainer.

    The optimizer follows ``scale * (mu * SFT gradient + (1 - mu) * RL gradient)``; with ``scale = 1 + c`` and
    ``mu = c / (1 + c)`` that is ``RL + c * SFT``, the form in which most rules are published.
    """

    prompt_demonstrations: ClassVar[bool] = True
    """Demonstrations belong to prompts (the column ``demonstration`` of `train_dataset`), not to a set of their own."""

    needs_trainer = True

    def __init__(self, start: float, scale: float = 1.0) -> None:
        super().__init__(start)
        self.scale = scale

    def update(self, statistics: Statistics | None, step: Step) -> Tensor:
        return self.mu


def _sum_of_losses(coefficient: float) -> tuple[float, float]:
    """mu and scale with which the mixed gradient is ``RL + coefficient * SFT``."""
    return coefficient / (1 + coefficient), 1 + coefficient


@register("chord-phi")
class ChordPhiLaw(RuleLaw):
    """Constant mu; each demonstration token weighted with its detached ``p * (1 - p)`` (CHORD, arXiv 2508.11408).

    Args:
        mu: weight of the SFT branch; peak and valley of the published schedule are equal.
    """

    prompt_demonstrations = False

    def __init__(self, mu: float = 0.1) -> None:
        super().__init__(unit_interval("mu", mu))


@register("hpt")
class HptLaw(RuleLaw):
    """A prompt with at most `gate` correct rollouts learns from its demonstration alone, any other from RL alone.

    Hybrid post-training, arXiv 2509.04419.

    Args:
        gate: number of correct rollouts; published: 0 for Qwen, 2 for Llama, of 8 rollouts.
        sft_coefficient: weight of the demonstrations' token loss; that of the RL loss is 1.
        correct: a rollout with at least this total reward is correct.
    """

    def __init__(self, gate: int = 0, sft_coefficient: float = 1.0, correct: float = 1.0) -> None:
        super().__init__(*_sum_of_losses(number("sft_coefficient", sft_coefficient, 0.0, 1e6)))
        self.gate = _count("gate", gate, low=0)
        self.correct = number("correct", correct, -1e30, 1e30)


@register("superrl")
class SuperRlLaw(HptLaw):
    """SFT for prompts without any correct rollout, RL for the others (SuperRL, arXiv 2506.01096): `hpt` with gate 0.

    Args:
        sft_coefficient, correct: as for `hpt`.
    """

    def __init__(self, sft_coefficient: float = 1.0, correct: float = 1.0) -> None:
        super().__init__(gate=0, sft_coefficient=sft_coefficient, correct=correct)


@register("srft")
class SrftLaw(RuleLaw):
    """Entropy-weighted sum of supervised, off-policy and on-policy losses (SRFT, arXiv 2506.19767).

    ``sft_weight * exp(-H) * NLL(demonstration)``, plus the demonstration as a rollout of its group with weight
    ``p / (p + shaping)``, plus rollouts with the advantage ``rl_weight * exp(H)`` where correct and -1 where not. ``H``
    is the mean token entropy of the row, detached.

    Args:
        sft_weight, rl_weight, shaping: as above.
        correct: a rollout with at least this total reward is correct.
    """

    def __init__(
        self, sft_weight: float = 0.5, rl_weight: float = 0.1, shaping: float = 0.1, correct: float = 1.0
    ) -> None:
        super().__init__(*_sum_of_losses(1.0))
        self.sft_weight = number("sft_weight", sft_weight, 0.0, 1e6)
        self.rl_weight = number("rl_weight", rl_weight, 0.0, 1e6)
        self.shaping = number("shaping", shaping, 1e-12, 1e6)
        self.correct = number("correct", correct, -1e30, 1e30)


@register("luffy")
class LuffyLaw(RuleLaw):
    """The demonstration is one of its group's rollouts, weighted with ``p / (p + shaping)`` and not clipped (LUFFY).

    There is no supervised branch: mu is 0. Advantages are not divided by a standard deviation. arXiv 2504.14945.

    Args:
        shaping: as above.
    """

    def __init__(self, shaping: float = 0.1) -> None:
        super().__init__(0.0)
        self.shaping = number("shaping", shaping, 1e-12, 1e6)


@register("relift")
class ReliftLaw(RuleLaw):
    """Demonstrations of prompts without a correct rollout wait in a queue; a full queue makes one step supervised.

    mu is 0, and 1 in those steps. ReLIFT, arXiv 2506.07527.

    Args:
        queue: demonstrations of one supervised step.
        correct: a rollout with at least this total reward is correct.
    """

    def __init__(self, queue: int = 128, correct: float = 1.0) -> None:
        super().__init__(0.0)
        self.queue = _count("queue", queue, low=1)
        self.correct = number("correct", correct, -1e30, 1e30)
        self.supervise_next = False
        """Set by the trainer: whether the step to come is the supervised one."""

    def update(self, statistics: Statistics | None, step: Step) -> Tensor:
        self.record("mu", 1.0 if self.supervise_next else 0.0)
        return super().update(statistics, step)


def _count(name: str, value: int, *, low: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ValueError(f"{name} must be a whole number from {low} on, got {value!r}")
    return value

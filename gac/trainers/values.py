"""What demonstrations still teach: their rewards, against what the policy earns at their prompts. Needs torch alone."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gac.state import Numbers, Range, Table

HALF_LIFE = 7.0
"""Generations after which a mean reward counts half in the average that stands in for prompts not met yet."""

_DOUBLE = torch.float64
_CPU = torch.device("cpu")


def prompt_key(prompt: Any) -> int:
    """A number in [-2^63, 2^63) that equal prompts share, text or message lists, in every process."""
    text = prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True, default=str)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big", signed=True)


def _finite(rewards: Tensor) -> Tensor:
    """Rewards on the CPU in float64; what is not finite is none."""
    values = rewards.detach().to(_CPU, _DOUBLE)
    return torch.where(values.isfinite(), values, math.nan)


class DemonstrationValues:
    """Rewards of demonstrations and of prompts, and the weights that follow from them.

    A demonstration with the reward ``v`` at a prompt that the policy earns ``V`` at is worth its advantage ``v - V``,
    and weighs ``max(v - V, 0) / R``, where ``R`` is the range of all rewards seen: a number in [0, 1], the same for
    rewards times a constant or plus one. ``V`` is the mean reward of the prompt's newest rollouts; of a prompt without
    any, an average over the newest generations; without rollouts at all, the lowest reward seen. What the rewards do
    not judge (None or no finite number), or where all are equal, weighs 1: there is no evidence against it.

    All ranks are told the same, and hold the same.

    Args:
        size: demonstrations.
    """

    def __init__(self, size: int) -> None:
        self._scores = torch.full((size,), math.nan, dtype=_DOUBLE)
        self._scored = torch.zeros(size, dtype=torch.bool)
        self._keys = torch.zeros(size, dtype=torch.int64)  # of their prompts
        self._prompts: dict[int, float] = {}  # the newest mean reward of each
        self._sum = self._count = 0.0  # of the average over generations
        self._low, self._high = math.inf, -math.inf

    # -- what is told -------------------------------------------------------------------------------------------------

    def take_rollouts(self, prompts: Sequence[int], rewards: Tensor) -> None:
        """A generation.

        Args:
            prompts: :func:`prompt_key` of each rollout's. rewards: ``[N]``, NaN where there is none.
        """
        values = _finite(rewards)
        found: dict[int, list[float]] = {}
        for prompt, value in zip(prompts, values.tolist(), strict=True):
            if not math.isnan(value):
                found.setdefault(prompt, []).append(value)
        self._prompts |= {prompt: sum(own) / len(own) for prompt, own in found.items()}
        known = values[~values.isnan()]
        if len(known):
            kept = 0.5 ** (1 / HALF_LIFE)
            self._sum = kept * self._sum + float(known.mean())
            self._count = kept * self._count + 1.0
            self._see(known)

    def take_scores(self, index: Sequence[int], prompts: Sequence[int], rewards: Tensor) -> None:
        """Demonstrations are scored.

        Args:
            index: their numbers. prompts: :func:`prompt_key` of each one's. rewards: ``[N]``, NaN where there is none.
        """
        values, at = _finite(rewards), torch.tensor(index)
        self._scores[at], self._keys[at], self._scored[at] = values, torch.tensor(prompts), True
        self._see(values[~values.isnan()])

    def _see(self, values: Tensor) -> None:
        if len(values):
            self._low, self._high = min(self._low, float(values.min())), max(self._high, float(values.max()))

    def forget_scores(self) -> None:
        """Demonstrations, or what rewards them, have changed: all are scored again."""
        self._scores.fill_(math.nan)
        self._scored.zero_()

    # -- what follows -------------------------------------------------------------------------------------------------

    def are_scored(self, index: Sequence[int]) -> bool:
        """Whether all the demonstrations at ``index`` are."""
        return bool(self._scored[torch.tensor(index)].all())

    def scores(self, index: Sequence[int]) -> Tensor:
        """Rewards ``[N]`` of the demonstrations at ``index``, float64; NaN where there is none."""
        return self._scores[torch.tensor(index)]

    def policy_values(self, index: Sequence[int]) -> Tensor:
        """``V`` at the prompts of the demonstrations at ``index``: ``[N]``, float64."""
        rest = self._sum / self._count if self._count else self._low
        keys = self._keys[torch.tensor(index)].tolist()
        return torch.tensor([self._prompts.get(key, rest) for key in keys], dtype=_DOUBLE)

    def weights(self, index: Sequence[int]) -> Tensor:
        """The weights ``[N]`` of the demonstrations at ``index``, float64, on the CPU."""
        scores, extent = self.scores(index), self._high - self._low
        if not extent > 0:
            return torch.ones(len(scores), dtype=_DOUBLE)
        advantages = (scores - self.policy_values(index)).clamp(min=0) / extent
        return torch.where(scores.isnan(), 1.0, advantages)

    # -- state --------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint must hold."""
        return {
            "scores": self._scores.clone(),
            "scored": self._scored.to(_DOUBLE),
            "keys": self._keys.clone(),
            "prompts": torch.tensor(list(self._prompts), dtype=torch.int64),
            "values": torch.tensor(list(self._prompts.values()), dtype=_DOUBLE),
            "average": torch.tensor([self._sum, self._count, self._low, self._high], dtype=_DOUBLE),
        }

    def entries(self) -> Table:
        """What :meth:`state_dict` may hold."""
        finite, any_key, size = Range(), Range(-(2.0**63), 2.0**63), (len(self._scores),)
        numbers = lambda shape, range: Numbers(shape, _DOUBLE, _CPU, range)
        return Table(
            {
                "scores": numbers(size, Range(unknown=True)),
                "scored": numbers(size, Range(0, 1, whole=True)),
                "keys": Numbers(size, torch.int64, _CPU, any_key),
                "prompts": Numbers((None,), torch.int64, _CPU, any_key),
                "values": numbers((None,), finite),
                "average": numbers((4,), Range(-math.inf, math.inf)),
            }
        )

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continues where :meth:`state_dict` left off: a state that is as :meth:`entries` says."""
        self._scores, self._scored = state["scores"].clone(), state["scored"] > 0
        self._keys = state["keys"].clone()
        self._prompts = dict(zip(state["prompts"].tolist(), state["values"].tolist(), strict=True))
        self._sum, self._count, self._low, self._high = state["average"].tolist()

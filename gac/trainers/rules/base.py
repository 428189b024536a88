"""The interface between the hybrid trainer and a rule, and what they hand each other."""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from einops import rearrange

from gac.laws import Law
from gac.losses import sft_token_loss
from gac.state import Table
from gac.trainers.groups import GroupLayout

Demonstration = tuple[list[int], list[int]]
"""Token ids and labels (-100 on the prompt) of a prompt with its demonstration."""


@dataclasses.dataclass(frozen=True)
class ScoredBatch:
    """This rank's rollouts of a generation batch after their rewards are known, groups side by side.

    Attributes:
        layout: where they stand; ``layout.rows`` is L below.
        rewards: total rewards of the rollouts of *all* ranks, in order, a multiple of the group size; fp32.
        advantages: ``[L]`` as TRL computed them.
        demonstrated: ``[L]`` bool, whether the rollout's prompt has a demonstration.
        joined: ``[L]`` bool, rows that *are* a demonstration, in a rollout's place.
    """

    layout: GroupLayout
    rewards: torch.Tensor
    advantages: torch.Tensor
    demonstrated: torch.Tensor
    joined: torch.Tensor

    @property
    def local_rewards(self) -> torch.Tensor:
        """``[L]``: those of this rank's rollouts."""
        return self.rewards[self.layout.offset : self.layout.offset + self.layout.rows]

    def correct_in_group(self, threshold: float) -> torch.Tensor:
        """``[L]`` int64: correct rollouts in each rollout's group; an unscored one (NaN) is not correct."""
        return self._of_groups(self._by_group(self.rewards >= threshold).sum(1))

    def centered(self) -> torch.Tensor:
        """``[L]``: reward less its group's mean, without the division by a standard deviation; 0 where unscored."""
        means = self._by_group(self.rewards).nanmean(1)
        return (self.local_rewards - self._of_groups(means)).nan_to_num(nan=0.0)

    def _by_group(self, values: torch.Tensor) -> torch.Tensor:
        return rearrange(values, "(group rollout) -> group rollout", rollout=self.layout.size)

    def _of_groups(self, values: torch.Tensor) -> torch.Tensor:
        return values[self.layout.ids().to(values.device)]


@dataclasses.dataclass(frozen=True)
class Selection:
    """What a rule makes of a scored batch. All tensors are ``[L]``.

    Attributes:
        advantages: what TRL's own loss uses; 0 takes a rollout out of it.
        demonstrate: bool, prompts whose demonstration goes into the supervised branch; any row of a group may say so
            (only its first counts). None: no prompt's.
        extra: further tensors that :meth:`Rule.rl_terms` needs beside each rollout.
    """

    advantages: torch.Tensor
    demonstrate: torch.Tensor | None = None
    extra: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class LossTerms:
    """What the policy said about a micro-batch of rollouts.

    Attributes:
        logprobs: ``[B, T]`` of the completion tokens, with a graph.
        entropies: ``[B, T]`` of the distributions they were drawn from.
        mask: ``[B, T]``, non-zero where a token counts.
        inputs: the micro-batch, with the rule's `Selection.extra`.
        epsilon: lower and upper clipping range.
    """

    logprobs: torch.Tensor
    entropies: torch.Tensor
    mask: torch.Tensor
    inputs: dict[str, Any]
    epsilon: tuple[float, float]


class Rule:
    """Changes nothing: both branches in every step, demonstrations from a set of their own. Rules override this."""

    from_prompts: ClassVar[bool] = False
    """Demonstrations are those of the prompts; there is no set of their own."""
    joins_groups: ClassVar[bool] = False
    """The demonstration takes the place of the first rollout of its group before rewards are computed."""
    queues: ClassVar[bool] = False
    """Selected demonstrations are enqueued instead of entering the supervised branch beside their rollouts."""
    phi: bool = False
    """The supervised loss weights each token with its detached ``p * (1 - p)``; set by ``sft_loss="phi"`` too."""

    def __init__(self, law: Law) -> None:
        self.law = law
        self.scale: float = getattr(law, "scale", 1.0)
        """Both branches' losses are multiplied by this."""

    @property
    def explores(self) -> bool:
        """Whether this step has a reinforcement branch. The same on all ranks."""
        return True

    @property
    def supervises(self) -> bool:
        """Whether this step has a supervised branch. The same on all ranks."""
        return True

    def attach(self, law: Law) -> None:
        """Training begins with this law, a fresh one with the same options."""
        self.law = law

    def check(self, num_generations: int) -> None:
        """Raises ValueError for options that make no sense with groups of this size."""

    def select(self, batch: ScoredBatch) -> Selection:
        """Called once for each generation batch, on every rank, before rollouts are shuffled."""
        return Selection(batch.advantages)

    def rl_terms(self, terms: LossTerms) -> torch.Tensor | None:
        """``[B, T]`` token losses in addition to TRL's, which are then normalised as TRL's are; None for none."""
        return None

    def sft_loss(
        self,
        logits: torch.Tensor,
        labels: torch.Tensor,
        num_tokens: torch.Tensor | float,
        weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The supervised loss of a micro-batch; `num_tokens` spans the whole step and all ranks.

        `weights` are the rows'; None for 1, as for rules that take demonstrations from prompts.
        """
        return sft_token_loss(logits, labels, num_tokens=num_tokens, phi=self.phi, weights=weights)

    def enqueue(self, demonstrations: Sequence[Demonstration]) -> None:
        """Takes the demonstrations selected on all ranks, in the same order on each."""
        raise NotImplementedError(f"{type(self).__name__} has no queue")

    def dequeue(self) -> list[Demonstration]:
        """Demonstrations of the whole supervised step that begins, over all ranks."""
        raise NotImplementedError(f"{type(self).__name__} has no queue")

    def end_step(self) -> None:
        """Called after each optimizer step, before the law moves mu."""

    def metrics(self) -> dict[str, float]:
        """Numbers to log under ``gac/`` with each generation batch."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold: numbers, lists and tensors."""
        return {}

    def entries(self) -> Table:
        """What a saved state may hold; a rule that keeps something says what."""
        return Table({})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where :meth:`state_dict` left off: a state that is as :meth:`entries` says."""

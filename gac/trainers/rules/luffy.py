"""LUFFY: the demonstration is one of the group's rollouts."""

import torch

from gac.laws import LuffyLaw
from gac.trainers.rules.base import LossTerms, Rule, ScoredBatch, Selection
from gac.trainers.rules.losses import shaped_off_policy


class Luffy(Rule):
    """Advantages within the joint group, without a standard deviation; shaped, unclipped loss on the demonstration."""

    law: LuffyLaw
    from_prompts = True
    joins_groups = True

    @property
    def supervises(self) -> bool:
        return False

    def select(self, batch: ScoredBatch) -> Selection:
        advantages = batch.centered()
        joined = batch.joined.to(advantages.device)
        return Selection(
            advantages=torch.where(joined, 0.0, advantages),
            extra={"gac_joined": joined, "gac_off_policy": torch.where(joined, advantages, 0.0)},
        )

    def rl_terms(self, terms: LossTerms) -> torch.Tensor:
        return shaped_off_policy(terms.logprobs, terms.inputs["gac_off_policy"], self.law.shaping)

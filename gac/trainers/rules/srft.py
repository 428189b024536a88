"""SRFT: four losses at once, weighted by entropy."""

from typing import cast

import torch
from einops import rearrange

from gac.laws import SrftLaw
from gac.losses import sft_token_loss
from gac.trainers.rules.base import LossTerms, Rule, ScoredBatch, Selection
from gac.trainers.rules.losses import clipped_surrogate, shaped_off_policy
from gac.trainers.token_stats import masked_row_mean, mean_entropy


class Srft(Rule):
    """Demonstration: weighted NLL and shaped off-policy RL. Rollouts: ``rl_weight * exp(H)`` if correct, else -1.

    The NLL is the supervised branch, everything else the reinforcement branch. TRL's own policy loss gets advantages
    of 0: those of the rollouts depend on an entropy that is known only after the forward pass.
    """

    law: SrftLaw
    from_prompts = True
    joins_groups = True

    def select(self, batch: ScoredBatch) -> Selection:
        advantages = batch.centered()
        joined = batch.joined.to(advantages.device)
        rewards = batch.local_rewards
        sign = torch.where(rewards >= self.law.correct, 1.0, -1.0).masked_fill(rewards.isnan(), 0.0)
        return Selection(
            advantages=torch.zeros_like(batch.advantages),
            demonstrate=batch.demonstrated,
            extra={
                "gac_joined": joined,
                "gac_off_policy": torch.where(joined, advantages, 0.0),
                "gac_on_policy": torch.where(joined, 0.0, sign),
            },
        )

    def rl_terms(self, terms: LossTerms) -> torch.Tensor:
        old = terms.inputs.get("old_per_token_logps")
        old = terms.logprobs.detach() if old is None else old
        sign = terms.inputs["gac_on_policy"]
        entropy = masked_row_mean(terms.entropies.detach(), terms.mask)
        advantages = torch.where(sign > 0, self.law.rl_weight * entropy.exp(), sign.to(entropy.dtype))
        on_policy = clipped_surrogate(terms.logprobs, old, advantages, terms.epsilon)
        if "importance_sampling_ratio" in terms.inputs:
            on_policy = on_policy * terms.inputs["importance_sampling_ratio"]
        off_policy = shaped_off_policy(terms.logprobs, terms.inputs["gac_off_policy"], self.law.shaping)
        # of its two terms, a row has one: the other's advantage is 0
        return torch.where(rearrange(sign, "b -> b 1") == 0, off_policy, on_policy)

    def sft_loss(
        self,
        logits: torch.Tensor,
        labels: torch.Tensor,
        num_tokens: torch.Tensor | float,
        weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        scales = self.law.sft_weight * torch.exp(-mean_entropy(logits, labels))
        # unbind, not indexing: its backward writes one gradient of the logits, not one for each row
        rows = zip(scales, logits.unbind(0), labels, strict=True)
        losses = (w * sft_token_loss(row, ids, num_tokens=num_tokens, phi=self.phi) for w, row, ids in rows)
        return cast(torch.Tensor, sum(losses))

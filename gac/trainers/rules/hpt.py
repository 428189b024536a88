"""HPT and SuperRL: by its rollouts, a prompt goes to the demonstration or to reinforcement."""

import torch

from gac.laws import HptLaw
from gac.trainers.rules.base import Rule, ScoredBatch, Selection


class Hpt(Rule):
    """At most ``gate`` correct rollouts and a demonstration: supervised alone. Otherwise RL alone."""

    law: HptLaw
    from_prompts = True

    def check(self, num_generations: int) -> None:
        if self.law.gate >= num_generations:
            raise ValueError(
                f"gate={self.law.gate} with num_generations={num_generations} sends every prompt to its demonstration "
                f"and none to RL; gate must be in [0, {num_generations - 1}]"
            )

    def select(self, batch: ScoredBatch) -> Selection:
        gated = batch.correct_in_group(self.law.correct) <= self.law.gate
        gated &= batch.demonstrated.to(gated.device)
        return Selection(
            advantages=torch.where(gated.to(batch.advantages.device), 0.0, batch.advantages),
            demonstrate=gated,
        )

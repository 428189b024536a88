"""Trinity-RFT: its MIX policy loss with a mu that is measured instead of fixed.

Written against Trinity-RFT 0.6.0. Importing this module needs it. Configure the class by its path, which Trinity's
registry resolves without a plugin::

    algorithm:
      algorithm_type: mix
      policy_loss_fn: gac.trainers.adapters.trinity.GacMixPolicyLossFn
"""

from __future__ import annotations

from typing import Any

import torch
from trinity.algorithm.policy_loss_fn.mix_policy_loss import MIXPolicyLossFn

from gac.trainers.mixed_batch import MixedBatch


class GacMixPolicyLossFn(MIXPolicyLossFn):
    """``MIXPolicyLossFn`` whose ``mu`` follows the coefficient statistics, updated after each optimizer step.

    The branch losses and their divisors are Trinity's.

    Args:
        law, law_options, phi_coefficient: how mu follows; see :class:`gac.trainers.mixed_batch.MixedBatch`.
            ``phi_coefficient`` is the estimator's: False compares with the plain NLL coefficient.
        mu: not taken; the law has a start of its own.
        **options: of ``MIXPolicyLossFn``.
    """

    def __init__(
        self,
        backend: str = "verl",
        law: str = "gac",
        law_options: dict | None = None,
        phi_coefficient: bool = True,
        **options: Any,
    ) -> None:
        if "mu" in options:
            raise ValueError("mu is set by the law: leave it out, or use law: fixed and law_options: {mu: ...}")
        super().__init__(backend=backend, **options)
        self.mixed = MixedBatch(law=law, coefficient={"phi": phi_coefficient}, **(law_options or {}))

    def __call__(  # the names of the arguments choose what Trinity passes
        self,
        logprob: torch.Tensor,
        old_logprob: torch.Tensor,
        action_mask: torch.Tensor,
        advantages: torch.Tensor,
        expert_mask: torch.Tensor,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, dict]:
        self.mixed.open(logprob.device)
        self.mu = self.mixed.mu
        loss, metrics = super().__call__(
            logprob=logprob,
            old_logprob=old_logprob,
            action_mask=action_mask,
            advantages=advantages,
            expert_mask=expert_mask,
            **kwargs,
        )
        if torch.is_grad_enabled():
            self.mixed.observe(logprob, advantages, action_mask, expert_mask)
        return loss, metrics | self.mixed.metrics()

    @classmethod
    def default_args(cls) -> dict:
        args = dict(super().default_args())
        args.pop("mu", None)
        return args | {"law": "gac"}

"""OpenRLHF: the actor's policy loss on the rollouts of a batch, the NLL of its demonstrations, mixed with mu.

Written against OpenRLHF 0.11.2, which has no registry: :func:`attach` replaces the loss module of one
``ActorPPOTrainer`` and looks at each experience on its way in. It needs nothing of OpenRLHF at import.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gac.trainers.mixed_batch import MixedBatch, StepCounts, count_step

EXPERT = "is_expert"
"""Key of ``experience.info`` that holds ``[B]``, true for demonstrations."""


def expert_rows(experience: Any) -> Tensor:
    """``[B]`` bool from ``experience.info["is_expert"]``, for a batch or a single sample of the replay buffer.

    Raises KeyError where it is absent: OpenRLHF joins only batches with the same keys, so every sample needs it.
    """
    rows = experience.info.get(EXPERT)
    if rows is None:
        raise KeyError(
            f"experience.info has no {EXPERT!r}: give every experience a [B] tensor there, 1 for demonstrations"
        )
    return torch.as_tensor(rows).reshape(-1).bool()


def attach(trainer: Any, *, is_expert: Callable[[Any], Tensor] = expert_rows, **options: Any) -> MixedBatch:
    """Makes an ``ActorPPOTrainer`` mix both losses, before its first ``ppo_train``.

    Args:
        trainer: ``PolicyModelActor.trainer``, in the actor's process.
        is_expert: tells an experience's demonstrations: ``[B]`` bool.
        **options: of :class:`gac.trainers.mixed_batch.MixedBatch`.

    Returns:
        What follows mu; its ``state_dict`` belongs into the checkpoint's ``client_states``.

    Raises:
        RuntimeError: attached already.
    """
    if isinstance(trainer.actor_loss_fn, MixedPolicyLoss):
        raise RuntimeError("attach: this trainer mixes both losses already")
    mixed = MixedBatch(**options)
    group = _data_parallel_group(trainer.strategy)
    if mixed.estimator == "sequence":
        mixed.watch(_layers(trainer), group)
    loss_fn = trainer.actor_loss_fn = MixedPolicyLoss(trainer.actor_loss_fn, mixed, group)
    ppo_train, training_step = trainer.ppo_train, trainer.training_step

    def counted_ppo_train(kl_ctl: float) -> dict:
        items = list(trainer.replay_buffer.items)
        device = torch.device(torch.cuda.current_device() if torch.cuda.is_available() else "cpu")
        masks = [item.action_mask.reshape(-1, item.action_mask.shape[-1]) for item in items]
        loss_fn.counts = count_step(masks, [is_expert(item) for item in items], group, device=device)
        return ppo_train(kl_ctl)

    def labelled_training_step(experience: Any, *args: Any, **kwargs: Any) -> dict:
        loss_fn.is_expert = is_expert(experience)
        if mixed.estimator == "sequence":
            loss_fn.told = _rows(experience, packed=bool(getattr(trainer.strategy.args, "packing_samples", False)))
        try:
            status = training_step(experience, *args, **kwargs)
        finally:
            loss_fn.is_expert, loss_fn.told = None, {}
        for name, value in mixed.metrics().items():
            status["metrics"][name], status["weights"][name] = value, None
        return status

    trainer.ppo_train, trainer.training_step = counted_ppo_train, labelled_training_step
    return mixed


class MixedPolicyLoss(nn.Module):
    """Stands in for ``openrlhf.models.PolicyLoss``: the same arguments and the same five results.

    OpenRLHF divides by the tokens (or rows) of a whole optimizer step without telling the branches apart. Each branch
    gets its share of that divisor, as it is in the replay buffer that the steps are drawn from: a step with fewer
    demonstrations than its share moves less by them, and all of a buffer's demonstrations count alike.

    Args:
        policy_loss: the module it replaces.
        mixed: follows mu.
        group: the data-parallel ranks.
    """

    def __init__(self, policy_loss: nn.Module, mixed: MixedBatch, group: dist.ProcessGroup | None = None) -> None:
        super().__init__()
        self.policy_loss = policy_loss
        self.mixed = mixed
        self.group = group
        self.is_expert: Tensor | None = None
        self.told: dict[str, Any] = {}
        self.counts: StepCounts | None = None

    def forward(
        self,
        log_probs: Tensor,
        old_log_probs: Tensor,
        advantages: Tensor,
        action_mask: Tensor | None = None,
        rollout_log_probs: Tensor | None = None,
        dp_size: int = 1,
        batch_num_tokens: float | Tensor | None = None,
        global_batch_size: float | Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        if self.is_expert is None or self.counts is None:
            raise RuntimeError(
                "MixedPolicyLoss does not know which rows are demonstrations: train through ppo_train of a trainer "
                "given to gac.trainers.adapters.openrlhf.attach"
            )
        if batch_num_tokens is None or global_batch_size is None:
            raise ValueError("batch_num_tokens and global_batch_size of the whole step are needed; got None")
        sft_tokens, rl_tokens, _, rl_rows = self._divisors(batch_num_tokens, global_batch_size)
        is_expert = self.is_expert.to(log_probs.device)
        others: tuple = ()

        def policy_loss(*, logprobs: Any, old_logprobs: Any, advantages: Any, mask: Any) -> Tensor:
            nonlocal others
            rollout = None if rollout_log_probs is None else torch.where(mask != 0, rollout_log_probs, 0.0)
            loss, *rest = self.policy_loss(
                logprobs,
                old_logprobs,
                advantages,
                action_mask=mask,
                rollout_log_probs=rollout,
                dp_size=dp_size,
                batch_num_tokens=rl_tokens,
                global_batch_size=rl_rows,
            )
            others = tuple(rest)
            return loss

        result = self.mixed.loss(
            logprobs=log_probs,
            old_logprobs=old_log_probs,
            advantages=advantages,
            mask=action_mask,
            is_expert=is_expert,
            policy_loss=policy_loss,
            sft_tokens=sft_tokens,
            ranks=dp_size,
            group=self.group,
            **self.told,
        )
        return (result.loss, *others)

    def _divisors(self, tokens: float | Tensor, rows: float | Tensor) -> StepCounts:
        """The branches' shares of a step's tokens and rows."""
        counts = StepCounts(*(count.float() for count in self.counts))
        token = tokens / (counts.sft_tokens + counts.rl_tokens)
        row = rows / (counts.sft_rows + counts.rl_rows)
        at_least = lambda count: count.clamp(min=1)
        return StepCounts(
            at_least(counts.sft_tokens) * token,
            at_least(counts.rl_tokens) * token,
            at_least(counts.sft_rows) * row,
            at_least(counts.rl_rows) * row,
        )


def _layers(trainer: Any) -> nn.Module:
    """What the actor hands its (perhaps packed) rows to. Raises ValueError where a rank sees parts of sequences."""
    strategy = trainer.strategy
    parts = getattr(strategy, "ring_attn_group", None) is not None
    if parts or getattr(getattr(strategy, "args", None), "ds_tensor_parallel_size", 1) > 1:
        raise ValueError(
            'estimator="sequence" needs whole sequences and layers on every rank: switch ring attention and tensor '
            'parallelism off, or use estimator="coefficient"'
        )
    return trainer.actor.model


def _rows(experience: Any, *, packed: bool) -> dict[str, Any]:
    """What ``estimator="sequence"`` is told: whose rollouts share a prompt, and where packed rows begin."""
    prompts = getattr(experience, "prompts", None)
    numbers: dict[str, int] = {}
    groups = [numbers.setdefault(prompt, len(numbers)) for prompt in prompts] if prompts else None
    return {"groups": groups, "lengths": experience.attention_mask.sum(1) if packed else None}


def _data_parallel_group(strategy: Any) -> dist.ProcessGroup | None:
    if not dist.is_available() or not dist.is_initialized():
        return None
    mesh = getattr(strategy, "ds_device_mesh", None)
    return mesh["dp"].get_group() if mesh is not None else None

"""slime: its policy loss on the rollouts of a batch, the NLL of its demonstrations, mixed with mu.

Written against slime 0.3.1, for two of its extension points, both needed::

    --loss-type custom_loss --custom-loss-function-path gac.trainers.adapters.slime.loss
    --custom-advantage-function-path gac.trainers.adapters.slime.advantages

A loss function is handed a fixed set of fields, none of which labels rows. The advantage function sees the label that
the rollout function gave each sample, ``sample.metadata["source_name"] = "demonstration"``, and passes it on as the
returns, which no policy loss reads. Law and options come from ``args.gac``, a mapping (``--custom-config-path`` sets
it).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from gac.trainers.mixed_batch import MixedBatch, StepCounts, count_step

DEMONSTRATION = "demonstration"
"""``source_name`` of demonstrations."""

_UNSUPPORTED = {
    "recompute_loss_function": "the loss would be seen twice",
    "allgather_cp": "a rank would see parts of sequences",
    "use_tis": "it replaces the reducer that leaves demonstrations out",
    "get_mismatch_metrics": "it replaces the reducer that leaves demonstrations out",
    "custom_pg_loss_reducer_function_path": "it replaces the reducer that leaves demonstrations out",
}


class _Run:
    """What one training process keeps between calls."""

    mixed: MixedBatch | None = None
    counts: StepCounts | None = None


def mixed_batch(args: Any) -> MixedBatch:
    """What follows mu in this process; made from ``args.gac`` at the first call.

    Raises ValueError for options of slime that do not go with a mixed loss.
    """
    if _Run.mixed is None:
        for name, reason in _UNSUPPORTED.items():
            if getattr(args, name, None):
                raise ValueError(f"--{name.replace('_', '-')} does not go with a mixed loss: {reason}; switch it off")
        if getattr(args, "context_parallel_size", 1) > 1:
            raise ValueError("context parallelism does not go with a mixed loss: a rank sees parts of sequences")
        mixed = MixedBatch(**(getattr(args, "gac", None) or {}))
        if mixed.estimator == "sequence":
            raise ValueError(
                'estimator="sequence" reads gradients at torch\'s layers, and a loss of slime is handed no model, '
                'whose layers are Megatron\'s anyway: use estimator="coefficient"'
            )
        _Run.mixed = mixed
    return _Run.mixed


def advantages(args: Any, rollout_data: dict[str, Any]) -> None:
    """Group-relative advantages as slime's own ``grpo``; 0 for demonstrations, whose returns are 1 and others' 0.

    Counts the tokens and samples of both branches over the data-parallel ranks: one small all-reduce per rollout.

    Raises KeyError where samples have no ``source_name``.
    """
    from megatron.core import mpu

    mixed_batch(args)
    if "source_names" not in rollout_data:
        raise KeyError(
            'samples are not labelled: set sample.metadata["source_name"], to "demonstration" for demonstrations'
        )
    like = rollout_data["kl"]
    device = like[0].device if like else None
    expert = torch.tensor([name == DEMONSTRATION for name in rollout_data["source_names"]], dtype=torch.bool)
    rewards = rollout_data["rewards"]
    rollout_data["advantages"] = [
        torch.full_like(x, 0.0 if e else float(r)) for x, e, r in zip(like, expert, rewards, strict=True)
    ]
    rollout_data["returns"] = [torch.full_like(x, float(e)) for x, e in zip(like, expert, strict=True)]
    masks = [mask[None] for mask in rollout_data["loss_masks"]]
    _Run.counts = count_step(masks, expert[:, None].unbind(), _group(mpu), device=device)


def loss(args: Any, batch: dict[str, Any], logits: Tensor, sum_of_sample_mean: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """slime's custom loss: ``(args, batch, logits, sum_of_sample_mean) -> (loss, metrics)``.

    slime divides by the samples (or tokens) of a whole step without telling the branches apart. Each branch is divided
    by its share of them, as it is in the rollout data that the steps are cut from.
    """
    from megatron.core import mpu
    from slime.backends.megatron_utils.loss import get_log_probs_and_entropy, policy_loss_function

    mixed = mixed_batch(args)
    if _Run.counts is None:
        raise RuntimeError(f"set --custom-advantage-function-path {__name__}.advantages, which labels the samples")
    mixer = mixed.open(logits.device, _group(mpu))
    _, found = get_log_probs_and_entropy(
        logits,
        args=args,
        unconcat_tokens=batch["unconcat_tokens"],
        total_lengths=batch["total_lengths"],
        response_lengths=batch["response_lengths"],
        with_entropy=False,
    )
    logprobs = found["log_probs"]
    expert_tokens = torch.cat(batch["returns"]) > 0
    share = _share(_Run.counts, by_tokens=args.calculate_per_token_loss)

    rollouts_only = lambda x: sum_of_sample_mean(torch.where(expert_tokens, 0.0, x))
    rl_loss, metrics = policy_loss_function(args, batch, logits, rollouts_only)
    flat = torch.cat(logprobs)
    nll = torch.where(expert_tokens, -flat, 0.0)
    if mixed.phi:
        p = torch.where(expert_tokens, flat.detach().exp(), 0.0)
        nll = nll * (p * (1 - p))
    result = mixer.mixed_loss(sft_loss=sum_of_sample_mean(nll) / share, rl_loss=rl_loss / (1 - share).clamp(min=1e-6))
    if torch.is_grad_enabled():
        pad = lambda tensors: pad_sequence(list(tensors), batch_first=True)
        is_expert = torch.stack([returns.max() > 0 for returns in batch["returns"]])
        mixed.observe(pad(logprobs), pad(batch["advantages"]), pad(batch["loss_masks"]), is_expert)
    # slime divides metrics by the samples (or tokens) of the step
    masks = batch["loss_masks"]
    number = sum(mask.sum().clamp(min=1) for mask in masks) if args.calculate_per_token_loss else len(masks)
    own = {name: torch.as_tensor(value * number, device=logits.device) for name, value in mixed.metrics().items()}
    return result, metrics | own


def _share(counts: StepCounts, *, by_tokens: bool) -> Tensor:
    """Share of demonstrations, kept off 0 where there are none."""
    sft, rl = (counts.sft_tokens, counts.rl_tokens) if by_tokens else (counts.sft_rows, counts.rl_rows)
    return (sft / (sft + rl).clamp(min=1)).clamp(min=1e-6)


def _group(mpu: Any) -> Any:
    return mpu.get_data_parallel_group() if dist.is_available() and dist.is_initialized() else None

"""Token losses that rules share."""

import torch


def clipped_surrogate(
    logprobs: torch.Tensor, old_logprobs: torch.Tensor, advantages: torch.Tensor, epsilon: tuple[float, float]
) -> torch.Tensor:
    """``-min(r*A, clip(r, 1-low, 1+high)*A)`` with ``r = exp(logprobs - old_logprobs)`` (PPO). ``[B, T]``.

    Args:
        logprobs, old_logprobs: ``[B, T]``; the latter without a graph.
        advantages: ``[B]`` or ``[B, 1]``.
        epsilon: ``(low, high)``.
    """
    low, high = epsilon
    advantages = advantages.view(-1, 1)
    ratio = torch.exp(logprobs - old_logprobs)
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages)


def shaped_off_policy(logprobs: torch.Tensor, advantages: torch.Tensor, shaping: float) -> torch.Tensor:
    """``-A * p / (p + shaping)``: the demonstration's token loss of LUFFY (arXiv 2504.14945), unclipped. ``[B, T]``.

    The gradient with respect to ``log p`` is ``-A * shaping * p / (p + shaping)^2``: largest at ``p = shaping``, where
    plain importance weights would leave unlikely tokens almost alone.
    """
    probabilities = logprobs.exp()
    return -advantages.view(-1, 1) * probabilities / (probabilities + shaping)


def normalized(
    token_losses: torch.Tensor,
    mask: torch.Tensor,
    loss_type: str,
    *,
    step_tokens: torch.Tensor | float,
    micro_batches: int,
    max_length: int,
) -> torch.Tensor:
    """Token losses to one number, divided as TRL 1.16 divides its own under `loss_type`.

    Args:
        token_losses, mask: ``[B, T]``.
        loss_type: TRL's name.
        step_tokens: completion tokens of one optimizer step, per rank on average.
        micro_batches: of one optimizer step.
        max_length: ``max_completion_length``.
    """
    # torch.where, not a product: a masked position may hold inf or nan
    kept = torch.where(mask.bool(), token_losses, 0.0)
    if loss_type in ("grpo", "sapo"):
        return (kept.sum(1) / mask.sum(1).clamp(min=1.0)).mean() / micro_batches
    if loss_type == "bnpo":
        return kept.sum() / mask.sum().clamp(min=1.0) / micro_batches
    if loss_type == "dr_grpo":
        return kept.sum() / (kept.shape[0] * max_length) / micro_batches
    if loss_type == "luspo":
        return kept.sum(1).mean() / micro_batches
    if loss_type in ("cispo", "dapo", "vespo"):
        return kept.sum() / step_tokens
    raise ValueError(f"loss_type {loss_type!r} is not one whose normalisation is known here")

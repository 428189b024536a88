"""The losses of both branches of a mixed batch, from log-probabilities."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def nll(logprobs: Tensor, expert: Tensor, phi: bool) -> Tensor:
    """Sum of the demonstrations' NLL."""
    losses = torch.where(expert, -logprobs, 0.0)
    if phi:
        p = torch.where(expert, logprobs.detach().exp(), 0.0)
        losses = losses * (p * (1 - p))
    return losses.sum()


def rollout_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    rollout: Tensor,
    policy_loss: Callable[..., Tensor],
) -> Tensor:
    """The trainer's loss of the rollouts, 0 without them."""
    if not logprobs.numel():
        return logprobs.sum()
    # zeros, so that nothing behind the mask can turn a product with it into NaN
    logprobs, old_logprobs, advantages = (
        torch.where(rollout, x, 0.0) for x in (logprobs, old_logprobs.detach(), advantages.detach())
    )
    empty = ~rollout.any()
    stand_in = torch.zeros_like(rollout)
    stand_in[0, 0] = True
    rollout = rollout | (stand_in & empty)
    loss = policy_loss(logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages, mask=rollout.to(mask.dtype))
    return torch.where(empty, 0.0, loss)


def at_least_one(tokens: float | Tensor) -> float | Tensor:
    """A divisor."""
    return tokens.clamp(min=1) if isinstance(tokens, Tensor) else max(tokens, 1)


def check_shapes(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, is_expert: Tensor) -> None:
    """Raises ValueError for shapes that do not belong together."""
    shape = tuple(logprobs.shape)
    if len(shape) != 2:
        raise ValueError(f"logprobs must be [B, T], got {shape}")
    for name, tensor, allowed in (
        ("old_logprobs", old_logprobs, (shape,)),
        ("advantages", advantages, (shape, shape[:1])),
        ("mask", mask, (shape,)),
        ("is_expert", is_expert, (shape[:1],)),
    ):
        if tuple(tensor.shape) not in allowed:
            wanted = " or ".join(map(str, allowed))
            raise ValueError(f"{name} must have the shape {wanted} of these logprobs, got {tuple(tensor.shape)}")

"""Token losses of the supervised branch, chunked so that no full fp32 copy of the logits is ever made."""

from typing import Any

import torch
from einops import rearrange
from torch.autograd.function import once_differentiable

IGNORE_INDEX = -100
_CHUNK_BYTES = 32 * 2**20
"""Size of the fp32 work buffer of one chunk of tokens."""


def shift_labels(labels: torch.Tensor) -> torch.Tensor:
    """Targets for position t: ``labels[..., t + 1]``, and -100 at the last position. Same shape as `labels`."""
    targets = torch.full_like(labels, IGNORE_INDEX)
    targets[..., :-1] = labels[..., 1:]
    return targets


class _TokenLoss(torch.autograd.Function):
    """Sum over tokens of ``w * nll`` with ``w`` = 1 or the detached ``p * (1 - p)``, times a given number or 1.

    Saves the logits and one number per token; the backward writes the gradient chunk by chunk in the dtype of the
    logits. Because ``w`` is detached, the gradient is ``w * (softmax - onehot)``.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, targets: torch.Tensor, phi: bool, weights: torch.Tensor | None
    ) -> torch.Tensor:
        tokens, vocabulary = logits.shape
        dtype = torch.promote_types(logits.dtype, torch.float32)
        chunk = max(1, _CHUNK_BYTES // (4 * max(1, vocabulary)))
        kept = targets != IGNORE_INDEX
        index = targets.masked_fill(~kept, 0).unsqueeze(1)
        normalizer = logits.new_empty(tokens, dtype=dtype)
        weight = kept.to(dtype) if weights is None else torch.where(kept, weights.to(logits.device, dtype), 0.0)
        total = logits.new_zeros((), dtype=dtype)
        for begin in range(0, tokens, chunk):
            part = slice(begin, begin + chunk)
            scores = logits[part].to(dtype)
            normalizer[part] = torch.logsumexp(scores, dim=1)
            nll = normalizer[part] - scores.gather(1, index[part]).squeeze(1)
            if phi:
                probability = torch.exp(-nll)
                weight[part] *= probability * (1 - probability)
            # torch.where, not a product: an ignored position may hold inf or nan
            total += torch.where(kept[part], weight[part] * nll, 0.0).sum()
        ctx.save_for_backward(logits, index, kept, normalizer, weight)
        ctx.chunk = chunk
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: torch.Tensor) -> Any:
        logits, index, kept, normalizer, weight = ctx.saved_tensors
        grad = torch.empty_like(logits)
        for begin in range(0, logits.shape[0], ctx.chunk):
            part = slice(begin, begin + ctx.chunk)
            chunk = (logits[part].to(normalizer.dtype) - normalizer[part, None]).exp_()
            chunk.scatter_add_(1, index[part], chunk.new_full((1, 1), -1.0).expand(chunk.shape[0], 1))
            chunk *= (weight[part] * grad_total).unsqueeze(1)
            grad[part] = chunk.masked_fill_(~kept[part, None], 0.0)
        return grad, None, None, None


def sft_token_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    num_tokens: float | torch.Tensor | None = None,
    phi: bool = False,
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal negative log-likelihood: sum over labelled tokens, divided by `num_tokens`.

    Args:
        logits: ``[..., T, V]``, any float dtype; the log-softmax runs in fp32 (fp64 for fp64 logits), a chunk of
            tokens at a time.
        labels: ``[..., T]`` int64, unshifted; -100 marks positions that carry no loss. Position t is predicted from
            the logits at t - 1, so a label at the first position is never used.
        num_tokens: what to divide by. A number or 0-dim tensor that spans a whole accumulation window (and all ranks)
            makes the micro-batch losses add up to one token mean, whatever the sequence lengths. Default: the
            labelled tokens of this batch. Values below 1 count as 1, so a batch without labels gives a zero loss that
            can still be differentiated.
        phi: weight each token with the detached ``p * (1 - p)`` of its own probability (CHORD-phi, arXiv 2508.11408).
            The divisor stays the token count.
        weights: what the losses of rows are multiplied by, without a graph: ``[...]``, one for each row of labels.
            The divisor stays the token count here too.

    Returns:
        0-dim tensor in fp32 (fp64 for fp64 logits).

    Raises:
        ValueError: shapes of `logits`, `labels` and `weights` do not belong together.
    """
    if logits.dim() < 2 or logits.shape[:-1] != labels.shape:
        raise ValueError(
            f"sft_token_loss: logits must be [..., T, V] and labels [..., T]; got {tuple(logits.shape)} and "
            f"{tuple(labels.shape)}. Pass unshifted labels, one per input position."
        )
    if weights is not None and weights.shape != labels.shape[:-1]:
        raise ValueError(
            f"sft_token_loss: weights must be one for each row, {tuple(labels.shape[:-1])}; got {tuple(weights.shape)}"
        )
    targets = rearrange(shift_labels(labels), "... -> (...)")
    flat = rearrange(logits, "... vocabulary -> (...) vocabulary")
    of_tokens = None if weights is None else weights[..., None].expand_as(labels).reshape(-1)
    return target_token_loss(flat, targets, num_tokens=num_tokens, phi=phi, weights=of_tokens)


def target_token_loss(
    logits: torch.Tensor,
    targets: torch.Tensor,
    *,
    num_tokens: float | torch.Tensor | None = None,
    phi: bool = False,
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """:func:`sft_token_loss` of logits ``[N, V]`` and what follows them, ``[N]`` int64; -100 carries no loss.

    ``weights`` are ``[N]``, one for each token.
    """
    total = _TokenLoss.apply(logits, targets, phi, weights)
    if num_tokens is None:
        num_tokens = (targets != IGNORE_INDEX).sum()
    if isinstance(num_tokens, torch.Tensor):
        return total / num_tokens.to(device=total.device, dtype=total.dtype).clamp(min=1)
    return total / max(num_tokens, 1)


def count_label_tokens(labels: torch.Tensor) -> torch.Tensor:
    """Number of tokens that `sft_token_loss` sums over: labels that are not -100, first position excluded."""
    return (labels[..., 1:] != IGNORE_INDEX).sum()

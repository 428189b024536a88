"""Log-probabilities and entropies from logits that a loss has computed already, without a second copy of them."""

from typing import Any

import torch
from einops import rearrange

from gac.losses import IGNORE_INDEX, shift_labels

_CHUNK_BYTES = 32 * 2**20
"""Size of the fp32 work buffer of one chunk of tokens."""


@torch.no_grad()
def label_logprobs(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each label under the logits of the position before it, and where there is one.

    Args:
        logits: ``[B, T, V]``, any float dtype; read in fp32 (fp64 for fp64), a chunk of tokens at a time.
        labels: ``[B, T]`` int64, unshifted; -100 marks positions without a label.

    Returns:
        ``[B, T]`` fp32 (or fp64), 0 where there is no label, and ``[B, T]`` bool. Entry t belongs to label t + 1.
    """
    targets = shift_labels(labels)
    kept = targets != IGNORE_INDEX
    index = rearrange(targets.masked_fill(~kept, 0), "b t -> (b t) 1")
    flat = rearrange(logits, "b t vocabulary -> (b t) vocabulary")
    result = torch.empty(flat.shape[0], dtype=torch.promote_types(logits.dtype, torch.float32), device=logits.device)
    for part in _chunks(flat):
        scores = flat[part].to(result.dtype)
        result[part] = scores.gather(1, index[part]).squeeze(1) - scores.logsumexp(1)
    return torch.where(kept, result.view_as(targets), 0.0), kept


@torch.no_grad()
def mean_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean entropy in nats of the distributions that predict a row's labels; 0 for a row without labels.

    Args:
        logits, labels: as for :func:`label_logprobs`.

    Returns:
        ``[B]`` fp32 (or fp64).
    """
    kept = shift_labels(labels) != IGNORE_INDEX
    flat = rearrange(logits, "b t vocabulary -> (b t) vocabulary")
    result = torch.empty(flat.shape[0], dtype=torch.promote_types(logits.dtype, torch.float32), device=logits.device)
    for part in _chunks(flat):
        logprobs = flat[part].to(result.dtype).log_softmax(1)
        result[part] = torch.special.entr(logprobs.exp()).sum(1)
    return masked_row_mean(result.view_as(kept), kept)


def masked_row_mean(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean over each row's unmasked entries, 0 for a row without any: ``[B, T], [B, T] -> [B]``."""
    kept = mask.bool()
    return torch.where(kept, values, 0.0).sum(1) / kept.sum(1).clamp(min=1)


def token_chunks(flat: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """``[N, V]`` in pieces of so many tokens that one of them in float32 takes 32 MiB; at least one piece."""
    return flat.split(_chunk_size(flat))


def _chunks(flat: torch.Tensor) -> Any:
    size = _chunk_size(flat)
    return (slice(begin, begin + size) for begin in range(0, flat.shape[0], size))


def _chunk_size(flat: torch.Tensor) -> int:
    return max(1, _CHUNK_BYTES // (4 * max(1, flat.shape[1])))

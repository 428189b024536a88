"""Rollouts and demonstrations in one padded batch, and a head that scores their labelled tokens alone. Needs no TRL."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint

from gac.losses import IGNORE_INDEX, shift_labels
from gac.trainers.demonstrations import DemonstrationBatch
from gac.trainers.token_stats import token_chunks


@dataclasses.dataclass(frozen=True)
class JointBatch:
    """Rows of rollouts, then of demonstrations.

    Attributes:
        input_ids, attention_mask: ``[R, W]``, each row where it would stand in a batch of its own, padded on the right.
        targets: ``[R, W]`` int64: what the logits of a position are asked for; -100: nothing.
        rollouts: how many rows are rollouts.
    """

    input_ids: Tensor
    attention_mask: Tensor
    targets: Tensor
    rollouts: int

    @property
    def scored(self) -> Tensor:
        """``[R, W]`` bool: positions whose logits are needed."""
        return self.targets != IGNORE_INDEX


def join(
    input_ids: Tensor, attention_mask: Tensor, completion: int, other: DemonstrationBatch, pad_id: int
) -> JointBatch:
    """One batch of rollouts and demonstrations.

    Args:
        input_ids, attention_mask: ``[B, T]``, of the rollouts. completion: the last so many positions are scored.
        other: the demonstrations, on the same device. pad_id: token that fills up rows.
    """
    labels = input_ids.masked_fill(attention_mask == 0, IGNORE_INDEX)
    labels[:, : labels.shape[1] - completion] = IGNORE_INDEX
    width = max(input_ids.shape[1], other.input_ids.shape[1])

    def both(first: Tensor, second: Tensor, fill: int) -> Tensor:
        return torch.cat([pad(x, (0, width - x.shape[1]), value=fill) for x in (first, second)])

    return JointBatch(
        both(input_ids, other.input_ids, pad_id),
        both(attention_mask, other.attention_mask, 0),
        shift_labels(both(labels, other.labels, IGNORE_INDEX)),
        len(input_ids),
    )


class SelectedHead:
    """Has a model's head called on chosen positions, so that nobody holds logits of prompts and padding.

    Args:
        head: the model's output embeddings.
    """

    def __init__(self, head: nn.Module) -> None:
        self._chosen: Tensor | None = None
        self._handle = head.register_forward_pre_hook(self._select)

    @contextmanager
    def only(self, chosen: Tensor) -> Iterator[None]:
        """Calls of the model inside give logits ``[1, n, V]`` of the positions ``chosen``: ``[R, W]`` bool."""
        self._chosen = chosen
        try:
            yield
        finally:
            self._chosen = None

    def _select(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if self._chosen is None:
            return None
        hidden = args[0]
        if hidden.shape[:-1] != self._chosen.shape:
            raise ValueError(
                f"the model's head is called with {tuple(hidden.shape)}, and a hidden state for each of "
                f"{tuple(self._chosen.shape)} positions was expected: estimator='sequence' does not serve this model"
            )
        return (hidden[self._chosen][None], *args[1:])

    def remove(self) -> None:
        """Leaves the head as it was."""
        self._handle.remove()


def scores(logits: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probabilities of tokens, and entropies of the distributions that they were drawn from, with a graph.

    Args:
        logits: ``[n, V]``, any float dtype; read in float32 (float64 for float64), a chunk of tokens at a time, and
            once more in the backward pass. targets: ``[n]`` int64. temperature: what logits are divided by.

    Returns:
        ``[n]`` and ``[n]``, float32 (float64).
    """
    parts = token_chunks(logits)
    lengths = [len(part) for part in parts]
    found = [
        checkpoint(_scores, part, own, temperature, use_reentrant=False, preserve_rng_state=False)
        for part, own in zip(parts, targets.split(lengths), strict=True)
    ]
    logprobs, entropies = zip(*found, strict=True)
    return torch.cat(logprobs), torch.cat(entropies)


def _scores(logits: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    with torch.autocast(logits.device.type, enabled=False):
        every = (logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature).log_softmax(1)
        return every.gather(1, targets[:, None])[:, 0], -(every.exp() * every).sum(1)

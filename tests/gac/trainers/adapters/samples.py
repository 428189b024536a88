"""A mixed batch as trainers hold it, and its loss written out row by row."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

CLIP, RESPONSE = 0.2, 5


@dataclass
class Samples:
    """``logprobs`` is a leaf with a graph; the rest is what a trainer keeps of a batch. Rows 0 and 3 demonstrations."""

    logprobs: Tensor
    old_logprobs: Tensor
    advantages: Tensor
    mask: Tensor
    is_expert: Tensor

    def rows(self, index) -> Samples:
        return Samples(*(getattr(self, f.name)[index] for f in fields(self)))


def samples(rows: int = 4, seed: int = 0) -> Samples:
    g = torch.Generator().manual_seed(seed)
    logprobs = -torch.rand(rows, RESPONSE, generator=g) * 2
    lengths = torch.randint(2, RESPONSE + 1, (rows, 1), generator=g)
    return Samples(
        logprobs=logprobs.requires_grad_(),
        old_logprobs=logprobs.detach() + 0.2 * torch.randn(rows, RESPONSE, generator=g),
        advantages=torch.randn(rows, 1, generator=g).expand(rows, RESPONSE).clone(),
        mask=(torch.arange(RESPONSE) < lengths).float(),
        is_expert=torch.arange(rows) % 3 == 0,
    )


def clipped(logprob: Tensor, old: Tensor, advantage: Tensor) -> Tensor:
    """PPO's loss of one token."""
    ratio = (logprob - old).exp()
    return torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - CLIP, 1 + CLIP))


def losses_by_hand(s: Samples) -> tuple[list[list[Tensor]], list[list[Tensor]]]:
    """For each demonstration its tokens' NLL, for each rollout its tokens' clipped loss."""
    sft, rl = [], []
    for b in range(len(s.mask)):
        kept = [t for t in range(RESPONSE) if s.mask[b, t]]
        if s.is_expert[b]:
            sft.append([-s.logprobs[b, t] for t in kept])
        else:
            rl.append([clipped(s.logprobs[b, t], s.old_logprobs[b, t], s.advantages[b, t]) for t in kept])
    return sft, rl


def token_mean(rows: list[list[Tensor]]) -> Tensor:
    tokens = [x for row in rows for x in row]
    return sum(tokens) / len(tokens)


def row_mean(rows: list[list[Tensor]]) -> Tensor:
    """Mean over rows of the mean over a row's tokens."""
    return sum(sum(row) / len(row) for row in rows) / len(rows)

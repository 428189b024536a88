"""A mixed batch as trainers hold it, and its loss written out row by row."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

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


class Policy(nn.Module):
    """Token ids ``[B, T]`` or packed ``[1, N]`` to log-probabilities of as many tokens, each by itself; has layers."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(60, 4)
        self.head = nn.Linear(4, 1)

    def forward(self, ids: Tensor) -> Tensor:
        return -self.head(self.embed(ids).tanh())[..., 0].exp()


def row_gradients(s: Samples, ids: Tensor, tokens: tuple[Tensor, Tensor]) -> list[Tensor]:
    """Each row's part of its branch's gradient, which ``tokens`` (of demonstrations, of rollouts) divide."""
    found = []
    for b in range(len(ids)):
        model = Policy()
        logprobs = model(ids[b])[-RESPONSE:]
        row = Samples(logprobs[None], *(getattr(s, f.name)[b : b + 1] for f in fields(s)[1:]))
        losses = losses_by_hand(row)[0 if s.is_expert[b] else 1]
        (sum(losses[0]) / tokens[0 if s.is_expert[b] else 1]).backward()
        found.append(torch.cat([p.grad.double().flatten() for p in model.parameters()]))
    return found

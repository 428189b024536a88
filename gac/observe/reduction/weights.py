"""What the contributions of a branch count for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Weights:
    """What the contributions of a branch count for.

    Args:
        tokens: ``[K]``; None where all count alike.
        k: number of contributions.
        device, dtype: of the numbers.

    Attributes:
        total: 0-dim, all tokens (``k`` where all count alike).
        n: 0-dim, contributions that count.
    """

    def __init__(self, tokens: Tensor | None, k: int, device: torch.device, dtype: torch.dtype) -> None:
        self._tokens = tokens
        if tokens is None:
            self.total = self.n = torch.full((), float(k), dtype=dtype, device=device)
        else:
            self.total, self.n = tokens.sum(), (tokens > 0).sum().to(dtype)

    @classmethod
    def told(cls, tokens: Sequence[Tensor | float | None], device: torch.device, dtype: torch.dtype) -> Weights:
        """From what the user said of each contribution."""
        stacked = None
        if tokens and tokens[0] is not None:
            stacked = torch.stack([scalar(t, device, dtype) for t in tokens])
        return cls(stacked, len(tokens), device, dtype)

    def divide(self, values: Tensor) -> Tensor:
        """``[K, ...]`` over the tokens; 0 where there are none."""
        if self._tokens is None:
            return values
        inverse = torch.where(self._tokens > 0, 1.0 / self._tokens, 0.0)
        return values * inverse.view(-1, *[1] * (values.dim() - 1))


def scalar(value: Tensor | float | None, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A number of tokens as a 0-dim tensor, without a wait for the device; 1 where it was not told."""
    if isinstance(value, Tensor):
        return value.detach().reshape(()).to(device=device, dtype=dtype, non_blocking=True)
    return torch.full((), 1.0 if value is None else float(value), dtype=dtype, device=device)

"""The weight of each branch in a step, and what undoes it."""

from __future__ import annotations

import torch
from torch import Tensor

from gac.statistics.branch import Branch


class Weights:
    """``mu`` for the SFT branch and ``1 - mu`` for the RL branch. New tensors for each step: those handed out stay.

    Args:
        mu: 0-dim, any float dtype.

    Attributes:
        mu: 0-dim float32.
        present: ``[2]`` bool, whether SFT and RL have a weight above 0.
        of: the weight of a branch's loss. undone: what takes a weighted gradient back; 0 for a weight of 0.
    """

    def __init__(self, mu: Tensor) -> None:
        self.mu = mu.to(torch.float32, copy=True)
        pair = torch.stack([self.mu, 1.0 - self.mu])
        self.present = pair > 0
        self.of = dict(zip(Branch, pair.unbind(), strict=True))
        self.undone = dict(zip(Branch, torch.where(self.present, 1.0 / pair, 0.0).unbind(), strict=True))

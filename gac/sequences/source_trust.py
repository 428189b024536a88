"""Weights of data sources by how surely their gradients point with that of the reward."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gac.sequences.sources import StepOfSources, products_with_rl
from gac.state import Numbers, Range, Table
from gac.statistics.branch import Branch
from gac.statistics.trust import probability_right

FEWEST = 8
"""Steps before which a source is not judged: a standard error of fewer says little."""

WINDOW = 128
"""Steps of a source that count: what it was worth earlier is forgotten, since policies and teachers change."""

LEAST = 0.05
"""The smallest weight: a source of weight 0 could not be measured any more, and never come back."""


@dataclass(frozen=True)
class Trust:
    """What is known of a source.

    Attributes:
        steps: that it was measured in, of the last :data:`WINDOW`.
        product: mean inner product with the RL branch's mean gradient. product_se: its standard error over steps.
        probability: that it points the way of the reward.
        weight: of its demonstrations, in [:data:`LEAST`, 1].
    """

    steps: int
    product: float
    product_se: float
    probability: float
    weight: float


class SourceTrust:
    """Follows the sources of demonstrations over steps (derivation: ``docs/laws.md``, weights of sources).

    In each step the inner product of a source's mean gradient with that of the rollouts is unbiased, whatever the noise
    of both. Its mean over steps and the standard error of that say how probable it is that the source points the way of
    the reward; a source weighs that probability over the prior one, at most 1: nothing known, or evidence for it, is 1.

    Args:
        labels: of all sources of demonstrations, in an order that is the same in every process.
        prior: probability that a source is right, before anything is measured.
        spread: of the cosine between the true gradients of a right source and the reward (root mean square).
    """

    def __init__(self, labels: Sequence[Hashable], prior: float = 0.7, spread: float = 0.2) -> None:
        if not labels or len(set(labels)) != len(labels):
            raise ValueError(f"labels must name each source once, got {list(labels)!r}")
        self._steps: dict[Hashable, deque[tuple[float, float, float]]] = {
            label: deque(maxlen=WINDOW) for label in labels
        }
        self._prior, self._spread = prior, spread
        self._found = {label: self._judge(label) for label in labels}

    def take(self, step: StepOfSources) -> None:
        """Takes in a step whose demonstrations had the weights of now; waits for the device."""
        for (label, branch), (dot, own, other) in products_with_rl(step).items():
            if branch is not Branch.SFT or label not in self._steps or not math.isfinite(dot + own + other):
                continue
            weight = self._found[label].weight
            self._steps[label].append((dot / weight, own / weight**2, other))
        self._found = {label: self._judge(label) for label in self._steps}

    def _judge(self, label: Hashable) -> Trust:
        values = torch.tensor(list(self._steps[label]), dtype=torch.float64).reshape(-1, 3)
        count = len(values)
        if count < FEWEST:
            return Trust(count, math.nan, math.nan, self._prior, 1.0)
        dot, own, other = values.mean(0)
        error = values[:, 0].std() / math.sqrt(count)
        scale = self._spread * (own.clamp(min=0) * other.clamp(min=0)).sqrt()
        probability = float(probability_right(dot, error, scale, self._prior))
        weight = min(max(probability / self._prior, LEAST), 1.0)
        return Trust(count, float(dot), float(error), probability, weight)

    def __getitem__(self, label: Hashable) -> Trust:
        """What is known of a source. Raises KeyError."""
        return self._found[label]

    def known(self) -> Mapping[Hashable, Trust]:
        """Of all sources."""
        return dict(self._found)

    def weights(self, labels: Sequence[Hashable]) -> Tensor:
        """The weights ``[N]`` of demonstrations of these sources, float64, on the CPU."""
        return torch.tensor([self._found[label].weight for label in labels], dtype=torch.float64)

    # -- state --------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Tensor]:
        """``steps``: ``[sources, window, 3]`` float64, NaN where there is none; the newest last."""
        found = torch.full((len(self._steps), WINDOW, 3), math.nan, dtype=torch.float64)
        for row, steps in zip(found, self._steps.values(), strict=True):
            if steps:
                row[-len(steps) :] = torch.tensor(list(steps), dtype=torch.float64)
        return {"steps": found}

    def entries(self) -> Table:
        """What :meth:`state_dict` may hold."""
        shape = (len(self._steps), WINDOW, 3)
        return Table({"steps": Numbers(shape, torch.float64, torch.device("cpu"), Range(unknown=True))})

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continues where :meth:`state_dict` left off."""
        for steps, rows in zip(self._steps.values(), state["steps"], strict=True):
            steps.clear()
            steps.extend(tuple(row) for row in rows[~rows[:, 0].isnan()].tolist())
        self._found = {label: self._judge(label) for label in self._steps}

"""What each source of data (a data set, a teacher) gives to the gradient: its noise, its signal, its direction."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gac.statistics.branch import Branch

Source = tuple[Hashable, Branch]
"""A label among the rows of one branch."""

Product = tuple[float, float, float]
"""Of two mean gradients in a step: their inner product and both squares, unbiased."""


@dataclass
class SourceSums:
    """Sums of a step's contributions by source, on this rank.

    Attributes:
        totals: ``[K]`` float32 of each, the sketch of its part of the gradient.
        power: 0-dim, its ``sum |x|^2``. n: 0-dim, its contributions.
    """

    totals: dict[Source, Tensor] = field(default_factory=dict)
    power: dict[Source, Tensor] = field(default_factory=dict)
    n: dict[Source, Tensor] = field(default_factory=dict)

    def take(self, labels: Sequence[Hashable], counts: Tensor, table: Tensor, squares: Tensor, scales: Tensor) -> None:
        """Takes in the rows of a batch.

        Args:
            labels: of each row. counts: ``[2, B]``, which rows are contributions of SFT and RL.
            table: ``[B, K]``. squares: ``[B]``, their squares. scales: ``[2]``, of the branches.
        """
        for label in dict.fromkeys(labels):
            own = torch.tensor([other == label for other in labels]).to(counts.device, non_blocking=True)
            for k, branch in enumerate(Branch):
                chosen = counts[k] * own
                total = (chosen.to(table.dtype) @ table) * scales[k].to(table.dtype)
                power = torch.where(chosen > 0, squares, 0.0).sum() * scales[k].square()
                for kept, value in ((self.totals, total), (self.power, power), (self.n, chosen.sum())):
                    kept[label, branch] = kept.get((label, branch), 0.0) + value

    def record(self, totals: Tensor, power: Tensor, n: Tensor) -> StepOfSources | None:
        """The step's numbers, with those of both branches (``[2, K]``, ``[2]``, ``[2]`` on this rank) at the end."""
        if not self.totals:
            return None
        rows = torch.stack([*self.totals.values(), *totals])
        numbers = torch.stack([torch.stack([*self.power.values(), *power]), torch.stack([*self.n.values(), *n])])
        return StepOfSources(tuple(self.totals), (rows @ rows.T).to(power.dtype), numbers)

    def of_labels(self, labels: Sequence[Hashable], totals: Tensor, power: Tensor) -> tuple[Tensor, Tensor]:
        """``[2 L, K]`` and ``[2, 2 L]``: totals, and squares and counts, of each label in either branch.

        Zeros where this rank has none; the layout is the same on every rank. ``totals`` and ``power`` say of which
        shapes, kinds and devices they are.
        """
        places = pairs_of(labels)
        nothing, zero = torch.zeros_like(totals[0]), torch.zeros_like(power[0])
        rows = torch.stack([self.totals.get(source, nothing) for source in places])
        own = [torch.stack([kept.get(source, zero) for source in places]) for kept in (self.power, self.n)]
        return rows, torch.stack(own)


def pairs_of(labels: Sequence[Hashable]) -> tuple[Source, ...]:
    """Each label in either branch."""
    return tuple((label, branch) for label in labels for branch in Branch)


@dataclass(frozen=True)
class StepOfSources:
    """One step: of its sources, then of both branches.

    Attributes:
        sources: ``S`` of them. gram: ``[S + 2, S + 2]``, inner products of their gradients.
        numbers: ``[2, S + 2]``, ``sum |x|^2`` and contributions.
    """

    sources: tuple[Source, ...]
    gram: Tensor
    numbers: Tensor


@dataclass(frozen=True)
class SourceRow:
    """One source, over the steps in which it had two contributions or more.

    Attributes:
        label, branch: which. steps: of them. n: contributions in all.
        noise: of a single contribution, ``E |x - g|^2``. signal: ``|g|^2`` of its mean, unbiased; may be negative.
        noise_se, signal_se: standard errors of their means over steps; NaN below two.
        cosine: of its mean gradient with that of the RL branch (of its other rows, for a source of rollouts), from
            unbiased inner products and norms. cosine_se: its standard error, a jackknife over steps; NaN below three.
    """

    label: Hashable
    branch: Branch
    steps: int
    n: int
    noise: float
    signal: float
    cosine: float
    cosine_se: float
    noise_se: float = math.nan
    signal_se: float = math.nan


@dataclass(frozen=True)
class SourceTable:
    """All sources; ``print`` it.

    Attributes:
        rows: one for each source. cosines: ``[S, S]`` between their mean gradients, float64; NaN on the diagonal.
        cosine_errors: ``[S, S]``, standard errors of these.
    """

    rows: tuple[SourceRow, ...]
    cosines: Tensor
    cosine_errors: Tensor

    def __getitem__(self, label: Hashable) -> SourceRow:
        """The row of a label (of ``(label, branch)``, where both branches have it). Raises KeyError."""
        for row in self.rows:
            if label in (row.label, (row.label, row.branch)):
                return row
        raise KeyError(f"no source {label!r}; known: {', '.join(repr(row.label) for row in self.rows)}")

    def __str__(self) -> str:
        head = ("source", "branch", "steps", "n", "noise", "signal", "cosine with RL")
        lines = [head]
        for row in self.rows:
            cosine = f"{row.cosine:.3f} +- {row.cosine_se:.3f}"
            numbers = (str(row.steps), str(row.n), f"{row.noise:.3g}", f"{row.signal:.3g}", cosine)
            lines.append((str(row.label), row.branch.value, *numbers))
        widths = [max(len(line[k]) for line in lines) for k in range(len(head))]
        return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) for line in lines)


def table_of(history: Sequence[StepOfSources]) -> SourceTable:
    """The table of some steps; waits for the device."""
    steps = [(step.sources, step.gram.double().cpu(), step.numbers.double().cpu()) for step in history]
    # a label has a place in both branches; most have rows in one
    present = [[source for k, source in enumerate(names) if numbers[1, k] > 0] for names, _, numbers in steps]
    sources = list(dict.fromkeys(source for names in present for source in names))
    pairs: dict[tuple[Source, Any], list[Product]] = {}
    alone: dict[Source, list[tuple[float, float, float]]] = {source: [] for source in sources}
    for names, gram, (power, n) in steps:
        means = {s: _Mean(gram[k, k], power[k], n[k]) for k, s in enumerate(names)}
        for source, product in _with_rl(names, gram, power, n).items():
            pairs.setdefault((source, None), []).append(product)
        for k, source in enumerate(names):
            own = means[source]
            if own.n < 2:
                continue
            alone[source].append((own.noise, own.square, own.n))
            for j, other in enumerate(names):
                if j != k and means[other].n >= 2:
                    dot = gram[k, j] / (own.n * means[other].n)
                    pairs.setdefault((source, other), []).append((float(dot), own.square, means[other].square))
    rows = []
    for source in sources:
        found = torch.tensor(alone[source], dtype=torch.float64).reshape(-1, 3)
        cosine, error = cosine_of(pairs.get((source, None), []))
        (noise, noise_se), (signal, signal_se) = (_mean(found[:, k]) for k in (0, 1))
        counts = len(found), int(found[:, 2].sum())
        rows.append(SourceRow(*source, *counts, noise, signal, cosine, error, noise_se, signal_se))
    between = torch.full((2, len(sources), len(sources)), math.nan, dtype=torch.float64)
    for k, source in enumerate(sources):
        for j, other in enumerate(sources):
            if k != j:
                between[:, k, j] = torch.tensor(cosine_of(pairs.get((source, other), [])), dtype=torch.float64)
    return SourceTable(tuple(rows), between[0], between[1])


def products_with_rl(step: StepOfSources) -> dict[Source, Product]:
    """Of the sources that had two contributions or more, with the RL branch's others; waits for the device."""
    power, n = step.numbers.double().cpu()
    return _with_rl(step.sources, step.gram.double().cpu(), power, n)


def _with_rl(names: Sequence[Source], gram: Tensor, power: Tensor, n: Tensor) -> dict[Source, Product]:
    found, rl = {}, len(names) + 1
    for k, source in enumerate(names):
        own = _Mean(gram[k, k], power[k], n[k])
        # of a source of rollouts, the other rollouts: its own would be compared with themselves
        others = source[1] is Branch.RL
        square = gram[rl, rl] + others * (gram[k, k] - 2 * gram[k, rl])
        rest = _Mean(square, power[rl] - others * power[k], n[rl] - others * n[k])
        if own.n >= 2 and rest.n >= 2:
            dot = (gram[k, rl] - others * gram[k, k]) / (own.n * rest.n)
            found[source] = float(dot), own.square, rest.square
    return found


class _Mean:
    """A step's mean contribution of a source: its unbiased square, from ``|G|^2``, ``sum |x|^2`` and ``n``."""

    def __init__(self, total2: Tensor, power: Tensor, n: Tensor) -> None:
        self.n = float(n)
        self.noise = self.square = math.nan
        if self.n >= 2:
            self.noise = float(power - total2 / self.n) / (self.n - 1)
            self.square = float(total2) / self.n**2 - self.noise / self.n


def _mean(values: Tensor) -> tuple[float, float]:
    """Over steps, and its standard error."""
    if not len(values):
        return math.nan, math.nan
    error = float(values.std() / math.sqrt(len(values))) if len(values) > 1 else math.nan
    return float(values.mean()), error


def cosine_of(steps: Sequence[Product]) -> tuple[float, float]:
    """From the products of steps: the cosine of their means, and its jackknife error over steps; NaN where unknown."""
    if not steps:
        return math.nan, math.nan
    values = torch.tensor(steps, dtype=torch.float64)
    whole = _ratio(values.mean(0))
    if len(values) < 3:
        return float(whole), math.nan
    left_out = _ratio((values.sum(0) - values) / (len(values) - 1))
    spread = (left_out - left_out.mean()).square().sum() * (len(values) - 1) / len(values)
    return float(whole), float(spread.sqrt())


def _ratio(means: Tensor) -> Tensor:
    dot, a, b = means.unbind(-1)
    return torch.where((a > 0) & (b > 0), dot / (a * b).abs().sqrt(), math.nan)

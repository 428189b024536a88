"""The sums that one optimizer step's contributions leave behind, for the parameters of one device.

Three ways to take a contribution ``x`` in, chosen by :class:`gac.observer.Observer`:

``running``
    ``p.grad`` holds the running sum ``R`` of what was accumulated. ``S R`` is written over ``current`` and the
    contribution's sketch is the difference from ``previous``. Nothing of the gradient's size is kept.
``incoming``
    the gradient is seen before accumulation and sketched over ``current``, region by region; regions of parameters
    that got no gradient are cleared at the contribution's end.
``incoming``, lossless layout
    every element has its own bucket: ``x`` goes straight into the branch's total, and its norm is the one from the
    same read, so nothing is approximated.

Launches of a contribution on a GPU: two for each call of ``read`` (one more for each further dtype among the gradients)
and, except in the last way, one at the end. The second way makes one more where regions have to be cleared, and two
more for a call with parameters that were read before. Sums are added up by the same kernels and become numbers in
:meth:`Ledger.sums`, once a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum

import torch
import torch.distributed as dist
from torch import Tensor

from gac_kernels import SketchLayout, absorb_, pair_moments, sketch
from gac_kernels.arguments import accumulator_dtype
from gac_kernels.layout import LANES

SMALLEST_SKETCH = 65_536
"""Buckets of a small model's sketch: relative error of a norm about sqrt(2 / 65536) = 0.6%."""

ELEMENTS_PER_BUCKET = 4096
"""For large models: four fp32 vectors of P/4096 are 0.2% of the bytes of a bf16 gradient."""


class Branch(str, Enum):
    """The two signals of a hybrid step."""

    SFT = "sft"
    RL = "rl"


class Ledger:
    """Buffers and sums of one device. Everything but the counts is a tensor, and nothing is read on the host.

    Args:
        numels: elements of each parameter (its local shard, where it is sharded).
        device: where the parameters live.
        lossless: give every element its own bucket.
        running: contributions are differences of running sums.
        seed: selects the sketch's signs.
    """

    def __init__(self, numels: Sequence[int], device: torch.device, *, lossless: bool, running: bool, seed: int = 0):
        total = sum(numels)
        size = None if lossless else max(SMALLEST_SKETCH, total // ELEMENTS_PER_BUCKET)
        self.layout = SketchLayout.per_tensor(numels, size=size, seed=seed)
        self.device = device
        self.running = running
        self.direct = self.layout.lossless and not running
        m = self.layout.size
        vectors = 2 if self.direct else 3 + running
        self._vectors = torch.zeros(vectors * m, dtype=torch.float32, device=device)
        parts = self._vectors.split(m) if m else [self._vectors] * vectors
        self.totals: dict[Branch, Tensor] = {Branch.SFT: parts[0], Branch.RL: parts[1]}
        self.current = None if self.direct else parts[2]
        self.previous = parts[3] if running else None
        # A row for each branch: squares and non-finite elements as read, then the squares that absorb_ finds.
        cells = 0 if self.direct else -(-m // LANES)
        self._sums = torch.zeros(2, 2 + cells + cells % 2, dtype=accumulator_dtype(device), device=device)
        self._moments = {branch: row[:2] for branch, row in zip(Branch, self._sums, strict=True)}
        self._squares = {branch: row[2 : 2 + cells] for branch, row in zip(Branch, self._sums, strict=True)}
        self._scales: dict[Branch, Tensor] = {}  # of the contributions that went straight into the totals
        self._reduced: Tensor | None = None
        self._filled: set[int] = set()  # regions of current that hold the open contribution ...
        self._stale: set[int] = set()  # ... and those that hold an earlier one
        self._nothing = torch.empty(0, device=device)

    @property
    def nbytes(self) -> int:
        """Device memory of the sketches."""
        return self._vectors.nbytes + self._sums.nbytes

    def begin(self) -> None:
        """Before the first gradient of a contribution."""
        self._stale |= self._filled
        self._filled = set()

    def read(self, branch: Branch, indices: Sequence[int], gradients: Sequence[Tensor], scale: Tensor) -> None:
        """Takes in some parameters' gradients (or running sums) of the open contribution, each once."""
        into = self._moments[branch]
        if self.direct:
            self._scales[branch] = scale  # one for the whole step
            sketch(
                gradients,
                self.totals[branch],
                layout=self.layout,
                regions=indices,
                scale=scale,
                accumulate=True,
                into=into,
            )
            return
        again = () if self.running else self._filled.intersection(indices)
        if again:  # parameters whose gradient comes in parts
            pairs = list(zip(indices, gradients, strict=True))
            self._sketch([k for k in indices if k in again], [g for k, g in pairs if k in again], into, accumulate=True)
            indices, gradients = [k for k in indices if k not in again], [g for k, g in pairs if k not in again]
        if indices:
            self._sketch(indices, gradients, into)
        if not self.running:
            self._filled.update(indices)

    def _sketch(self, indices: Sequence[int], gradients: Sequence[Tensor], into: Tensor, *, accumulate=False) -> None:
        sketch(gradients, self.current, layout=self.layout, regions=indices, accumulate=accumulate, into=into)

    def end(self, branch: Branch, scale: Tensor) -> None:
        """After the last gradient of a contribution."""
        if self.direct:
            return
        left = sorted(self._stale - self._filled)
        if left:
            self._sketch(left, [self._nothing] * len(left), self._moments[branch])  # writes zeros
        self._stale.clear()
        absorb_(self.current, self.previous, self.totals[branch], scale, into=self._squares[branch])

    def sums(self) -> Tensor:
        """``[6]``: ``sum_k |x_k|^2`` of SFT and RL, non-finite elements, ``|G_s|^2``, ``|G_r|^2``, ``<G_s, G_r>``."""
        own = self._own_sums() if self._reduced is None else self._reduced
        return torch.cat([own, pair_moments(self.totals[Branch.SFT], self.totals[Branch.RL])])

    def _own_sums(self) -> Tensor:
        """``[3]``: ``sum_k |x_k|^2`` of SFT and RL, non-finite elements; of this rank."""
        if self.direct:
            powers = [self._moments[b][0] for b in Branch]
            for k, b in enumerate(Branch):
                if b in self._scales:
                    powers[k] = powers[k] * self._scales[b].square()
        else:
            powers = [self._squares[b].sum() for b in Branch]
        return torch.stack([*powers, self._sums[:, 1].sum()])

    def all_reduce(self, world: int, group: dist.ProcessGroup | None) -> None:
        """Sums the totals over ranks, as contributions to the mean gradient of ``world`` ranks."""
        totals = self._vectors[: 2 * self.layout.size]
        self._reduced = self._own_sums()
        dist.all_reduce(totals, group=group)
        dist.all_reduce(self._reduced, group=group)
        totals /= world
        self._reduced[:2] /= world**2

    def clear(self) -> None:
        """Forgets the step."""
        self._vectors.zero_()
        self._sums.zero_()
        self._scales.clear()
        self._reduced = None
        self._filled, self._stale = set(), set()

"""The sums that one optimizer step's contributions leave behind, for the parameters of one device.

Three ways to take a contribution ``x`` in, chosen by :class:`gac.observer.Observer`:

``running``
    ``p.grad`` holds the running sum ``R`` of what was accumulated. ``S R`` is written over ``current`` and the
    contribution's sketch is the difference from ``previous``. Nothing of the gradient's size is kept.
``incoming``
    the gradient is seen before accumulation and sketched into a cleared ``current``.
``incoming``, lossless layout
    every element has its own bucket: ``x`` goes straight into the branch's total, and its norm is the one from the
    same read, so nothing is approximated.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum

import torch
import torch.distributed as dist
from torch import Tensor

from gac_kernels import SketchLayout, absorb_, pair_moments, sketch
from gac_kernels.arguments import accumulator_dtype

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
        self._sums = torch.zeros(3, dtype=accumulator_dtype(device), device=device)
        self.power: dict[Branch, Tensor] = {Branch.SFT: self._sums[0], Branch.RL: self._sums[1]}
        self.nonfinite = self._sums[2]

    @property
    def nbytes(self) -> int:
        """Device memory of the sketches."""
        return self._vectors.nbytes + self._sums.nbytes

    def begin(self) -> None:
        """Before the first gradient of a contribution."""
        if not self.running and not self.direct:
            self.current.zero_()

    def read(self, branch: Branch, indices: Sequence[int], gradients: Sequence[Tensor], scale: Tensor) -> None:
        """Takes in some parameters' gradients (or running sums) of the open contribution, each once."""
        if self.direct:
            out, factor, accumulate = self.totals[branch], scale, True
        else:
            out, factor, accumulate = self.current, None, not self.running
        square, nonfinite = sketch(
            gradients, out, layout=self.layout, regions=indices, scale=factor, accumulate=accumulate
        ).unbind()
        self.nonfinite += nonfinite
        if self.direct:
            self.power[branch] += square * scale.square()

    def end(self, branch: Branch, scale: Tensor) -> None:
        """After the last gradient of a contribution."""
        if not self.direct:
            self.power[branch] += absorb_(self.current, self.previous, self.totals[branch], scale).sum()

    def sums(self) -> Tensor:
        """``[6]``: ``sum_k |x_k|^2`` of SFT and RL, non-finite elements, ``|G_s|^2``, ``|G_r|^2``, ``<G_s, G_r>``."""
        return torch.cat([self._sums, pair_moments(self.totals[Branch.SFT], self.totals[Branch.RL])])

    def all_reduce(self, world: int, group: dist.ProcessGroup | None) -> None:
        """Sums the totals over ranks, as contributions to the mean gradient of ``world`` ranks."""
        totals = self._vectors[: 2 * self.layout.size]
        dist.all_reduce(totals, group=group)
        dist.all_reduce(self._sums, group=group)
        totals /= world
        self._sums[:2] /= world**2

    def clear(self) -> None:
        """Forgets the step."""
        self._vectors.zero_()
        self._sums.zero_()

"""The sums that one optimizer step's contributions leave behind, for the parameters of one device.

Four ways to take a contribution ``x`` in, chosen by :class:`gac.observe.observer.Observer`:

``running``
    ``p.grad`` holds the running sum ``R`` of what was accumulated. It is read at the contribution's end, whose sketch
    is the difference of ``S R`` and ``previous``. Nothing of the gradient's size is kept.
``incoming``
    the gradient is seen before accumulation and sketched over ``current``, region by region; regions of parameters
    that got no gradient are cleared at the contribution's end, and ``absorb_`` adds it to the branch's total.
``incoming``, lossless layout
    every element has its own bucket: ``x`` itself goes into the branch's total, and its norm is the one from the same
    read, so nothing is approximated.
``running``, lossless layout
    the same with the difference of ``R`` and what it was before, once for each parameter, at the contribution's end.

Launches of a contribution on a GPU: two (one more for each further dtype among the gradients) where running sums are
read, else two for each call of ``read``, and without a lossless layout one at the end. The second way makes one more
where regions have to be cleared, and two more for a call with parameters that were read before. Every contribution has
a row of sums of its own, which the same kernels add up and which become numbers once a step. In a step that is also
taken apart by module, every call is cut into one for each module.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from gac.observe.contribution_sums import ContributionSums
from gac.observe.outdated import Outdated
from gac.observe.summing import Adding, Summing
from gac.statistics import Branch
from gac_kernels import SketchLayout, absorb_, absorb_sketch_, accumulate_, cpu, pair_moments, sketch
from gac_kernels.arguments import accumulator_dtype
from gac_kernels.cpu import arriving
from gac_kernels.cpu.arriving import ArrivingSums
from gac_kernels.layout import LANES
from gac_kernels.ops import traced

SMALLEST_SKETCH = 65_536
"""Buckets of a small model's sketch: relative error of a norm about sqrt(2 / 65536) = 0.6%."""

ELEMENTS_PER_BUCKET = 4096
"""For large models: four fp32 vectors of P/4096 are 0.2% of the bytes of a bf16 gradient."""


def sketch_size(elements: int) -> int:
    """Buckets wished for the sketch of so many elements; the layout rounds them up."""
    return max(SMALLEST_SKETCH, elements // ELEMENTS_PER_BUCKET)


class Ledger(ContributionSums):
    """Buffers and sums of one device. Everything but the counts is a tensor, and nothing is read on the host.

    Args:
        numels: elements of each parameter (its local shard, where it is sharded).
        device: where the parameters live.
        lossless: give every element its own bucket.
        running: contributions are differences of running sums.
        seed: selects the sketch's signs.
        modules: index of each parameter's module; None: all in one.
        module_count: modules of the whole model.
        copies: ranks that hold the same pieces.
    """

    launching = ("read", "end")
    """Methods that run kernels, for :class:`gac.observe.device_time.DeviceTime`."""

    def __init__(
        self,
        numels: Sequence[int],
        device: torch.device,
        *,
        lossless: bool,
        running: bool,
        seed: int = 0,
        modules: Sequence[int] | None = None,
        module_count: int = 1,
        copies: int = 1,
    ):
        size = None if lossless else sketch_size(sum(numels))
        self.layout = SketchLayout.per_tensor(numels, size=size, seed=seed)
        hash(self.layout)  # which it keeps: now, before steps are timed
        self.device = device
        self.running = running
        self.lossless = self.layout.lossless
        self.direct = self.lossless and not running
        m = self.layout.size
        self.vectors = 2 if self.direct else 3
        """Vectors of the layout's size that are kept."""
        self._vectors = torch.zeros(self.vectors * m, dtype=torch.float32, device=device)
        parts = self._vectors.split(m) if m else [self._vectors] * self.vectors
        self._totals: dict[Branch, Tensor] = {Branch.SFT: parts[0], Branch.RL: parts[1]}
        self._previous = parts[2] if running else None
        self.current = None if self.lossless or running else parts[2]
        self.modules = list(modules) if modules is not None else [0] * len(numels)
        self.module_count = module_count
        self.copies = copies
        self.by_module = False
        """Whether the contributions of this step are taken apart by module; set it between steps."""
        # A row for each contribution: squares and non-finite elements as read (of differences, where the layout is
        # lossless), then the squares of what the total has gained.
        cells = 0 if self.lossless else self.layout.cells if running else -(-m // LANES)
        self._cells = slice(2, 2 + cells)
        self._set_rows(torch.zeros(8, 2 + cells + cells % 2, dtype=accumulator_dtype(device), device=device))
        self._module_rows: list[Tensor] = []  # [modules, 2] for each contribution of a step taken apart
        self._scales: list[Tensor] = []  # of each contribution
        self._filled: set[int] = set()  # regions of current that hold the open contribution ...
        self._stale: set[int] = set()  # ... and those that hold an earlier one
        on_host = self.lossless and Summing.serves(device.type)
        self._adding = Adding(self._totals, self._previous, self.layout, self.modules) if on_host else None
        self._sums: dict[int, tuple[Tensor, Tensor | None]] = {}  # running sums that are read at the end, by region
        self._eps = 0.0
        may_stay = (self.direct or running) and Summing.serves(device.type)
        self._outdated = [Outdated(part, self.layout, may_stay=may_stay) for part in parts]
        self._rows_are_clear = True
        self._nothing = torch.empty(0, device=device)

    def _set_rows(self, rows: Tensor) -> None:
        self._rows, self._most = rows, rows.shape[0]
        self._summing: Summing | None = None  # over these rows
        # made once: a view costs as much as a small sum
        self._views = [(row[:2], row[self._cells], row[: self._cells.stop]) for row in rows]

    @property
    def nbytes(self) -> int:
        """Device memory of the sketches and sums."""
        return self._vectors.nbytes + self._rows.nbytes

    def _settle(self) -> None:
        self._outdated[0].settle()
        self._outdated[1].settle()

    @property
    def totals(self) -> dict[Branch, Tensor]:
        """``[m]`` of each branch: the sum of its contributions, or of their sketches."""
        self._settle()
        return self._totals

    @property
    def previous(self) -> Tensor | None:
        """``[m]``: the running sums, or their sketch, before the next contribution; None where nobody reads them."""
        if self._previous is not None:
            self._outdated[2].settle()
        return self._previous

    @property
    def both_totals(self) -> Tensor:
        """``[2m]``: both branches' totals as one vector."""
        self._settle()
        return self._vectors[: 2 * self.layout.size]

    @cached_property
    def _segments(self) -> list[tuple[int, slice]]:
        """Stretches of buckets that belong to one module."""
        segments: list[tuple[int, slice]] = []
        for region, module in enumerate(self.modules):
            start = self.layout.bucket_offsets[region]
            stop = start + self.layout.region_size(self.layout.numels[region])
            if segments and segments[-1][0] == module and segments[-1][1].stop == start:
                segments[-1] = (module, slice(segments[-1][1].start, stop))
            elif stop > start:
                segments.append((module, slice(start, stop)))
        return segments

    @cached_property
    def _membership(self) -> Tensor:
        """``[modules, segments]``: 1 where the segment is the module's."""
        matrix = torch.zeros(self.module_count, len(self._segments), dtype=self._rows.dtype)
        for column, (module, _) in enumerate(self._segments):
            matrix[module, column] = 1.0
        return matrix.to(self.device)

    # -- contributions --------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Before the first gradient of a contribution."""
        self._rows_are_clear = False
        if not self.direct:
            self._stale |= self._filled
            self._filled = set()
            self._sums.clear()
        if len(self._scales) == self._most:
            self._set_rows(torch.cat([self._rows, torch.zeros_like(self._rows)]))
        if self.by_module:
            del self._module_rows[len(self._scales) :]  # of a contribution that was given up
            self._module_rows.append(torch.zeros(self.module_count, 2, dtype=self._rows.dtype, device=self.device))

    def know(
        self,
        indices: Sequence[int],
        sums: Sequence[Tensor],
        second_moments: Sequence[Tensor] | None = None,
        eps: float = 0.0,
    ) -> None:
        """Takes running sums as the ones before the next contribution; parameters that are not named have none."""
        assert self._previous is not None  # only running sums are asked for
        weights: dict[str, Any] = {} if second_moments is None else {"second_moments": second_moments, "eps": eps}
        self._previous.zero_()
        self._outdated[2].renew()
        if indices:
            read = accumulate_ if self.lossless else sketch
            read(sums, self._previous, layout=self.layout, regions=indices, **weights)

    def read(
        self,
        branch: Branch,
        indices: Sequence[int],
        gradients: Sequence[Tensor],
        scale: Tensor,
        second_moments: Sequence[Tensor] | None = None,
        eps: float = 0.0,
    ) -> None:
        """Takes in some parameters' gradients (or running sums) of the open contribution, each once.

        ``second_moments``, one for each gradient, make it a measurement in the optimizer's space: each element is
        divided by ``sqrt(v) + eps`` on the way. Running sums are read at the contribution's end: a parameter whose
        gradient comes in parts then makes one difference.
        """
        if self.direct:
            self._accumulate(branch, indices, gradients, scale, second_moments, eps)
        elif self.running:
            moments = [None] * len(indices) if second_moments is None else second_moments
            self._sums.update(zip(indices, zip(gradients, moments, strict=True), strict=True))
            self._eps = eps
        else:
            self._read(indices, gradients, second_moments, eps, self._views[len(self._scales)][0])

    def read_instead(self, region: int, gradient: Tensor) -> bool:
        """Reads this tensor at the contribution's end where the region's running sum was to be read; always True."""
        if region in self._sums:
            self._sums[region] = gradient, self._sums[region][1]
        return True

    def _gather(self, branch: Branch, scale: Tensor) -> None:
        """Reads the running sums of the contribution."""
        if not self._sums:
            return
        gradients, moments = zip(*self._sums.values(), strict=True)
        weighted = None if moments[0] is None else list(moments)
        how = self._accumulate if self.lossless else self._absorb
        how(branch, list(self._sums), list(gradients), scale, weighted, self._eps)
        self._sums.clear()

    def _absorb(
        self, branch: Branch, indices: Any, gradients: Any, scale: Tensor, second_moments: Any, eps: float
    ) -> None:
        """Adds the sketch of what running sums have gained to a branch's total, by module where that is asked."""
        vectors, common = (self._previous, self._totals[branch], scale), {"layout": self.layout, "eps": eps}
        if not self.by_module:
            absorb, fresh = _writing("absorb_sketch_", absorb_sketch_, self._fresh(branch, indices))
            into = self._views[len(self._scales)][2]
            absorb(gradients, *vectors, regions=indices, second_moments=second_moments, into=into, **common, **fresh)
            return
        for module, at in self._by_module(indices):
            weights = None if second_moments is None else [second_moments[j] for j in at]
            regions, some = [indices[j] for j in at], [gradients[j] for j in at]
            absorb, fresh = _writing("absorb_sketch_", absorb_sketch_, self._fresh(branch, regions))
            sums = absorb(some, *vectors, regions=regions, second_moments=weights, **common, **fresh)
            self._module_rows[-1][module] += torch.stack([sums[2:].sum(), sums[1]])

    def _by_module(self, indices: Sequence[int]) -> list[tuple[int, list[int]]]:
        """The modules of some parameters, each with the positions of its own among them."""
        found: dict[int, list[int]] = {}
        for j, k in enumerate(indices):
            found.setdefault(self.modules[k], []).append(j)
        return list(found.items())

    def _accumulate(
        self, branch: Branch, indices: Any, gradients: Any, scale: Tensor, second_moments: Any, eps: float
    ) -> None:
        """Adds gradients, or what running sums have gained, to a branch's total, by module where that is asked."""
        fresh, plain = self._fresh(branch, indices), self._adding is not None and second_moments is None
        into = self._module_rows[-1] if self.by_module else self._views[len(self._scales)][0]
        if plain and self._adding(branch, gradients, indices, scale, into, fresh, by_module=self.by_module):  # type: ignore[misc]
            return
        accumulate, options = _writing("accumulate_", accumulate_, fresh)
        options |= {"layout": self.layout, "previous": self._previous, "scale": scale, "eps": eps}
        total = self._totals[branch]
        if not self.by_module:
            accumulate(gradients, total, regions=indices, second_moments=second_moments, into=into, **options)
            return
        for module, at in self._by_module(indices):
            options["second_moments"] = None if second_moments is None else [second_moments[j] for j in at]
            regions, some = [indices[j] for j in at], [gradients[j] for j in at]
            accumulate(some, total, regions=regions, into=into[module], **options)

    def sums_of_arriving(self, accumulated: list[Any]) -> ArrivingSums | None:
        """Hooks that add gradients as they arrive; None where there are none. See :class:`ArrivingSums`."""
        if self._adding is None or not (self.direct and arriving.serves()):
            return None
        return ArrivingSums(accumulated, list(self._totals.values()), self.layout)

    def begin_arriving(self, sums: ArrivingSums, branch: Branch, scale: Tensor) -> bool:
        """Has what comes from now on added to a branch's total; False where it must come to :meth:`read`."""
        if self._adding is None or traced():
            return False
        which = int(branch is Branch.RL)
        sums.begin(which, scale=self._adding.number(scale), fresh=self._outdated[which].by_region())
        return True

    def end_arriving(self, sums: ArrivingSums, count: int) -> None:
        """Takes the moments of what was added, of so many parameters, as the open contribution's."""
        if self.by_module and self._adding is not None:
            each, regions = sums.each(count)
            self._module_rows[-1].index_add_(0, self._adding.modules[regions], each)
        else:
            sums.sums(self._views[len(self._scales)][0])

    def _fresh(self, branch: Branch, regions: Sequence[int]) -> int:
        """Bits: whether an earlier step's numbers are to be written over in the total (1), in running sums (2)."""
        fresh = int(self._outdated[0 if branch is Branch.SFT else 1].take(regions))
        if self._previous is not None:
            fresh |= self._outdated[2].take(regions) << 1
        return fresh

    def _read(self, indices: Any, gradients: Any, second_moments: Any, eps: float, into: Any) -> None:
        again = self._filled.intersection(indices)
        if again:  # parameters whose gradient comes in parts
            for repeated in (True, False):
                at = [j for j, k in enumerate(indices) if (k in again) is repeated]
                moments = None if second_moments is None else [second_moments[j] for j in at]
                some, theirs = [indices[j] for j in at], [gradients[j] for j in at]
                if some:
                    self._sketch(some, theirs, into, moments, eps, accumulate=repeated)
        else:
            self._sketch(indices, gradients, into, second_moments, eps)
        self._filled.update(indices)

    def _sketch(
        self,
        indices: Any,
        gradients: Any,
        into: Any,
        second_moments: Any = None,
        eps: float = 0.0,
        **options: Any,
    ) -> None:
        if second_moments is not None:
            options |= {"second_moments": second_moments, "eps": eps}
        sketch(gradients, self.current, layout=self.layout, regions=indices, into=into, **options)

    def end(self, branch: Branch, scale: Tensor) -> None:
        """After the last gradient of a contribution."""
        if self.running:
            self._gather(branch, scale)
        moments, squares, _ = self._views[len(self._scales)]
        self._scales.append(scale)
        if self.running or self.lossless:
            return
        left = sorted(self._stale - self._filled)
        if left:
            self._sketch(left, [self._nothing] * len(left), moments)  # writes zeros
        self._stale.clear()
        total = self._totals[branch]
        if not self.by_module:
            absorb_(self.current, None, total, scale, into=squares)
            return
        assert self.current is not None
        for module, part in self._segments:
            self._module_rows[-1][module, 0] += absorb_(self.current[part], None, total[part], scale).sum()

    # -- sums -----------------------------------------------------------------------------------------------------

    def inner(self, both_totals: Tensor) -> Tensor:
        """``[3]``: ``|G_s|^2``, ``|G_r|^2``, ``<G_s, G_r>``, of this ledger's totals or of those of all ranks."""
        return pair_moments(*both_totals.view(2, -1).unbind())

    def module_inner(self, both_totals: Tensor) -> Tensor:
        """``[modules, 3]``: the part of each module in :meth:`inner`."""
        if not self._segments:
            return torch.zeros(self.module_count, 3, dtype=self._rows.dtype, device=self.device)
        parts = [[total[part] for _, part in self._segments] for total in both_totals.view(2, -1).unbind()]
        return self._membership @ pair_moments(*parts, per_tensor=True)

    def clear(self) -> None:
        """Forgets the step."""
        for outdated in self._outdated:
            outdated.forget()
        if not self._rows_are_clear:
            self._rows.zero_()
            self._rows_are_clear = True
        self._module_rows.clear()
        self._scales.clear()
        if self._adding is not None:
            self._adding.forget()
        self._filled, self._stale = set(), set()
        self._sums.clear()


def _writing(name: str, ordinary: Callable[..., Tensor], fresh: int) -> tuple[Callable[..., Tensor], dict[str, Any]]:
    """What adds to regions, and the option that it needs where it writes over an earlier step's numbers."""
    return (getattr(cpu, name), {"fresh": fresh}) if fresh else (ordinary, {})

"""Which demonstrations the micro-steps of an accumulation window take. Needs torch, not TRL.

A *window* is the micro-steps up to the next optimizer step. Its demonstrations are drawn together, so that the loss
tokens that they are divided by are known before the first backward pass.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence

from gac.trainers.demonstrations import DemonstrationBatch, EpochSampler, pad_demonstrations
from gac.trainers.rules.base import Demonstration


@dataclasses.dataclass(frozen=True)
class Window:
    """This rank's part of a window.

    Attributes:
        micro_steps: of the window.
        rows: demonstrations of a micro-step on a rank.
        rank, ranks: this one, and how many there are.
    """

    micro_steps: int
    rows: int
    rank: int
    ranks: int

    @property
    def total(self) -> int:
        """Demonstrations of all micro-steps and ranks."""
        return self.micro_steps * self.rows * self.ranks

    def of_rank(self, rank: int) -> Window:
        """The part of another rank."""
        return dataclasses.replace(self, rank=rank)

    def indices(self, sampler: EpochSampler, position: int) -> list[int]:
        """The demonstrations that :meth:`from_set` gives this rank, in their order."""
        return [index for begin in self._begins(position) for index in sampler.take(begin, self.rows)]

    def _begins(self, position: int) -> range:
        """Where each micro-step's demonstrations begin."""
        return range(position + self.rank * self.rows, position + self.total, self.ranks * self.rows)

    def from_set(
        self, sampler: EpochSampler, collate: Callable[[Sequence[int]], DemonstrationBatch], position: int
    ) -> list[list[DemonstrationBatch]]:
        """The :attr:`total` demonstrations from `position` on, of which every rank has its own.

        Returns:
            For each micro-step a list of one batch of `rows` demonstrations.
        """
        return [[collate(sampler.take(begin, self.rows))] for begin in self._begins(position)]

    def from_queue(self, demonstrations: Sequence[Demonstration], pad: int) -> list[list[DemonstrationBatch]]:
        """All of `demonstrations`, in batches of at most `rows`; as many batches on every rank, whatever their number.

        Args:
            demonstrations: the same on all ranks.
            pad: token that fills up rows.

        Returns:
            For each micro-step as many batches; some may be without labels, where demonstrations do not suffice.
        """
        share = -(-len(demonstrations) // self.ranks)
        pieces = -(-share // (self.micro_steps * self.rows))
        size = -(-share // (self.micro_steps * pieces))
        own = iter(demonstrations[self.rank :: self.ranks])
        piece = lambda: pad_demonstrations(list(itertools.islice(own, size)), pad)
        return [[piece() for _ in range(pieces)] for _ in range(self.micro_steps)]

"""What the steps so far have told of sources and single demonstrations, on this rank."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from gac.observe.topology import Topology
from gac.sequences.alignment import Alignments
from gac.sequences.saved import Place, history_of, state_of
from gac.sequences.sources import StepOfSources

LENGTH = 4096
"""Steps of sources that are kept."""


class History:
    """Sources and demonstrations over steps.

    Args:
        labels: that rows may have, the same on every rank; None for any. topology: of the ranks.

    Attributes:
        labels: likewise.
        sources: of the steps whose rows were told theirs. alignments: of demonstrations that were told their numbers.
        added: steps that :meth:`add` was told of.
    """

    def __init__(self, labels: Sequence[Hashable] | None, topology: Topology) -> None:
        self.labels = None if labels is None else tuple(labels)
        self._groups = topology.groups
        rank = dist.get_rank() if topology.ranks > 1 else 0
        self._place = Place(rank, topology.ranks, shared=self.labels is not None and topology.ranks > 1)
        self.sources: deque[StepOfSources] = deque(maxlen=LENGTH)
        self.alignments = Alignments()
        self.added = 0

    def add(self, step: StepOfSources) -> None:
        """A step has ended."""
        self.sources.append(step)
        self.added += 1

    def check(self, labels: Sequence[Hashable] | None) -> None:
        """Raises ValueError for a label of some rows that was not named beforehand, where labels were."""
        for label in labels or ():
            if self.labels is not None and label not in self.labels:
                raise ValueError(
                    f"sources has {label!r}, which is not among those that gac.patch(sequences={{'sources': ...}}) "
                    f"names: {', '.join(map(repr, self.labels))}"
                )

    def alignments_of_all(self) -> Alignments:
        """Of the demonstrations that any rank has seen. Every rank calls it."""
        found = self.alignments
        for group in self._groups:
            states: list[Any] = [None] * dist.get_world_size(group)
            dist.all_gather_object(states, found.state(), group=group)
            found = Alignments.together(states)
        return found

    def state_dict(self) -> dict[str, Any]:
        """What :meth:`take_state` continues from."""
        return state_of(self.sources, self.alignments, self._place)

    def take_state(self, state: dict[str, Any] | None, device: torch.device) -> None:
        """Continues where :meth:`state_dict` left off, with what is of this rank, or of all; None begins anew."""
        self.sources.clear()
        self.alignments = Alignments()
        if state is None:
            return
        saved, own = Place(state["rank"], state["ranks"], state["shared"]), self._place
        mine = (saved.rank, saved.ranks) == (own.rank, own.ranks)
        if mine or (saved.shared and own.shared):
            self.sources.extend(history_of(state, device))
        if mine:
            self.alignments.take_state(state["demonstrations"]["index"], state["demonstrations"]["sums"])

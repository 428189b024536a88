"""ReLIFT: demonstrations of unsolved prompts wait until there are enough for a supervised step."""

from collections.abc import Sequence
from typing import Any

from gac.laws import Law, ReliftLaw
from gac.losses import IGNORE_INDEX
from gac.state import Flag, ListOf, Table, Whole
from gac.trainers.rules.base import Demonstration, Rule, ScoredBatch, Selection


class Relift(Rule):
    """GRPO steps; when the queue is full, the next step is supervised, on its oldest ``queue`` demonstrations.

    Every rank holds the whole queue, so that all of them agree on which step is supervised.
    """

    law: ReliftLaw
    from_prompts = True
    queues = True

    def __init__(self, law: Law) -> None:
        super().__init__(law)
        self.queue: list[Demonstration] = []
        self.full = False

    def attach(self, law: Law) -> None:
        super().attach(law)
        self.law.supervise_next = self.full

    @property
    def explores(self) -> bool:
        return not self.full

    @property
    def supervises(self) -> bool:
        return self.full

    def select(self, batch: ScoredBatch) -> Selection:
        unsolved = batch.correct_in_group(self.law.correct) == 0
        return Selection(
            advantages=batch.advantages,
            demonstrate=unsolved & batch.demonstrated.to(unsolved.device),
        )

    def enqueue(self, demonstrations: Sequence[Demonstration]) -> None:
        self.queue.extend(demonstrations)

    def dequeue(self) -> list[Demonstration]:
        taken, self.queue = self.queue[: self.law.queue], self.queue[self.law.queue :]
        return taken

    def end_step(self) -> None:
        self.full = self.law.supervise_next = len(self.queue) >= self.law.queue

    def metrics(self) -> dict[str, float]:
        return {"queue": float(len(self.queue))}

    def state_dict(self) -> dict[str, Any]:
        return {"queue": self.queue, "full": self.full}

    def entries(self) -> Table:
        return Table({"queue": ListOf(_Saved()), "full": Flag()})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        taken = self.entries().read(state, "state_dict")
        self.queue = taken["queue"]
        self.full = self.law.supervise_next = taken["full"]


class _Saved:
    """The entry of a demonstration in a saved queue: as many labels as token ids."""

    def read(self, value: Any, at: str) -> Demonstration:
        ids, labels = ListOf(ListOf(Whole(IGNORE_INDEX)), length=2).read(value, at)
        ListOf(Whole()).read(ids, f"{at}[0]")
        if len(ids) != len(labels):
            raise ValueError(f"{at} must have as many labels as token ids, got {len(labels)} and {len(ids)}")
        return ids, labels

"""ReLIFT: demonstrations of unsolved prompts wait until there are enough for a supervised step."""

from collections.abc import Sequence
from typing import Any

from gac.laws import Law, ReliftLaw
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

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.queue = [(list(ids), list(labels)) for ids, labels in state["queue"]]
        self.full = self.law.supervise_next = bool(state["full"])

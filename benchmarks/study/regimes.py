"""Regimes: what a run's demonstrations, rewards and warm start are like, as data beside its task.

All regimes of a task and seed share problems, and all but the sparse ones the warm start: only what a regime names is
changed. What is drawn follows from the seed and the regime's name alone.
"""

import dataclasses
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from benchmarks.study.tasks import DEMONSTRATION_POOL, PROMPTS

Rows = list[dict[str, Any]]

CLEAN = "clean"
PASS_RATE = 0.05
"""Of samples after the warm start of a sparse regime, at most."""

WARM_STARTS = (0.6, 0.45, 0.35, 0.25, 0.15, 0.1, 0.05)
"""Shares of a task's warm start that a sparse regime tries, the longest first."""


@dataclasses.dataclass(frozen=True)
class Regime:
    """One regime.

    Attributes:
        name: in keys and on the command line.
        story: for readers.
        wrong: share of the demonstrations whose completion is the answer to another problem.
        turns: whether all demonstrations turn wrong half way.
        other_format: whether completions are right, in brackets that the reward does not take.
        demonstrated: how many of the prompts have a demonstration.
        flipped: share of the rewards that come out as their opposite.
        sparse: whether the warm start is cut until the pass rate of samples is below :data:`PASS_RATE`.
        sources: whether demonstrations say where they come from, source ``b`` being the one that is wrong.
    """

    name: str
    story: str
    wrong: float = 0.0
    turns: bool = False
    other_format: bool = False
    demonstrated: int = DEMONSTRATION_POOL
    flipped: float = 0.0
    sparse: bool = False
    sources: bool = False


REGIMES: dict[str, Regime] = {
    regime.name: regime
    for regime in (
        Regime(CLEAN, "right demonstrations of a third of the prompts"),
        Regime("wrong-25", "a quarter of the demonstrations wrong", wrong=0.25),
        Regime("wrong-50", "half of the demonstrations wrong", wrong=0.5),
        Regime("wrong-100", "all demonstrations wrong", wrong=1.0),
        Regime("format", "right demonstrations in a format that the reward refuses", other_format=True),
        Regime("few", "40 demonstrations", demonstrated=40),
        Regime("many", "every prompt demonstrated", demonstrated=PROMPTS),
        Regime("sparse", "a policy that passes fewer than 1 in 20", sparse=True),
        Regime("flipped", "a fifth of the rewards flipped", flipped=0.2),
        Regime("turns", "demonstrations turn wrong half way", turns=True),
        Regime("sources", "two sources, one right and one wrong", wrong=0.5, sources=True),
    )
}
"""By name; clean is the one that all other phases of the study run in."""

CONFIRMATION = ("wrong-50", "few", "flipped")
"""Regimes that run on confirmation tasks, once."""


def regime_of(name: str) -> Regime:
    """A regime by its name. Raises ValueError for an unknown one."""
    if name not in REGIMES:
        raise ValueError(f"unknown regime {name!r} of the study; known regimes: {', '.join(REGIMES)}")
    return REGIMES[name]


def demonstrate(regime: Regime, prompts: Rows, seed: int) -> Rows:
    """The prompts of a run as this regime has them, in the same order: ``completion``, ``demonstrated``, ``source``.

    ``answer``, which the reward compares with, stays. A wrong completion is the answer to another of the prompts, and
    never this one's. Which ones are wrong is drawn among the demonstrated; of two sources the wrong one is ``b``.
    """
    rows = [dict(row, demonstrated=index < regime.demonstrated) for index, row in enumerate(prompts)]
    shown = [index for index, row in enumerate(rows) if row["demonstrated"]]
    wrong = set(_draw(regime, seed).sample(shown, round(regime.wrong * len(shown))))
    others = wrong_answers(prompts, seed)
    for index, row in enumerate(rows):
        if regime.sources:
            row["source"] = "b" if index in wrong else "a"
        if index in wrong:
            row["completion"] = others[index]
        elif regime.other_format:
            row["completion"] = f"[{row['answer']}]"
    return rows


def wrong_answers(prompts: Rows, seed: int) -> list[str]:
    """For each prompt the answer to another one that has a different answer; the same in all regimes."""
    draw, answers = random.Random(f"wrong answers {seed}"), [row["answer"] for row in prompts]
    if len(set(answers)) < 2:
        raise ValueError("no wrong demonstrations: all prompts have the same answer")
    found = []
    for own in answers:
        other = own
        while other == own:
            other = draw.choice(answers)
        found.append(other)
    return found


def noisy(regime: Regime, reward: Callable[..., list[float]], seed: int) -> Callable[..., list[float]]:
    """The reward function as this regime has it: a share of its values, as calls come, are 1 minus what they were."""
    if not regime.flipped:
        return reward
    draw = _draw(regime, seed)

    def flipped(*arguments: Any, **columns: Any) -> list[float]:
        values = reward(*arguments, **columns)
        return [1.0 - value if draw.random() < regime.flipped else value for value in values]

    return flipped


class Turning(Sequence):
    """Demonstrations that are these until somebody sets `turned`, and then those.

    Args:
        before, after: rows of the same prompts, in the same order.
    """

    def __init__(self, before: Rows, after: Rows) -> None:
        if len(before) != len(after):
            raise ValueError(f"before and after must be as many, got {len(before)} and {len(after)}")
        self._before, self._after, self.turned = before, after, False

    def __len__(self) -> int:
        return len(self._before)

    def __getitem__(self, index: int) -> dict[str, Any]:  # type: ignore[override]
        return (self._after if self.turned else self._before)[index]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self._after if self.turned else self._before)


def cut(steps: int, pass_rate: Callable[[int], float]) -> tuple[int, float]:
    """Steps of a sparse regime's warm start and the pass rate they give: the longest below :data:`PASS_RATE`.

    Args:
        steps: of the task's warm start.
        pass_rate: trains a model for so many steps and says what share of its samples passes.
    """
    for share in WARM_STARTS:
        tried = max(round(share * steps), 1)
        rate = pass_rate(tried)
        if rate < PASS_RATE:
            break
    return tried, rate


def _draw(regime: Regime, seed: int) -> random.Random:
    # two sources are wrong where half of all are: the regimes differ by the label alone
    return random.Random(f"{'wrong-50' if regime.sources else regime.name} {seed}")

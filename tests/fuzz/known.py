"""Findings that are known and not mended yet: reported with every run, and no failure.

An entry says which draws have it (``present``) and gives the same draw without it (``without``). A failing draw is put
down to the entries that it has where it succeeds without them. An entry is taken out when its kind is mended; a test
fails for one that is no finding any more.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from tests.fuzz.draw import Draw, Pass, Step


@dataclass(frozen=True)
class Known:
    """A finding.

    Attributes:
        name: as in docs/fuzzing.md. reason: what happens, and why.
        present: whether a draw has it. without: the draw without it. example: the least draw that shows it.
    """

    name: str
    reason: str
    present: Callable[[Draw], bool]
    without: Callable[[Draw], Draw]
    example: Draw


def passes_of(draw: Draw) -> list[Pass]:
    return [one for step in draw.steps for one in step.passes]


def _unweighted_after_weighted(step: Step) -> bool:
    read: set[str] = set()
    for one in step.passes:
        if one.how == "unweighted" and one.branch in read:
            return True
        if one.how == "weight":
            read.add(one.branch)
    return False


SFT, RL = Pass("sft", 1), Pass("rl", 2)

KNOWN: tuple[Known, ...] = (
    Known(
        "unweighted after weighted",
        "a loss without its weight is taken for one with it, 1/weight too large, where an earlier loss of its branch "
        "in the step had read the weight",
        lambda draw: any(map(_unweighted_after_weighted, draw.steps)),
        lambda draw: draw.with_passes(lambda one: replace(one, how="weight" if one.how == "unweighted" else one.how)),
        Draw((Step((replace(SFT, how="weight"), replace(SFT, how="unweighted"))),)),
    ),
    Known(
        "buffers changed between passes",
        "buffers handed over by mixer.observe are differences too: what is clipped or cleared between two of them, or "
        "was never cleared, makes the next one wrong",
        lambda draw: (
            not draw.hooks
            and (
                any(p.before in ("clip", "clear") for p in passes_of(draw))
                or any(step.clear == "missing" for step in draw.steps[:-1])
            )
        ),
        lambda draw: draw.with_steps(tuple(replace(s, clear="none") for s in draw.steps)).with_passes(
            lambda one: replace(one, before=None)
        ),
        Draw((Step((replace(SFT, how="weight"), replace(RL, how="weight", before="clear"))),), hooks=False),
    ),
    Known(
        "a plain pass after a step of guided ones",
        "where one hook is left, a plain pass that writes elsewhere before it reaches that hook (with the exact "
        "estimator: that never reaches it) costs its step, once: it cannot be told from somebody who changed gradients "
        "or from several passes; the step is dropped and counted",
        lambda draw: (
            draw.hooks
            and any(p.how == "mixer" for p in passes_of(draw))
            and any(p.how == "weight" for p in passes_of(draw))
        ),
        lambda draw: draw.with_passes(lambda one: replace(one, how="mixer" if one.how == "weight" else one.how)),
        Draw(
            (
                Step((RL,), update=False),
                Step((replace(RL, how="weight", checkpoint="reentrant"),), update=False),
            ),
            model="reused",
            estimator="sketch",
            report_interval=None,
        ),
    ),
)

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


def _each_pass(draw: Draw, change: Callable[[Pass], Pass]) -> Draw:
    return draw.with_steps(tuple(replace(s, passes=tuple(map(change, s.passes))) for s in draw.steps))


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
        "create_graph under running sums",
        "a pass with create_graph=True is refused after another one: autograd then accumulates into a new tensor, "
        "which passes for a gradient that somebody replaced",
        lambda draw: draw.running and draw.hooks and any(p.style == "graph" for p in passes_of(draw)),
        lambda draw: _each_pass(draw, lambda one: replace(one, style=None if one.style == "graph" else one.style)),
        Draw((Step((SFT, replace(SFT, how="weight", style="graph"))),), estimator="sketch"),
    ),
    Known(
        "unweighted after weighted",
        "a loss without its weight is taken for one with it, 1/weight too large, where an earlier loss of its branch "
        "in the step had read the weight",
        lambda draw: any(map(_unweighted_after_weighted, draw.steps)),
        lambda draw: _each_pass(draw, lambda one: replace(one, how="weight" if one.how == "unweighted" else one.how)),
        Draw((Step((replace(SFT, how="weight"), replace(SFT, how="unweighted"))),)),
    ),
    Known(
        "unweighted into buffers",
        "mixer.observe takes a loss without its weight for one with it: nobody looks whether the weight was read",
        lambda draw: not draw.hooks and any(p.how == "unweighted" for p in passes_of(draw)),
        lambda draw: _each_pass(draw, lambda one: replace(one, how="weight")),
        Draw((Step((replace(SFT, how="unweighted"),)),), hooks=False),
    ),
    Known(
        "thawed under buffers",
        "with hooks=False nobody notices that parameters became trainable: their buffers are left out",
        lambda draw: not draw.hooks and any("thaw" in step.before for step in draw.steps),
        lambda draw: draw.with_steps(
            tuple(replace(s, before=tuple(e for e in s.before if e != "thaw")) for s in draw.steps)
        ),
        Draw((Step((replace(SFT, how="weight"),), before=("thaw",)),), model="frozen", hooks=False),
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
        lambda draw: _each_pass(
            draw.with_steps(tuple(replace(s, clear="none") for s in draw.steps)), lambda one: replace(one, before=None)
        ),
        Draw((Step((replace(SFT, how="weight"), replace(RL, how="weight", before="clear"))),), hooks=False),
    ),
)

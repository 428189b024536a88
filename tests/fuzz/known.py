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


def _told_and_entered_again(step: Step) -> bool:
    """Whether a branch is entered without tokens after a pass in it was told its own."""
    told, last = set(), None
    for one in step.passes:
        own = one.tokens is not None and one.how != "mixer"
        enters = one.branch != last or one.fresh or own
        if enters and not own and one.branch in told:
            return True
        if one.tokens is not None:
            told.add(one.branch)
        last = one.branch if one.fails != "leaves" else None
    return False


SFT, RL = Pass("sft", 1), Pass("rl", 2)

KNOWN: tuple[Known, ...] = (
    Known(
        "tokens, then entered again",
        "`with mixer.sft():` a second time in a step whose passes were told `backward(loss, tokens=...)` is refused: "
        "entering checks its own `tokens=None` against theirs",
        lambda draw: draw.hooks and any(map(_told_and_entered_again, draw.steps)),
        lambda draw: _each_pass(draw, lambda one: replace(one, tokens=None)),
        Draw((Step((replace(SFT, tokens=2.0), RL, replace(SFT, tokens=3.0))),)),
    ),
    Known(
        "all gradients within a re-entrant checkpoint",
        "where no watched parameter lies outside re-entrant checkpoints (LoRA), the end of a pass goes unnoticed: "
        "passes that do not go through mixer.backward merge into one contribution",
        lambda draw: draw.model == "frozen" and any(p.checkpoint == "reentrant" for p in passes_of(draw)),
        lambda draw: _each_pass(draw, lambda one: replace(one, checkpoint=None)),
        Draw((Step((replace(SFT, how="weight", checkpoint="reentrant"), SFT)),), model="frozen"),
    ),
    Known(
        "unweighted loss",
        "a loss without its weight is taken for one with it: its contribution is 1/weight too large",
        lambda draw: any(p.how == "unweighted" for p in passes_of(draw)),
        lambda draw: _each_pass(draw, lambda one: replace(one, how="weight" if one.how == "unweighted" else one.how)),
        Draw((Step((replace(SFT, how="unweighted"),)),)),
    ),
    Known(
        "gradients changed between passes",
        "gradients clipped or cleared between two passes make the next difference of running sums wrong",
        lambda draw: draw.running and any(p.before in ("clip", "clear") for p in passes_of(draw)),
        lambda draw: _each_pass(draw, lambda one: replace(one, before=None)),
        Draw((Step((SFT, replace(RL, before="clear"))),), estimator="sketch"),
    ),
    Known(
        "gradients never cleared",
        "what an earlier step left in p.grad is taken for a part of the first contribution of running sums",
        lambda draw: draw.running and any(step.clear == "missing" for step in draw.steps[:-1]),
        lambda draw: draw.with_steps(
            tuple(replace(s, clear="none" if s.clear == "missing" else s.clear) for s in draw.steps)
        ),
        Draw((Step((SFT, RL), clear="missing"), Step((SFT, RL))), estimator="sketch"),
    ),
    Known(
        "error caught inside the branch",
        "a backward pass that raised and was caught before the branch ended counts as a whole contribution",
        lambda draw: any(p.fails == "caught" and p.how != "mixer" for p in passes_of(draw)),
        lambda draw: _each_pass(draw, lambda one: replace(one, fails=None if one.fails == "caught" else one.fails)),
        Draw((Step((SFT, replace(SFT, seed=3, how="weight", fails="caught"))),)),
    ),
)

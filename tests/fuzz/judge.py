"""One draw from end to end: what is wrong with it, if anything, and what that is known as."""

from __future__ import annotations

import traceback
from dataclasses import dataclass, replace

from tests.fuzz.compare import compare
from tests.fuzz.draw import Draw, Pass, Step, ingredients, is_valid
from tests.fuzz.known import KNOWN, Known
from tests.fuzz.run import Outcome, perform


@dataclass(frozen=True)
class Failure:
    """A draw with a wrong end.

    Attributes:
        kind: ``foreign`` (an error of somebody else), ``refused`` (a right schedule), ``accepted`` (a misuse) or
            ``different`` (numbers). what: in words.
    """

    draw: Draw
    kind: str
    what: str


def judge(draw: Draw) -> Failure | None:
    """None where gac did as it has to: the right numbers, or an error of its own for a schedule that has a hazard."""
    outcome = perform(draw)
    if outcome.error is not None and outcome.foreign:
        return Failure(draw, "foreign", told(outcome))
    if outcome.broken:
        return Failure(draw, "accepted", outcome.broken[0])
    hazards = ingredients(draw)
    if outcome.error is not None:
        return None if hazards else Failure(draw, "refused", told(outcome))
    if _thawed_and_measured(draw, outcome) and not outcome.said:
        return Failure(draw, "accepted", "parameters became trainable without a word")
    differences = compare(draw, outcome)
    if not differences or (hazards and outcome.said):
        return None
    return Failure(draw, "different", "; ".join(map(str, differences[:3])))


def known_as(failure: Failure) -> list[Known]:
    """The known findings that a failure is put down to; none where it is new."""
    present = [known for known in KNOWN if known.present(failure.draw)]
    without = failure.draw
    for known in present:
        without = known.without(without)
    return present if present and judge(without) is None else []


def _thawed_and_measured(draw: Draw, outcome: Outcome) -> bool:
    """Whether some step has statistics that parameters which began to train before it are no part of."""
    thawed, frozen = False, True
    for step, found in zip(draw.steps, outcome.steps, strict=False):
        for event in step.before:
            if event == "thaw":
                thawed, frozen = thawed or frozen, False
            elif event in ("repatch", "save", "watch", "unfreeze"):
                thawed, frozen = False, frozen and event != "unfreeze"
        if thawed and found.statistics is not None:
            return True
    return False


def told(outcome: Outcome) -> str:
    error = outcome.error
    frame = traceback.extract_tb(error.__traceback__)[-1]
    place = "/".join(frame.filename.split("/")[-3:])
    return f"{type(error).__name__} at {place}:{frame.lineno}: {str(error)[:300]}"


def shrunk(failure: Failure, *, limit: int = 400) -> Failure:
    """The smallest draw nearby that fails in the same way: parts are left out one by one while it still fails."""
    tries = 0
    progress = True
    while progress and tries < limit:
        progress = False
        for simpler in filter(is_valid, simplifications(failure.draw)):
            tries += 1
            again = judge(simpler)
            if again is not None and again.kind == failure.kind:
                failure, progress = again, True
                break
            if tries >= limit:
                break
    return failure


def simplifications(draw: Draw):
    """Draws with one part less, the largest parts first."""
    steps = draw.steps
    for k in range(len(steps)):
        if len(steps) > 1:
            yield draw.with_steps(steps[:k] + steps[k + 1 :])
    for k, step in enumerate(steps):
        for simpler in _simpler_steps(step):
            yield draw.with_steps((*steps[:k], simpler, *steps[k + 1 :]))
    plain = {"model": "mlp", "dtype": "float32", "metric": "gradient", "interval": 1, "report_interval": None}
    plain |= {"scale": None, "optimizer": "sgd", "named": "found", "warm": 0, "seed": 0, "hooks": True}
    plain |= {"estimator": "exact"}
    if draw.law != "fixed" or draw.options != {"mu": 0.3}:
        yield replace(draw, law="fixed", options={"mu": 0.3})
    for name, value in plain.items():
        if getattr(draw, name) != value:
            yield replace(draw, **{name: value})


def _simpler_steps(step: Step):
    for k in range(len(step.passes)):
        if len(step.passes) > 1:
            yield replace(step, passes=step.passes[:k] + step.passes[k + 1 :])
    for k in range(len(step.before)):
        yield replace(step, before=step.before[:k] + step.before[k + 1 :])
    for name, value in {"clip": False, "update": False, "clear": "none", "early": False}.items():
        if getattr(step, name) != value:
            yield replace(step, **{name: value})
    for k, one in enumerate(step.passes):
        for name, value in vars(Pass(one.branch, 0)).items():
            if name != "branch" and getattr(one, name) != value:
                simpler = replace(one, **{name: value})
                yield replace(step, passes=(*step.passes[:k], simpler, *step.passes[k + 1 :]))

"""Runs a draw with gac as a user would, and writes down what came of it."""

from __future__ import annotations

import functools
import io
import linecache
import threading
import traceback
import warnings
from collections.abc import Callable
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from time import sleep
from typing import Any

import torch
from torch import Tensor, nn

import gac
from gac.statistics import Branch
from tests.fuzz.draw import TOLD, Draw, Pass, Step
from tests.fuzz.models import (
    Net,
    Planted,
    build,
    compile_stages,
    loss_of,
    losses_of,
    make_optimizer,
    mixed_losses,
    run_backward,
    warm_up,
)
from tests.fuzz.threads import Threads
from tests.fuzz.tokens import sequences

OURS = tuple(str(Path(gac.__file__).parents[1] / package) for package in ("gac", "gac_kernels"))


@dataclass
class Found:
    """What a step left: the weight of each pass (``[2]`` of a mixed one: both), whether it failed, the order in which
    their backward passes began, the gradient before clipping, and what was told; of ranks also the parameters, whose
    clipping and averaging round in an order of the engine's own."""

    weights: list[Tensor] = field(default_factory=list)
    failed: list[bool] = field(default_factory=list)
    order: list[int] = field(default_factory=list)
    gradients: list[Tensor | None] = field(default_factory=list)
    statistics: gac.Statistics | None = None
    coefficient: gac.Statistics | None = None
    modules: Any = None
    mu: float = float("nan")
    metrics: dict = field(default_factory=dict)
    layouts: list = field(default_factory=list)
    parameters: list[Tensor] = field(default_factory=list)


@dataclass
class Outcome:
    """Of a run: its steps, and what ended it early or was not as promised.

    Attributes:
        error: what was raised; None for a run that went through. foreign: raised by somebody else than gac.
        said: warnings of gac. broken: promises that were not kept, in words.
    """

    steps: list[Found] = field(default_factory=list)
    error: BaseException | None = None
    foreign: bool = False
    said: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)


def is_ours(error: BaseException) -> bool:
    """Whether gac raised it, of a documented kind: its innermost frame is a ``raise`` in the package."""
    if not isinstance(error, (RuntimeError, ValueError, TypeError)):
        return False
    frame = traceback.extract_tb(error.__traceback__)[-1]
    line = linecache.getline(frame.filename, frame.lineno or 0).strip()
    return frame.filename.startswith(OURS) and line.startswith("raise")


def perform(draw: Draw, wrap: Callable[[Net], nn.Module] | None = None, rank: int = 0) -> Outcome:
    """The outcome of a draw. ``wrap`` puts the model into an engine, ``rank`` chooses its data."""
    outcome = Outcome()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        session = None
        try:
            session = Session(draw, outcome, wrap, rank)
            for step in draw.steps:
                session.take(step)
        except Exception as error:
            outcome.error, outcome.foreign = error, not is_ours(error)
        finally:
            if session is not None:
                session.mixer.unpatch()
    outcome.said = [str(w.message) for w in seen if w.filename.startswith(OURS) or "gac" in str(w.message)]
    return outcome


class Session:
    """A model, its optimizer and its mixer in the middle of a run."""

    def __init__(self, draw: Draw, outcome: Outcome, wrap: Callable[[Net], nn.Module] | None, rank: int) -> None:
        self.draw, self.outcome, self.rank = draw, outcome, rank
        net = build(draw.model, draw.dtype, draw.seed)
        warm = make_optimizer(draw.optimizer, net)
        warm_up(net, warm, draw.warm)
        compile_stages(net, draw.compiled)
        self.net = net if wrap is None else wrap(net)
        self.parameters = [p for p in self.net.parameters() if p.requires_grad]
        self.optimizer = warm if wrap is None else make_optimizer(draw.optimizer, net)
        self.scaler = None if draw.scale is None else torch.amp.GradScaler("cpu", init_scale=draw.scale)
        self.patch()

    def patch(self) -> None:
        draw = self.draw
        self.mixer = gac.patch(
            self.net,
            law=draw.law,
            estimator=draw.estimator,
            metric=draw.metric,
            interval=draw.interval,
            report_interval=draw.report_interval,
            hooks=draw.hooks,
            scaler=self.scaler,
            optimizer=self.optimizer if draw.named == "argument" else None,
            **draw.options,
        )
        if draw.named == "follow":
            self.mixer.follow(self.optimizer)

    def take(self, step: Step) -> None:
        """One step."""
        for event in step.before:
            self.happen(event, step)
        found = Found()
        self.passes(step, found)
        found.gradients = [None if p.grad is None else whole(p.grad).detach().clone() for p in self.parameters]
        found.layouts = [ledger.layout for ledger in self.mixer._observer.ledgers]
        self.end(step)
        found.coefficient = self.mixer.coefficient
        found.statistics, found.modules = self.mixer.statistics, self.mixer.modules
        found.mu, found.metrics = float(self.mixer.mu), self.mixer.metrics(wait=True)
        if self.draw.engine != "one":
            found.parameters = [whole(p.detach()).clone() for p in self.parameters]
        self.outcome.steps.append(found)

    def end(self, step: Step) -> None:
        tell = TOLD.get(self.draw.law, {})
        finish_gradients(step, self.parameters, self.draw.scale)
        if step.update:
            self.optimizer.step()
        if step.early:
            clear(step, self.parameters)
        if self.draw.named != "argument":
            with torch.inference_mode(step.inference):
                self.mixer.step(**tell)
        if not step.early:
            clear(step, self.parameters)

    # -- passes ---------------------------------------------------------------------------------------------------

    def passes(self, step: Step, found: Found) -> None:
        stack, last, threads = ExitStack(), None, Threads(step.threads)
        hooks = self._order(step, found.order)
        for number, one in enumerate(step.passes):
            told = one.tokens is not None and (one.how != "mixer" or not self.draw.hooks)
            place = None if one.how == "mixed" else one.branch
            if place is None or place != last or one.fresh or told:
                threads.join()
                stack.close()
                if place is not None:
                    stack.enter_context(getattr(self.mixer, place)(**({"tokens": one.tokens} if told else {})))
            last = place
            before_pass(one, self.net, self.parameters)
            # not by mixer.weight: that somebody reads it is how gac knows that losses are weighted
            of = self.mixer._branches.weights.of
            found.weights.append(torch.stack([*of.values()]) if place is None else of[Branch(place)].clone())
            found.failed.append(False)
            try:
                begins = functools.partial(found.order.append, number) if step.threads != "together" else _nothing
                threads.run(functools.partial(self.backward, one, threads.meet, begins), number)
            except Planted as error:
                found.failed[-1] = True
                if one.fails == "leaves":
                    last = None
                    stack.__exit__(Planted, error, error.__traceback__)
                    stack = ExitStack()
        threads.join()
        stack.close()
        for hook in hooks:
            hook.remove()

    def _order(self, step: Step, order: list[int]) -> list[Any]:
        """Hooks that write down when passes, each in a thread of its own, accumulate their first gradient.

        They let the other threads in between any two parameters.
        """
        if step.threads != "together":
            return []

        def note(_: Tensor) -> None:
            number = int(threading.current_thread().name)
            if number not in order:
                order.append(number)
            sleep(0.0002)

        return [p.register_post_accumulate_grad_hook(note) for p in self.parameters]

    def backward(self, one: Pass, ready: Callable[[], None], begins: Callable[[], None]) -> None:
        """A pass and what is told of its tokens; ``ready`` is called before, ``begins`` in its backward pass."""
        unsynced = nullcontext() if one.sync else self.net.no_sync()
        with unsynced:
            self._backward(shifted(one, self.rank), ready, begins)
        if one.rows is not None:
            self.mixer.observe_tokens(*sequences(shifted(one, self.rank)))

    def _backward(self, one: Pass, ready: Callable[[], None], begins: Callable[[], None]) -> None:
        losses = [self._mixed(one)] if one.how == "mixed" else losses_of(self.net, one)
        if self.scaler is not None:
            losses = [self.scaler.scale(loss) for loss in losses]
        ready()
        once = [begins]
        losses[0].register_hook(lambda _: once.pop()() if once else None)
        if one.how == "mixed":
            run_backward(losses, one, self.parameters)
        elif one.how == "mixer" and self.draw.hooks:
            self.mixer.backward(losses[0], **({} if one.tokens is None else {"tokens": one.tokens}))
        else:
            weighted = losses if one.how == "unweighted" else [self.mixer.weight * loss for loss in losses]
            run_backward(weighted, one, self.parameters)
        if not self.draw.hooks:
            self.mixer.observe("grad")

    def _mixed(self, one: Pass) -> Tensor:
        losses = mixed_losses(self.net, one)
        return self.mixer.mixed_loss(sft_loss=losses["sft"], rl_loss=losses["rl"])

    # -- between steps --------------------------------------------------------------------------------------------

    def happen(self, event: str, step: Step) -> None:
        if event == "repatch":
            self.mixer.unpatch()
            self.patch()
        elif event == "save":
            file = io.BytesIO()
            torch.save(self.mixer.state_dict(), file)
            file.seek(0)
            self.mixer.unpatch()
            self.patch()
            self.mixer.load_state_dict(torch.load(file, weights_only=True))
        elif event == "aside":
            with self.mixer.aside():
                loss_of(self.net, Pass("sft", 1)).backward()
            clear_gradients(self.parameters)
        elif event == "empty":
            with self.mixer.rl():
                pass
        elif event == "watch":
            self.mixer.repatch()
        elif event in ("unfreeze", "thaw"):
            self.parameters = unfreeze(self.net, self.optimizer)
            if event == "unfreeze":
                self.mixer.repatch()
        elif event == "loose":
            with suppress(Planted), self.mixer.sft():
                raise Planted
        else:
            self.misuse(event)

    def misuse(self, kind: str) -> None:
        """Does what must be refused; it is written down where it was not, and the run goes on as if nothing was."""
        mixer = self.mixer
        inside, call = {
            "step_again": (False, lambda: mixer.step(**TOLD.get(self.draw.law, {}))),
            "nested": (True, lambda: mixer.rl().__enter__()),
            "step_inside": (True, lambda: mixer.step(**TOLD.get(self.draw.law, {}))),
            "backward_outside": (False, lambda: mixer.backward(loss_of(self.net, Pass("sft", 1)))),
            "weight_outside": (False, lambda: mixer.weight),
            "patch_twice": (False, lambda: gac.patch(self.net)),
            "no_tensor": (True, lambda: mixer.backward(1.0)),
            "observe": (self.draw.hooks, lambda: mixer.observe("grad")),
            "state": (False, lambda: mixer.load_state_dict({})),
        }[kind]
        with mixer.sft() if inside else ExitStack():
            try:
                call()
            except Exception as error:
                if not is_ours(error):
                    raise
            else:
                self.outcome.broken.append(f"misuse {kind!r} was accepted without a word")


def _nothing() -> None:
    pass


def unfreeze(net: nn.Module, optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """Lets all parameters of a model train, and the optimizer step them; returns them."""
    new = [p for p in net.parameters() if not p.requires_grad]
    for parameter in new:
        parameter.requires_grad_(True)
    if new:
        optimizer.add_param_group({"params": new})
    return list(net.parameters())


def whole(gradient: Tensor) -> Tensor:
    """A gradient as a dense tensor of this process."""
    if hasattr(gradient, "full_tensor"):
        gradient = gradient.full_tensor()
    return gradient.to_dense() if gradient.is_sparse else gradient


def shifted(one: Pass, rank: int) -> Pass:
    """The pass as a rank makes it: with data of its own."""
    return one if rank == 0 else Pass(**{**vars(one), "seed": one.seed + 7919 * rank})


def before_pass(one: Pass, net: nn.Module, parameters: list[nn.Parameter]) -> None:
    """What happens before a pass, inside its branch."""
    if one.before == "clip":
        torch.nn.utils.clip_grad_norm_(parameters, 0.05)
    elif one.before == "clear":
        clear_gradients(parameters)
    elif one.before == "probe":
        torch.autograd.grad(loss_of(net, one, plain=True), parameters, allow_unused=True)


def finish_gradients(step: Step, parameters: list[nn.Parameter], scale: float | None) -> None:
    """Unscales and clips before the optimizer steps."""
    if scale is not None:
        with torch.no_grad():
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter.grad.div_(scale)
    if step.clip:
        torch.nn.utils.clip_grad_norm_(parameters, 0.5)


def clear(step: Step, parameters: list[nn.Parameter]) -> None:
    """Clears gradients as the step says."""
    if step.clear != "missing":
        clear_gradients(parameters, zero=step.clear == "zero")


def clear_gradients(parameters: list[nn.Parameter], *, zero: bool = False) -> None:
    for parameter in parameters:
        if zero and parameter.grad is not None:
            parameter.grad.detach_().zero_()
        else:
            parameter.grad = None

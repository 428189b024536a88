"""What happens inside a branch: its weight goes onto losses, and backward passes become its contributions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ContextDecorator, contextmanager
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from gac.measurement import Measurement
from gac.observe.contribution import Tokens
from gac.observe.engine import EngineChecks
from gac.observe.marker import mark
from gac.observe.pending import resolve_buffers
from gac.quiet import Quiet
from gac.sequences.observer import SequenceObserver
from gac.sequences.rows import Rows
from gac.statistics.branch import Branch
from gac.weights import Weights, is_factor

_CHECKED_LOSSES = 64
"""Calls of ``backward`` that look for a weight in the loss: those of the first steps."""


class Within(ContextDecorator):
    """The context of a branch.

    Args:
        ready: gives the branches of the step under way when the context begins.
        quiet: the steps that measure nothing.
        branch: which one. tokens: what its contributions count for.
        gives: what ``as`` names.
    """

    __slots__ = ("_branch", "_gives", "_observer", "_quiet", "_ready", "_tokens")

    def __init__(self, ready: Callable[[], Branches], quiet: Quiet, branch: Branch, tokens: Tokens, gives: Any) -> None:
        self._ready, self._quiet, self._branch, self._tokens, self._gives = ready, quiet, branch, tokens, gives

    def __enter__(self) -> Any:
        quiet = self._quiet
        if quiet.left and quiet.enters and self._tokens is None and quiet.enter(self._branch):
            return self._gives
        branches = self._ready()
        self._observer = observer = branches.observer
        start = perf_counter()
        branches.enter(self._branch, self._tokens)
        observer.now.seconds += perf_counter() - start
        return self._gives

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._quiet.weight is not None:
            self._quiet.leave()
            return
        observer, start = self._observer, perf_counter()
        before = observer.now.seconds
        observer.leave(failed=kind is not None)
        observer.now.seconds = before + perf_counter() - start  # what it has counted by itself is in this


class Branches:
    """The two branches of a step; :class:`gac.Mixer` says what each method is for and what it raises.

    Args:
        measurement: watches the parameters.
        engine: what the engine must not have done.
        scaler: multiplies the losses too (AMP in float16); None: nothing does.
        quiet: the steps that measure nothing; it has the weights.

    Attributes:
        observer: watches the parameters.
    """

    def __init__(
        self,
        measurement: Measurement,
        engine: EngineChecks,
        scaler: torch.amp.GradScaler | None,
        quiet: Quiet,
    ) -> None:
        self._quiet = quiet
        self._checks = _CHECKED_LOSSES
        self._measurement = measurement
        self.observer = measurement.observer
        self.observer.tells_weights = True
        self._in_sequences = isinstance(self.observer, SequenceObserver)
        self._engine = engine
        self._scaler = scaler
        self._may_be_quiet = not (self._in_sequences or engine.reduces_late) and self.observer.hooks
        quiet.enters = False  # until the losses of the first steps were checked

    @property
    def weights(self) -> Weights:
        """Those of the present step."""
        return self._quiet.weights

    @weights.setter
    def weights(self, weights: Weights) -> None:
        self._quiet.weights = weights

    @property
    def weight(self) -> Tensor:
        """The weight of the branch under way."""
        if self.observer.branch is None:
            raise RuntimeError("mixer.weight belongs to a branch: read it inside `with mixer.sft():` or `mixer.rl()`")
        self.observer.seen.weighted.add(self.observer.branch)
        return self.weights.of[self.observer.branch]

    @property
    def mu(self) -> Tensor:
        """The weight of the SFT branch; read within a branch, what a loss may be weighted with."""
        if self.observer.branch is not None:
            self.observer.seen.weighted.add(self.observer.branch)
        return self.weights.mu

    def require_none(self, call: str, then: str) -> None:
        """Raises RuntimeError where ``call`` is made inside a branch."""
        if self.observer.branch is not None:
            raise RuntimeError(f"{call} inside `with mixer.{self.observer.branch.value}():`: {then}")
        if isinstance(self.observer, SequenceObserver) and self.observer.in_batch:
            raise RuntimeError(f"{call} inside `with mixer.batch(...):`: {then}")

    def enter(self, branch: Branch, tokens: Tokens) -> None:
        """A branch begins."""
        observer = self.observer
        if observer.branch is not None or self._in_sequences:
            then = "leave the first branch before entering another; several backward passes may share one"
            self.require_none(f"`with mixer.{branch.value}():`", then)
        if tokens is not None:  # passes inside may be told their own
            observer.seen.check_tokens(branch, tokens)
        if observer.measuring:
            self._engine.enter(branch, measuring=True)
            observer.enter(branch, self._undoing(branch), tokens)
        else:
            if self._engine.reduces_late:
                self._engine.enter(branch, measuring=False)
            observer.enter(branch, self.weights.undone[branch], tokens)

    def _undoing(self, branch: Branch) -> Tensor:
        """What takes gradients of the branch's weighted loss to its contributions."""
        scale = self._measurement.scaled(self.weights.undone[branch])
        if self._scaler is not None and self.observer.measuring:
            scale = scale / self._scaler.scale(torch.ones_like(scale))
        return scale

    @contextmanager
    def batch(self, observer: SequenceObserver, rows: Rows) -> Iterator[None]:
        """Sequences of both branches, whose backward passes run inside."""
        self.require_none("`with mixer.batch(...)`", "leave it first")
        self._engine.enter(Branch.SFT, measuring=observer.measuring)
        with observer.rows(rows, torch.stack([self._undoing(branch) for branch in Branch])):
            yield

    def pass_by(self, weights: Weights) -> None:
        """A step ends that nothing was measured in; ``weights`` are those of the next."""
        self.weights = weights
        self.observer.seen.begin_again()
        self._engine.end_step()

    def backward(self, loss: Tensor, tokens: Tokens) -> None:
        """The backward pass of a loss with its weight, as one contribution."""
        if not isinstance(loss, Tensor):
            raise TypeError(f"loss must be a tensor, got {type(loss).__name__}")
        if self.observer.branch is None:
            raise RuntimeError("backward outside a branch: call it inside `with mixer.sft():` or `with mixer.rl():`")
        self._check_unweighted(loss, self.observer.branch)
        if not self.observer.measuring:
            (self.weights.of[self.observer.branch] * loss).backward()
            return
        with self.observer.contribution(tokens):
            (self.weights.of[self.observer.branch] * loss).backward()

    def weigh(self, loss: Tensor, tokens: Tokens) -> Tensor:
        """The loss with its weight, whose backward pass tells itself when it begins and ends."""
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            got = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise TypeError(f"loss must be a scalar tensor, got {got}")
        if self.observer.branch is None:
            raise RuntimeError("weigh outside a branch: call it inside `with mixer.sft():` or `with mixer.rl():`")
        self._check_unweighted(loss, self.observer.branch)
        if tokens is not None or self.observer.told is None:  # what the branch was entered with was checked there
            self.observer.seen.check_tokens(self.observer.branch, tokens)
        weighted = self.weight * loss
        return mark(self.observer, weighted, tokens) if self.observer.measuring and loss.requires_grad else weighted

    def _check_unweighted(self, loss: Tensor, entered: Branch) -> None:
        """Raises ValueError for a loss that has a weight already; in the first steps alone, it walks the graph."""
        if self._checks == 0:
            return
        self._checks -= 1
        self._quiet.enters = self._may_be_quiet and self._checks == 0
        for branch, weight in self.weights.of.items():
            if is_factor(weight, loss):
                raise ValueError(
                    f"loss has the weight of the {branch.value} branch already, and mixer.backward and mixer.weigh "
                    f"multiply by that of the {entered.value} branch: pass the loss itself"
                )

    def take(self, buffers: object, parameters: list[nn.Parameter], tokens: Tokens) -> None:
        """One contribution from the buffers of a trainer that keeps gradients itself."""
        observer = self.observer
        if observer.hooks:
            raise RuntimeError("mixer.observe beside hooks would count gradients twice: patch with hooks=False")
        if observer.branch is None:
            raise RuntimeError("mixer.observe belongs to a branch: call it inside `with mixer.sft():` or `mixer.rl()`")
        if observer.branch not in observer.seen.weighted:
            raise RuntimeError(
                f"mixer.observe in the {observer.branch.value} branch, whose weight nobody has read: the loss lacks "
                "it. Multiply it by mixer.weight"
            )
        if observer.measuring:
            found = resolve_buffers(buffers, observer.names, parameters)
            with torch.no_grad(), observer.contribution(tokens):
                observer.take(found)

    def mixed(self, sft_loss: Tensor, rl_loss: Tensor) -> Tensor:
        """Both losses with their weights, for one backward pass."""
        for name, loss in (("sft_loss", sft_loss), ("rl_loss", rl_loss)):
            if not isinstance(loss, Tensor) or loss.numel() != 1:
                got = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
                raise TypeError(f"{name} must be a scalar tensor, got {got}")
        if isinstance(self.observer, SequenceObserver):
            self.observer.expect_mixed()
        else:
            self.require_none("mixer.mixed_loss", "it weights both losses by itself, call it outside")
        self.observer.seen.outside = self.observer.seen.fired = True
        return self.weights.of[Branch.SFT] * sft_loss + self.weights.of[Branch.RL] * rl_loss

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Backward passes inside are no part of the step."""
        if isinstance(self.observer, SequenceObserver):
            self.require_none("mixer.aside()", "leave it first")
        seen = self.observer.seen
        expected, seen.outside = seen.outside, True
        try:
            yield
        finally:
            seen.outside = expected

    def end_step(self) -> None:
        """The optimizer step has ended."""
        self._engine.end_step()

"""Hooks that notice each contribution during backward and hand the gradients to the ledgers, a bucket at a time."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from gac.observe.accumulated import CHANGED, Accumulated
from gac.observe.arriving import Arriving
from gac.observe.contribution import Contribution, Seen, Tokens, UnweightedLoss
from gac.observe.hooks import Guided, Hooks
from gac.observe.module_names import group_parameters, some
from gac.observe.optimizer_space import SecondMoments
from gac.observe.passes import Passes
from gac.observe.pending import Pending
from gac.observe.places import place
from gac.observe.topology import is_dtensor
from gac.statistics.branch import Branch

_graph_task_id = torch._C._current_graph_task_id
_queue_callback = torch.autograd.Variable._execution_engine.queue_callback


class Observer:
    """Watches the parameters of a model. One contribution is what one backward pass adds to the gradients.

    Args:
        parameters: named parameters that require gradients, each once.
        lossless: the exact estimator's layout.
        running: read ``p.grad`` after accumulation (and take differences) instead of the incoming gradient.
        seed: of the sketch.
        copies: for each parameter, how many ranks hold the same piece of it (:class:`gac.observe.topology.Topology`).
        hooks: False leaves the gradients to :meth:`take`.

    Attributes:
        second_moments: measure in the space of the optimizer that has these; None: in that of the gradients.
        measuring, by_module: whether this step is measured, and also module by module.
        tells_weights: whether ``seen.weighted`` is kept: plain passes of other branches are then refused.
        tokens, told: what contributions to come count for, and what the branch was entered with.
        now: the backward pass under way; ``now.seconds`` is the host time spent in GAC since :meth:`clear`.
    """

    def __init__(
        self,
        parameters: Iterable[tuple[str, nn.Parameter]],
        *,
        lossless: bool,
        running: bool,
        seed: int,
        copies: Sequence[int] | None = None,
        hooks: bool = True,
    ) -> None:
        self.running, self.hooks = running, hooks
        self.second_moments: SecondMoments | None = None
        self.tells_weights = self.alive = False  # alive: whether any hook ever ran
        named = list(parameters)
        self.names = [name for name, _ in named]
        self.parameters = [parameter for _, parameter in named]
        self.sharded = any(is_dtensor(p) for p in self.parameters)
        self.module_labels, modules = group_parameters(self.names)
        self.ledgers, self._places = place(
            self.parameters, modules, len(self.module_labels), copies, lossless=lossless, running=running, seed=seed
        )
        where = {"places": self._places, "ledgers": len(self.ledgers)}
        self._pending = Pending(self.names, self.parameters, **where, sharded=self.sharded, running=running)
        self.now = self._pending.now
        self._accumulated = Accumulated(self.parameters if running and hooks else [])
        self._passes = Passes(self.parameters, broken=lambda: setattr(self.seen, "broken", True))
        self.seen = Seen()
        self.branch: Branch | None = None
        self.tokens: Tokens = None
        self.told: Tokens = None
        self._scales: list[Tensor] = []
        self._open, self._met = False, set[int]()  # parameters that had an incoming gradient in this contribution
        self._incoming: dict[tuple[int, int], Tensor] = {}  # of a parameter and a graph task
        accumulated = self._running_hook if running else lambda k: functools.partial(self._on_accumulated, k)
        gradient = None if running else self._on_gradient
        self._arriving = Arriving([] if running else self.parameters, self.ledgers, self._places)
        self._hooks = Hooks(self.parameters, accumulated, gradient, self._on_sentinel, self._arriving)
        self._guided = Guided(self._hooks, self._accumulated, None if running else self._arriving)
        self._may_guide = not self.sharded and (running or self._pending.fits)
        self.measure(True)

    def remove(self) -> None:
        """Takes the hooks off."""
        self._hooks.remove()

    def measure(self, measuring: bool, *, by_module: bool = False) -> None:
        """Whether the step to come is measured, and also module by module.

        A step that is not measured has no hooks: they would cost time and tell nothing.
        """
        self.measuring, self.by_module = measuring, by_module
        if measuring and self.hooks:
            self._hooks.put_on(self._guided.first if self._may_guide else None)
        elif not measuring:
            self.remove()
        for ledger in self.ledgers:
            ledger.by_module = by_module

    # -- branches -------------------------------------------------------------------------------------------------

    def enter(self, branch: Branch, scale: Tensor, tokens: Tokens = None) -> None:
        """Contributions from now on belong to ``branch``; ``scale`` undoes the weight of its loss."""
        self.branch, self.tokens, self.told = branch, tokens, tokens
        self.seen.entered.add(branch)
        if not self.measuring:
            self.seen.fired = True
            return
        self._scales = [scale.to(ledger.device, non_blocking=True) for ledger in self.ledgers]
        self._passes.entered()
        self._arriving.clear()  # what came between branches is nobody's
        self._look_again()

    def leave(self, *, failed: bool) -> None:
        """The branch ends; ``failed`` after an exception, which leaves its contribution incomplete."""
        if self.measuring:
            if failed or self._passes.died:
                self.fail()
            self.finish()
            self.seen.broken |= self._guided.was_passed_by()
        self.branch = self.tokens = self.told = None

    @contextmanager
    def contribution(self, tokens: Tokens = None) -> Iterator[None]:
        """One contribution of the branch under way; what raises inside gives it up.

        Args:
            tokens: what it counts for; None: what the branch was entered with.
        """
        with self._passes.lock:
            self._begin_guided(tokens)
            try:
                yield
                self._end_guided()
            except BaseException:
                self.fail()
                raise

    def begin_marked(self, task: int, tokens: Tokens) -> bool:
        """The pass of a marked loss begins (``gac/observe/marker.py``); False where that is known already."""
        if self._passes.guided or task == self.now.task:
            return False
        with self._passes.turn():
            if self._guided.was_overtaken():
                self.seen.broken = True
                self._hooks.put_on()
                return False
            self._begin_guided(tokens, looked=self._guided.alone)  # it has just been compared
            self._passes.opened(self._passes.present())
            self._passes.began(task)
        return True

    def end_marked(self, task: int) -> None:
        """It has ended."""
        self._passes.ended(task)
        self._end_guided()

    def _begin_guided(self, tokens: Tokens, *, looked: bool = False) -> None:
        """A pass begins whose end will be told; ``looked``: running sums are known to be as they were read."""
        self._passes.check_alone()
        self._close()
        start, before = perf_counter(), self.now.seconds
        if tokens is not None or self.told is None:  # what the branch was entered with was checked there
            self.seen.check_tokens(self.branch, tokens)
        if not looked:
            self._look_again()
            self.seen.broken |= not self.running and self._guided.was_overtaken()
        self._passes.guided, self.tokens = True, self.told if tokens is None else tokens
        if self._guided.alone and self.second_moments is None:
            self._arriving.begin(self.branch, self._scales)
        self.now.seconds = before + perf_counter() - start

    def _end_guided(self) -> None:
        start, written = perf_counter(), self._guided.written()
        self.seen.broken |= written is None
        if written or self._arriving.added > 0:
            self._begin()
            self.now.seconds += self._arriving.settle()
            self._pending.gradients.update(written or {})
        self.now.seconds += perf_counter() - start
        self.finish(note=not self._open)
        self._passes.guided, self.tokens = False, self.told

    def _on_sentinel(self, index: int) -> None:
        """A pass reached the lone hook: one that is not guided gets the others back, just in time."""
        with self._passes.turn():
            if self._passes.guided:
                self._guided.met(index, guided=True)
            elif self.branch is not None or not self.seen.outside:
                found, overtaken = self._guided.met_by_another(index)
                self.seen.broken |= self.branch is not None and overtaken
                self._hooks.put_on()
                for k, gradient in found.items():
                    self._notice(k, gradient)
            else:
                self._arriving.clear()

    def fail(self) -> None:
        """A backward pass raised: what it left of its contribution is dropped, and the step counts as broken."""
        if self._passes.guided:
            self.seen.broken |= self._guided.written() != {} or self._arriving.added > 0
            self._passes.guided, self.tokens = False, self.told
        self.seen.broken |= self._open
        self._drop()

    def _close(self, *, note: bool = True) -> None:
        """Ends what an earlier pass left open: as a contribution, or as broken where that pass did not end."""
        if self._passes.died:
            self.fail()
        self.finish(note=note)

    def _look_again(self) -> None:
        """Where others wrote the running sums since they were read, what is there now is what is known."""
        if not (self.running and self.hooks and self.measuring) or self._open:
            return
        start = perf_counter()
        if self._accumulated.changed():
            self._read_again()
        self.now.seconds += perf_counter() - start

    @torch.no_grad()
    def _read_again(self) -> None:
        self._pending.gradients.update((k, None) for k, p in enumerate(self.parameters) if p.grad is not None)
        for ledger, batch in zip(self.ledgers, self._pending.take(self.second_moments), strict=True):
            ledger.know(batch.regions, batch.gradients, batch.moments or None, batch.eps)
        self._accumulated.note()

    # -- hooks ----------------------------------------------------------------------------------------------------

    def _on_gradient(self, index: int, gradient: Tensor) -> None:
        # Runs for torch.autograd.grad too, where nothing is accumulated and _on_accumulated never follows.
        if self.branch is not None:
            # the tensor itself: an alias would let p.grad take its memory over
            self._incoming[index, _graph_task_id()] = gradient

    def _running_hook(self, index: int) -> Callable[[nn.Parameter], None]:
        """The hook of a parameter whose running sum is read later.

        Between large matrix products no cache holds anything of it any more: what it touches is what it costs.
        """
        pending, now, limit = self._pending.gradients, self.now, self._pending.limit
        size = self._pending.size_of(index)

        def on_accumulated(parameter: nn.Parameter, clock: Any = perf_counter, task: Any = _graph_task_id) -> None:
            start = clock()
            if task() == now.task:  # not the first of its pass: nothing to check
                pending[index] = None
                now.bytes += size
                if now.bytes >= limit:
                    self._flush()
            else:
                self._notice(index, None)
            now.seconds += clock() - start

        return on_accumulated

    def _on_accumulated(self, index: int, parameter: nn.Parameter) -> None:
        start = perf_counter()
        self._notice(index, self._incoming.pop((index, _graph_task_id()), None))
        self.now.seconds += perf_counter() - start

    def _notice(self, index: int, gradient: Tensor | None) -> None:
        if self.branch is None and self.seen.outside:
            return
        if self.branch is None:
            raise RuntimeError(
                f"a backward pass reached parameter {self.names[index]!r} outside a branch: run it inside "
                "`with mixer.sft():` or `with mixer.rl():`, or call mixer.unpatch() first"
            )
        task = _graph_task_id()
        if task != self.now.task:
            with self._passes.turn():
                self._guided.met(index, guided=self._passes.guided)
                if not self._passes.guided:
                    self._next_pass(index)
                self.now.task = task
                self._passes.began(task)
                self._begin()
            _queue_callback(functools.partial(self._end_of_backward, task))
        if self.sharded:
            self._pending.streams.note(self.parameters[index].grad)
        if not self.running:
            if gradient is None:  # another thread's pass has just ended, and cleared what had come in
                self._passes.refuse()
            if index in self._met:
                gradient = self._pending.merge(index, gradient, direct=self.ledgers[self._places[index][0]].direct)
            self._met.add(index)
        if self._pending.add(index, gradient):
            self._flush()

    def _next_pass(self, index: int) -> None:
        """A hook of a plain backward pass found another graph task than the last one.

        Raises RuntimeError: its loss was not weighted; another thread's pass is under way; or running sums were changed
        since they were read, too late to read them again.
        """
        call = self._passes.present(on_host=self.parameters[index].device.type == "cpu")
        if self._passes.goes_on(call):
            return  # in a re-entrant checkpoint
        self._passes.check_alone(plain=self._open)
        self.seen.broken |= self._open and not self._pending.put_back(index, self.ledgers)
        self._close(note=False)  # this pass has written already
        self._passes.opened(call)
        self._pending.opener = index
        if self.tells_weights and self.branch not in self.seen.weighted:
            raise UnweightedLoss.of(self.branch)
        self.seen.check_tokens(self.branch, self.tokens)
        if self.running and not self.sharded and not self.seen.broken:
            changed = [self.names[k] for k in self._accumulated.changed_besides(index)]
            if changed:
                self.seen.broken = True
                raise RuntimeError(CHANGED.format(some(changed)))

    def _begin(self) -> None:
        self.seen.fired = self.alive = True
        if not self._open:
            self._open, self._pending.kept = True, None
            for ledger in self.ledgers:
                ledger.begin()

    def take(self, gradients: Sequence[Tensor | None]) -> None:
        """Reads a contribution from buffers of running sums, one for each parameter or None."""
        self._begin()
        self._pending.gradients.update((index, g) for index, g in enumerate(gradients) if g is not None)

    def _end_of_backward(self, task: int) -> None:
        with self._passes.turn():
            self._passes.ended(task)
            if torch._C._current_autograd_node() is None:
                self.finish(note=False)
                self._incoming.clear()
                _queue_callback(self._accumulated.note)  # after the engine's own: DDP still copies what it has reduced
            elif not self._passes.guided:  # a nested pass: the contribution goes on, and may end without another hook
                self.now.task = -1
                if self.running:
                    self._flush()
                    self._accumulated.note()
                    self._pending.keep()

    # -- contributions --------------------------------------------------------------------------------------------

    def finish(self, *, note: bool = True) -> None:
        """Closes the open contribution, if there is one; ``note``: the gradients are as its pass has left them."""
        self.now.task = -1
        if note:
            self._incoming.clear()
        if not self._open:
            return
        start = perf_counter()
        if self._pending.gradients:
            self._flush()
        for ledger, scale in zip(self.ledgers, self._scales, strict=True):
            ledger.end(self.branch, scale)
        self.seen.contributions.append(Contribution(self.branch, self.tokens))
        self._open = False
        self._met.clear()
        self._passes.close()
        if note:
            self._accumulated.note()
        self.now.seconds += perf_counter() - start

    @torch.no_grad()
    def _flush(self) -> None:
        self._pending.streams.wait()
        for ledger, scale, batch in zip(
            self.ledgers, self._scales, self._pending.take(self.second_moments), strict=True
        ):
            if batch.regions:
                ledger.read(self.branch, batch.regions, batch.gradients, scale, batch.moments or None, batch.eps)

    def _drop(self) -> None:
        self._pending.clear()
        self._incoming.clear()
        self._arriving.clear()
        self._met.clear()
        self._open = False
        self._passes.close()

    def let_go(self) -> None:
        """The step's passes are over: what it kept of ``p.grad`` may be freed."""
        self._accumulated.forget()

    def clear(self) -> None:
        """Forgets the step: sums, counts and host time."""
        self._drop()
        if self.seen.contributions or self.seen.broken:
            for ledger in self.ledgers:
                ledger.clear()
        self._guided.step_ended()
        self.seen = Seen()
        self._accumulated.forget()
        self.now.seconds = 0.0

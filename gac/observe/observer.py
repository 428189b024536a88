"""Hooks that notice each contribution during backward and hand the gradients to the ledgers, a bucket at a time."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from time import perf_counter

import torch
from torch import Tensor, nn

from gac.observe.ledger import Ledger
from gac.observe.module_names import group_parameters
from gac.observe.optimizer_space import SecondMoments
from gac.observe.topology import is_dtensor, local_gradient, local_numel, local_part
from gac.statistics import Branch

BUCKET_BYTES = 128 * 2**20
"""Gradients that hooks keep are handed over once this much is pending: what is kept is memory."""

RUNNING_BUCKET_BYTES = 2**30
"""The same for running sums, which nobody has to keep: a call costs its host time, a large one 0.8% of its bytes for as
long as it runs. (On an H100 a bucket of 128 MiB gained nothing from the L2; 1 B parameters took 52 calls a step.)"""

Tokens = float | Tensor | None
"""What a contribution counts for; see :meth:`gac.Mixer.backward`."""

_Batch = tuple[list[int], list[Tensor], list[Tensor]]
"""Regions of a ledger's layout, gradients, second moments (none of them in the space of gradients)."""

_is_sparse = operator.attrgetter("is_sparse")
_graph_task_id = torch._C._current_graph_task_id
_queue_callback = torch.autograd.Variable._execution_engine.queue_callback


def bucket_bytes(*, sharded: bool, running: bool) -> float:
    """Bytes of gradients that are pending when a bucket is handed over during the backward pass.

    Gradients of shards appear on a stream of the engine's own: they are read when the pass is over.
    """
    if sharded:
        return float("inf")
    return RUNNING_BUCKET_BYTES if running else BUCKET_BYTES


@dataclass(frozen=True)
class Contribution:
    """What one backward pass added to the gradients: its branch, and the tokens that it counts for (None: untold)."""

    branch: Branch
    tokens: Tokens


class _Pass:
    """What hooks keep of the backward pass under way, in slots: a hook finds every cache empty."""

    __slots__ = ("bytes", "seconds", "task")

    def __init__(self) -> None:
        self.task = -1  # its number, -1 for none
        self.bytes = 0  # pending
        self.seconds = 0.0  # host time spent here since the observer was last cleared


class Observer:
    """Watches the parameters of a model. One contribution is what one backward pass adds to the gradients.

    Args:
        parameters: named parameters that require gradients, each once.
        lossless: the exact estimator's layout.
        running: read ``p.grad`` after accumulation (and take differences) instead of the incoming gradient.
        seed: of the sketch.
        second_moments: measure in the space of the optimizer that has these; None: in that of the gradients.
        copies: for each parameter, how many ranks hold the same piece of it (:class:`gac.observe.topology.Topology`).
        hooks: False leaves the gradients to :meth:`take`.
    """

    def __init__(
        self,
        parameters: Iterable[tuple[str, nn.Parameter]],
        *,
        lossless: bool,
        running: bool,
        seed: int,
        second_moments: SecondMoments | None = None,
        copies: Sequence[int] | None = None,
        hooks: bool = True,
    ):
        self.running = running
        self.hooks = hooks
        self.second_moments = second_moments
        self.names: list[str] = []
        self.parameters: list[nn.Parameter] = []
        self._place: list[tuple[int, int]] = []  # parameter -> (ledger, region)
        groups: dict[tuple[torch.device, int], list[int]] = {}
        for index, (name, parameter) in enumerate(parameters):
            self.names.append(name)
            self.parameters.append(parameter)
            key = (parameter.device, 1 if copies is None else copies[index])
            group = groups.setdefault(key, [])
            self._place.append((list(groups).index(key), len(group)))
            group.append(index)
        self.sharded = any(is_dtensor(p) for p in self.parameters)
        numels = [local_numel(p) for p in self.parameters]
        self._bytes = [n * p.element_size() for n, p in zip(numels, self.parameters, strict=True)]
        self._bucket = bucket_bytes(sharded=self.sharded, running=running)
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self.module_labels, modules = group_parameters(self.names)
        self.ledgers = [
            Ledger(
                [numels[k] for k in group],
                device,
                lossless=lossless,
                running=running,
                seed=seed + number,
                modules=[modules[k] for k in group],
                module_count=len(self.module_labels),
                copies=same,
            )
            for number, ((device, same), group) in enumerate(groups.items())
        ]
        self.contributions: list[Contribution] = []  # of this step, in order
        self.branch: Branch | None = None
        self.tokens: Tokens = None  # of the contributions to come
        self.outside = False  # whether backward passes outside a branch are expected in this step
        self.fired = False  # whether any hook ran since the last clear(); entering a branch counts without hooks
        self.alive = False  # whether any hook ever ran
        self.entered = False  # whether a branch was entered since the last clear()
        self.broken = False  # a backward pass raised: this step's sums are incomplete
        self._pass = _Pass()
        self._scales: list[Tensor] = []
        self._open = False
        self._seen: set[int] = set()
        self._pending: dict[int, Tensor | None] = {}  # None: p.grad, when it is handed over
        self._orders: dict[int, tuple[list[int], list[tuple[list[int], list[nn.Parameter]]]]] = {}  # by the first one
        self._incoming: dict[int, Tensor] = {}
        self._handles = []
        self.measuring = False
        """Whether this step is measured."""
        self.by_module = False
        self.measure(True)

    def _attach(self) -> None:
        for index, parameter in enumerate(self.parameters):
            if not self.running:
                self._handles.append(parameter.register_hook(functools.partial(self._on_gradient, index)))
            hook = self._running_hook(index) if self.running else functools.partial(self._on_accumulated, index)
            self._handles.append(parameter.register_post_accumulate_grad_hook(hook))

    def remove(self) -> None:
        """Takes the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def measure(self, measuring: bool, *, by_module: bool = False) -> None:
        """Whether the step to come is measured, and also module by module.

        A step that is not measured has no hooks: they would cost time and tell nothing.
        """
        self.measuring, self.by_module = measuring, by_module
        if measuring and self.hooks and not self._handles:
            self._attach()
        elif not measuring:
            self.remove()
        for ledger in self.ledgers:
            ledger.by_module = by_module

    @property
    def seconds(self) -> float:
        """Host time spent here since the last :meth:`clear`."""
        return self._pass.seconds

    @seconds.setter
    def seconds(self, value: float) -> None:
        self._pass.seconds = value

    @property
    def counts(self) -> dict[Branch, int]:
        """Contributions of each branch in this step."""
        return {branch: sum(c.branch is branch for c in self.contributions) for branch in Branch}

    # -- branches -------------------------------------------------------------------------------------------------

    def enter(self, branch: Branch, scale: Tensor, tokens: Tokens = None) -> None:
        """Contributions from now on belong to ``branch``; ``scale`` undoes the weight of its loss."""
        self.branch = branch
        self.tokens = tokens
        self.entered = True
        self.fired |= not self.measuring
        self._scales = [
            scale if scale.device == ledger.device else scale.to(ledger.device, non_blocking=True)
            for ledger in self.ledgers
        ]

    def leave(self, *, failed: bool) -> None:
        """The branch ends; ``failed`` after an exception, which leaves its contribution incomplete."""
        if failed:
            self.fail()
        self.finish()
        self.branch = None
        self.tokens = None

    def fail(self) -> None:
        """A backward pass raised: what it left of its contribution is dropped, and the step counts as broken."""
        if self._open:
            self._drop()
            self.broken = True

    # -- hooks ----------------------------------------------------------------------------------------------------

    def _on_gradient(self, index: int, gradient: Tensor) -> None:
        # Runs for torch.autograd.grad too, where nothing is accumulated and _on_accumulated never follows.
        if self.branch is not None:
            self._incoming[index] = gradient  # the tensor itself: an alias would let p.grad take its memory over

    def _running_hook(self, index: int) -> Callable[[nn.Parameter], None]:
        """The hook of a parameter whose running sum is read later.

        It runs between large matrix products, when nothing of it is in a cache any more: what it touches is what it
        costs (25 us where it touched the observer's dictionary and the gradient, against 2 us in a tight loop).
        """
        pending, now, size, bucket = self._pending, self._pass, self._bytes[index], self._bucket

        def on_accumulated(parameter: nn.Parameter, clock=perf_counter, task=_graph_task_id) -> None:
            start = clock()
            if task() == now.task:  # not the first of its pass: nothing to check
                pending[index] = None
                now.bytes += size
                if now.bytes >= bucket:
                    self._flush()
            else:
                self._notice(index, None)
            now.seconds += clock() - start

        return on_accumulated

    def _on_accumulated(self, index: int, parameter: nn.Parameter) -> None:
        start = perf_counter()
        self._notice(index, self._incoming.pop(index, None))
        self._pass.seconds += perf_counter() - start

    def _notice(self, index: int, gradient: Tensor | None) -> None:
        if self.branch is None and self.outside:
            return
        if self.branch is None:
            raise RuntimeError(
                f"a backward pass reached parameter {self.names[index]!r} outside a branch: run it inside "
                "`with mixer.sft():` or `with mixer.rl():`, or call mixer.unpatch() first"
            )
        task = _graph_task_id()
        if task != self._pass.task:
            self._pass.task = task
            _queue_callback(self._end_of_backward)
        if self.sharded and self.parameters[index].grad.is_cuda:
            device = self.parameters[index].grad.device
            self._streams[device] = torch.cuda.current_stream(device)
        self._begin()
        if not self.running:
            if index in self._seen:
                gradient = self._merge(index, gradient)
            self._seen.add(index)
        self._pending[index] = gradient
        self._pass.bytes += self._bytes[index]
        if self._pass.bytes >= self._bucket:
            self._flush()

    def _begin(self) -> None:
        self.fired = self.alive = True
        if not self._open:
            self._open = True
            for ledger in self.ledgers:
                ledger.begin()

    def take(self, gradients: Sequence[Tensor | None]) -> None:
        """One contribution from buffers that hold running sums, one for each parameter or None."""
        self._begin()
        self._pending.update((index, g) for index, g in enumerate(gradients) if g is not None)
        self.finish()

    def _merge(self, index: int, gradient: Tensor) -> Tensor:
        """A parameter came twice in one backward pass (re-entrant checkpointing of a tied weight)."""
        if index in self._pending:
            return self._pending.pop(index).detach() + gradient.detach()
        if self.ledgers[self._place[index][0]].direct:
            raise RuntimeError(
                f"parameter {self.names[index]!r} received two gradients in one backward pass, more than a bucket "
                'apart: checkpoint with use_reentrant=False, or patch with estimator="sketch"'
            )
        return gradient

    def _end_of_backward(self) -> None:
        # Inside a re-entrant checkpoint this is the end of a nested pass: the contribution goes on.
        if torch._C._current_autograd_node() is None:
            self.finish()

    # -- contributions --------------------------------------------------------------------------------------------

    def finish(self) -> None:
        """Closes the open contribution, if there is one."""
        self._pass.task = -1
        self._incoming.clear()
        if not self._open:
            return
        start = perf_counter()
        self._flush()
        for ledger, scale in zip(self.ledgers, self._scales, strict=True):
            ledger.end(self.branch, scale)
        self.contributions.append(Contribution(self.branch, self.tokens))
        self._open = False
        self._seen.clear()
        self._pass.seconds += perf_counter() - start

    @torch.no_grad()
    def _flush(self) -> None:
        for device, stream in self._streams.items():
            torch.cuda.current_stream(device).wait_stream(stream)
        batches = self._running_sums() or self._batches()
        self._pending.clear()
        self._pass.bytes = 0
        for ledger, scale, (regions, gradients, moments) in zip(self.ledgers, self._scales, batches, strict=True):
            if regions and self.second_moments is None:
                ledger.read(self.branch, regions, gradients, scale)
            elif regions:
                ledger.read(self.branch, regions, gradients, scale, moments, self.second_moments.eps)

    def _running_sums(self) -> list[_Batch] | None:
        """What :meth:`_batches` returns, in the plain case, without a line of Python per parameter; else None.

        Parameters get their gradients in the same order pass after pass: whose is which is looked up once.
        """
        if not self.running or self.sharded or self.second_moments is not None:
            return None
        if set(self._pending.values()) != {None}:  # take() has buffers of its own
            return None
        order = list(self._pending)
        known, found = self._orders.get(order[0], (None, []))
        if known != order:
            if sum(len(one) for one, _ in self._orders.values()) > 4 * len(self.parameters):
                self._orders.clear()  # passes that all differ must not fill the memory
            found = [([], []) for _ in self.ledgers]
            for index in order:
                which, region = self._place[index]
                found[which][0].append(region)
                found[which][1].append(self.parameters[index])
            self._orders[order[0]] = order, found
        result = []
        for regions, parameters in found:
            gradients = [parameter.grad for parameter in parameters]
            try:
                if any(map(_is_sparse, gradients)):
                    return None
            except AttributeError:  # one is None
                return None
            result.append((regions, gradients, []))
        return result

    def _batches(self) -> list[_Batch]:
        """Regions, gradients and second moments of what is pending, for each ledger."""
        batches: list[_Batch] = [([], [], []) for _ in self.ledgers]
        for index, gradient in self._pending.items():
            which, region = self._place[index]
            regions, gradients, moments = batches[which]
            if gradient is None:
                gradient = self.parameters[index].grad
                if gradient is None:
                    raise RuntimeError(
                        f"the gradient of parameter {self.names[index]!r} was cleared during the backward pass (by a "
                        'hook that steps an optimizer?): patch with estimator="exact", which reads gradients as they '
                        "arrive"
                    )
            if self.second_moments is not None:
                v = self.second_moments.of(self.parameters[index])
                if v is None:
                    continue  # the optimizer has not met this parameter: its scale there is unknown
                moments.append(local_part(v))
            regions.append(region)
            if self.sharded:
                gradient = local_gradient(gradient, self.parameters[index])
            gradients.append(gradient.to_dense() if gradient.layout is torch.sparse_coo else gradient)
        return batches

    def _drop(self) -> None:
        self._pending.clear()
        self._pass.bytes = 0
        self._incoming.clear()
        self._seen.clear()
        self._open = False

    def clear(self) -> None:
        """Forgets the step: sums, counts and host time."""
        self._drop()
        if self.contributions or self.broken:
            for ledger in self.ledgers:
                ledger.clear()
        self.contributions = []
        self.fired = self.broken = self.outside = self.entered = False
        self._pass.seconds = 0.0

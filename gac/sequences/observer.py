"""The observer of ``estimator="sequence"``: it watches layers instead of parameters."""

from __future__ import annotations

import functools
import math
import random
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from time import perf_counter

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from gac.observe.contribution import Contribution, Tokens, UnweightedLoss
from gac.observe.module_names import some
from gac.observe.observer import Observer
from gac.observe.passes import Passes
from gac.observe.topology import Topology
from gac.sequences.alignment import Alignments
from gac.sequences.check import GradientCheck
from gac.sequences.layers import Layer, find_layers
from gac.sequences.options import SequenceOptions
from gac.sequences.rows import Chosen, Given, Rows
from gac.sequences.shared import share_signs
from gac.sequences.sources import StepOfSources
from gac.sequences.step import Signs, Sketches, StepSums
from gac.sequences.supported import WRAPPER, check_supported
from gac.sequences.taps import Kept, Taps
from gac.statistics.branch import Branch

HISTORY = 4096
"""Steps of sources that are kept."""

_graph_task_id = torch._C._current_graph_task_id
_queue_callback = torch.autograd.Variable._execution_engine.queue_callback


class SequenceObserver(Observer):
    """Watches the layers of a model: a contribution is what one sequence adds to the gradients.

    In a branch the rows of a backward pass are its sequences. Inside :meth:`rows` they are told, and belong to either
    branch; several passes then add to the same sequences.

    Args:
        model: whose layers are watched.
        parameters: the trainable ones, each once.
        options: of the sketches.
        topology: of the ranks. In a lone process ``p.grad`` is what sequences add up to, and is held against them once.

    Attributes:
        layers: what is seen, and what not.
        sums: of the step, on this rank.
        sources: of the steps whose rows were told theirs. alignments: of demonstrations that were told their numbers.
        step: its number; set before :meth:`measure`.
        group_size: so many neighbouring rows of a pass in the RL branch (rollouts of a prompt) are one contribution.
    """

    launching = ("sketch_layer", "absorb")
    """Methods that run kernels, for :class:`gac.observe.device_time.DeviceTime`."""

    def __init__(
        self,
        model: nn.Module,
        parameters: Sequence[tuple[str, nn.Parameter]],
        options: SequenceOptions,
        topology: Topology,
    ) -> None:
        check_supported(model, parameters)
        parameters = [(name.replace(WRAPPER, ""), p) for name, p in parameters]
        self.layers = find_layers(model, parameters, options.sketch_size)
        share_signs(self.layers.seen)
        if not self.layers.slots:
            raise ValueError(
                'estimator="sequence" sees no trainable parameter of this model: it knows nn.Linear, nn.Embedding, '
                f"Conv1D and norms, and the model trains {some(self.layers.unseen)}. Use another estimator"
            )
        if self.layers.unseen:
            warnings.warn(
                f'estimator="sequence" sees {self.layers.share:.1%} of the trainable elements, and measures the '
                f"gradients of these: not seen are {some(self.layers.unseen)}",
                stacklevel=6,
            )
        self.device = parameters[0][1].device
        self._options = options
        self.step, self.group_size = 0, 1
        self._tapped: list[RemovableHandle] = []
        self._taps = Taps(model, self.layers.seen, self._take)
        self._rows: Rows | None = None  # that were told
        self._mixed = False  # whether a mixed loss was made of them
        self._sketches: Sketches | None = None
        self._signs: Signs | None = None
        self._given: Given | None = None  # what the pass under way began with
        self._lost: set[str] = set()  # that were named
        self._unexplained: set[int] = set()  # numbers of slots that are left out
        self._check = GradientCheck(self.layers, parameters) if topology.ranks == 1 and not topology.managed else None
        self._undone: Tensor | None = None  # of the branch under way
        self.sources: deque[StepOfSources] = deque(maxlen=HISTORY)
        self.alignments = Alignments()
        super().__init__([], lossless=True, running=False, seed=0)
        watched = [parameter for _, parameter in parameters]
        self._passes = Passes(watched, broken=lambda: setattr(self.seen, "broken", True))
        self.module_labels = self.layers.labels
        self.sums = StepSums(self.layers, self.device, by_module=False)

    @property
    def nbytes(self) -> int:
        """Device memory of the sums; the sketches of a batch take more while it runs."""
        return self.sums.nbytes

    def remove(self) -> None:
        """Takes the hooks off."""
        super().remove()
        while self._tapped:
            self._tapped.pop().remove()

    def measure(self, measuring: bool, *, by_module: bool = False) -> None:
        """As :meth:`Observer.measure`; a new step has new signs."""
        super().measure(measuring, by_module=by_module)
        if measuring and not self._tapped:
            self._tapped = self._taps.attach()
        self._signs = None
        self.sums = StepSums(self.layers, self.device, by_module=by_module)

    def _signs_of_step(self) -> Signs:
        """Those of the step under way, drawn when its first gradient comes."""
        if self._signs is None:
            seed = self.step if self._options.seed is None else self._options.seed
            weights = [0.0 if k in self._unexplained else weight for k, weight in enumerate(self._drawn())]
            self._signs = Signs(self.layers.slots, seed, weights, self.device)
        return self._signs

    def _drawn(self) -> list[float]:
        """What each slot's sketch is multiplied with in this step: ``1 / sqrt(share)`` where it was drawn, else 0.

        Among slots of one shape as many are drawn as the share says, at least one, and each with the same chance.
        """
        share = self._options.layer_share
        weights = [1.0] * len(self.layers.slots)
        if share == 1:
            return weights
        strata: dict[tuple[int, ...], list[int]] = {}
        for slot in self.layers.slots:
            strata.setdefault(slot.dims, []).append(slot.number)
        draw = random.Random(self.step)  # the same on every rank
        for members in strata.values():
            count = math.ceil(share * len(members))
            chosen = set(draw.sample(members, count))
            for number in members:
                weights[number] = math.sqrt(len(members) / count) if number in chosen else 0.0
        return weights

    # -- branches and batches -------------------------------------------------------------------------------------

    def enter(self, branch: Branch, scale: Tensor, tokens: Tokens = None) -> None:
        """As :meth:`Observer.enter`."""
        self._refuse(tokens)
        self._undone = scale
        super().enter(branch, scale, None)
        self._begin_check()

    @contextmanager
    def contribution(self, tokens: Tokens = None) -> Iterator[None]:
        """As :meth:`Observer.contribution`."""
        self._refuse(tokens)
        with super().contribution(None):
            yield

    @staticmethod
    def _refuse(tokens: Tokens) -> None:
        if tokens is not None:
            raise ValueError(
                'tokens= of a backward pass: with estimator="sequence" each row is a contribution. Say what each row '
                "counts for by `with mixer.batch(is_expert=..., tokens=[B])`, or leave it out"
            )

    @contextmanager
    def rows(self, rows: Rows, scales: Tensor) -> Iterator[None]:
        """A batch of sequences that were told: the backward passes inside are theirs.

        Args:
            scales: ``[2]``, what takes weighted gradients of SFT and RL back.
        """
        told = rows.tokens is not None
        if self.sums.told not in (None, told) and self.measuring:
            raise ValueError("some batches of the step were told tokens= of their rows and some not: tell all, or none")
        self._rows, self._sketches, self._mixed = rows, None, False
        self.seen.fired |= not self.measuring
        self._passes.entered()
        self._begin_check()
        try:
            yield
            if self._passes.died:
                self.fail()
            if self._sketches is not None:
                self.absorb(self._sketches, scales)
                self.sums.told = told
            elif self.measuring and self._mixed:
                raise RuntimeError(
                    "mixer.mixed_loss was called inside `with mixer.batch(...)`, and no backward pass inside reached a "
                    "watched layer: call backward before the batch ends. If you did, the hooks are gone: copy.deepcopy "
                    "and fully_shard drop them, so patch the model after any of these"
                )
        except BaseException:
            self.fail()
            raise
        finally:
            self._drop()
            self._rows = None

    @contextmanager
    def selected(self, chosen: Chosen) -> Iterator[None]:
        """Layers called inside may get these tokens of the batch's sequences alone."""
        if self._rows is not None and len(chosen.bounds) != self._rows.count + 1:
            raise ValueError(
                f"lengths must have a number for each of the {self._rows.count} rows of the batch, got "
                f"{len(chosen.bounds) - 1}"
            )
        self._taps.chosen = chosen
        try:
            yield
        finally:
            self._taps.chosen = None

    @property
    def in_batch(self) -> bool:
        """Whether sequences were told whose passes are under way."""
        return self._rows is not None

    def expect_mixed(self) -> None:
        """A mixed loss is made: raises RuntimeError outside a batch, where nobody knows whose its rows are."""
        if self._rows is None:
            raise RuntimeError(
                'mixer.mixed_loss with estimator="sequence": forward and backward pass belong inside `with '
                "mixer.batch(is_expert=...):`, which says whose the rows are"
            )
        self._mixed = True

    # -- the backward pass ----------------------------------------------------------------------------------------

    @torch.no_grad()
    def _take(self, layer: Layer, kept: Kept, gradient: Tensor) -> None:
        start = perf_counter()
        try:
            if self.measuring and self._opens(layer, kept, gradient):
                self.sketch_layer(layer, kept, gradient)
        finally:
            self.now.seconds += perf_counter() - start

    def sketch_layer(self, layer: Layer, kept: Kept, gradient: Tensor) -> None:
        """Adds what one use of a layer gives to the sketches of the pass under way."""
        with torch.autocast(gradient.device.type, enabled=False):  # passes may run inside one
            self._sketches_of(kept, gradient).take(layer, kept, gradient.detach())

    def _opens(self, layer: Layer, kept: Kept, gradient: Tensor) -> bool:
        """Whether a gradient belongs to the step; opens the contribution that it begins."""
        if self._rows is None and self.branch is None:
            if self.seen.outside:
                return False
            raise RuntimeError(
                f"a backward pass reached layer {layer.name!r} outside a branch: run it inside "
                "`with mixer.batch(...)`, `with mixer.sft()` or `with mixer.rl()`, or call mixer.unpatch() first"
            )
        task = _graph_task_id()
        if task != self.now.task:
            with self._passes.turn():
                if not self._passes.guided:
                    self._next_pass_from(gradient)
                self.now.task = task
                self._passes.began(task)
            _queue_callback(functools.partial(self._end_of_backward, task))
        self.seen.fired = self.alive = self._open = True
        return True

    def _next_pass_from(self, gradient: Tensor) -> None:
        """A plain backward pass: another one, or a part of the one under way."""
        call = self._passes.present(on_host=gradient.device.type == "cpu")
        if self._passes.goes_on(call):
            return
        self._passes.check_alone(plain=self._open)
        if self._rows is None:
            self._close(note=False)
        self._passes.opened(call)
        if self._rows is not None and not self._mixed:
            raise UnweightedLoss(
                "a backward pass inside `with mixer.batch(...)`, whose loss lacks the weights of its branches: "
                "call mixer.mixed_loss(sft_loss=..., rl_loss=...) and its backward"
            )
        if self.branch is not None and self.tells_weights and self.branch not in self.seen.weighted:
            raise UnweightedLoss.of(self.branch)

    def _sketches_of(self, kept: Kept, gradient: Tensor) -> Sketches:
        """The sketches that this gradient adds to, with a row for each sequence."""
        given = kept.given
        padded = self._rows is not None and self._rows.bounds is None
        if self._rows is not None and padded and given is not None and given.rows != self._rows.count:
            raise ValueError(
                f"is_expert has {self._rows.count} rows, and the model was called with {given.rows}: rows of "
                "dimension 0 are the sequences. Packed ones need lengths= or cu_seqlens="
            )
        if self._sketches is None:
            rows, self._given = self._rows, given
            if rows is None:
                count = gradient.shape[0] if given is None else given.rows
                expert = torch.full((count,), self.branch is Branch.SFT, dtype=torch.bool, device=self.device)
                groups = None
                if self.group_size > 1 and self.branch is Branch.RL:
                    groups = torch.arange(count, device=self.device) // self.group_size
                rows = Rows(count, expert, groups)
            self._sketches = Sketches(rows, self.layers, self._signs_of_step(), self.device)
        elif self._rows is None and given is not None and self._given is not None and given.rows != self._given.rows:
            raise ValueError(
                f"one backward pass over calls of the model with {self._given.rows} and {given.rows} rows: run a pass "
                "for each, so that it is known whose the rows are"
            )
        return self._sketches

    def finish(self, *, note: bool = True) -> None:
        """As :meth:`Observer.finish`; a batch goes on until its context ends."""
        self.now.task = -1
        if not self._open or self._rows is not None:
            return
        start = perf_counter()
        if self._sketches is not None and self._undone is not None and self.branch is not None:
            self.absorb(self._sketches, torch.stack([self._undone, self._undone]))
            self.seen.contributions.append(Contribution(self.branch, None))
        self._drop()
        self.now.seconds += perf_counter() - start

    @torch.no_grad()
    def _begin_check(self) -> None:
        if self._check is not None and self.measuring:
            self._check.begin(self._signs_of_step())

    def _hold_against_gradients(self, sketches: Sketches) -> None:
        """Once: what the rows do not explain is named and left out from here on."""
        if self._check is None:
            return
        found = [x for x in self._check.unexplained(sketches.table, self._signs_of_step()) if x not in sketches.lost]
        self._check = None
        if not found:
            return
        self._unexplained = {slot.number for slot in found}
        self._signs = None
        sketches.lost.update(found)
        self._lost |= {slot.name for slot in found}
        self.layers.leave_out(found)
        warnings.warn(
            f"the sequences of a batch do not add up to the gradient of {some([slot.name for slot in found])}: it is "
            "used in a way that no layer shows (a fused loss, a function that reads the weight), or was changed inside "
            f"the batch. It is not measured from here on, {self.layers.share:.1%} of the trainable elements are",
            stacklevel=2,
        )

    @torch.no_grad()
    def absorb(self, sketches: Sketches, scales: Tensor) -> None:
        """Takes the sequences of a batch or a pass into the sums of the step; ``scales``: as of :meth:`rows`."""
        with torch.autocast(self.device.type, enabled=False):
            self._hold_against_gradients(sketches)
            self.sums.absorb(sketches, scales.to(self.device))
        lost = {slot.name for slot in sketches.lost} - self._lost
        if lost:
            self._lost |= lost
            warnings.warn(
                f"of {some(sorted(lost))} it cannot be told which token belongs to which sequence (tokens were routed, "
                "selected or reordered before the layer), or the weights of experts were not at hand in the backward "
                "pass: their gradients are not measured",
                stacklevel=2,
            )

    def _drop(self) -> None:
        super()._drop()
        self._sketches = self._given = None

    def clear(self) -> None:
        """As :meth:`Observer.clear`."""
        super().clear()
        self.sums = StepSums(self.layers, self.device, by_module=self.by_module)

"""Gradients that wait for a call of the kernels: a bucket of them, and how it is read."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from gac.observe.optimizer_space import SecondMoments
from gac.observe.topology import local_gradient, local_numel, local_part

if TYPE_CHECKING:
    from gac.observe.ledger import Ledger

BUCKET_BYTES = 128 * 2**20
"""Gradients that hooks keep are handed over once this much is pending: what is kept is memory."""

RUNNING_BUCKET_BYTES = 2**30
"""The same for running sums, which nobody has to keep: a call costs its host time, a large one 0.8% of its bytes for as
long as it runs. (On an H100 a bucket of 128 MiB gained nothing from the L2; 1 B parameters took 52 calls a step.)"""

_Some = tuple[list[int], list[int], list[nn.Parameter]]
"""Of one ledger: regions, and whose they are."""

_is_sparse = operator.attrgetter("is_sparse")


def bucket_bytes(*, sharded: bool, running: bool) -> float:
    """Bytes of gradients that are pending when a bucket is handed over during the backward pass.

    Gradients of shards appear on a stream of the engine's own: they are read when the pass is over.
    """
    if sharded:
        return float("inf")
    return RUNNING_BUCKET_BYTES if running else BUCKET_BYTES


class Batch(NamedTuple):
    """What one ledger is to read.

    Attributes:
        regions: of the ledger's layout. gradients: one for each. moments: second moments, one for each; none of them
            in the space of gradients. eps: added to their roots.
    """

    regions: list[int]
    gradients: list[Tensor]
    moments: list[Tensor]
    eps: float = 0.0


class Pass:
    """What hooks keep of the backward pass under way, in slots: a hook finds every cache empty."""

    __slots__ = ("bytes", "seconds", "task")

    def __init__(self) -> None:
        self.task = -1  # its number, -1 for none
        self.bytes = 0  # pending
        self.seconds = 0.0  # host time spent in hooks since the step began


class Streams:
    """The streams on which gradients of shards appear: of an engine's own."""

    def __init__(self) -> None:
        self._last: dict[torch.device, torch.cuda.Stream] = {}

    def note(self, gradient: Tensor | None) -> None:
        """A gradient has just appeared on the present stream."""
        if gradient is not None and gradient.is_cuda:
            self._last[gradient.device] = torch.cuda.current_stream(gradient.device)

    def wait(self) -> None:
        """What runs on the present streams from now on comes after them."""
        for device, stream in self._last.items():
            torch.cuda.current_stream(device).wait_stream(stream)


class Pending:
    """The gradients that a backward pass has produced and no kernel has read.

    Args:
        names, parameters: of the model, in one order.
        places: ledger and region of each parameter.
        ledgers: how many there are.
        sharded: whether parameters are DTensors.
        running: whether gradients are read where they were accumulated.

    Attributes:
        gradients: by the parameter's index; None stands for ``p.grad`` at the time of reading.
        now: the pass under way. Hooks reach for ``gradients`` and ``now`` directly.
        limit: bytes at which a bucket is handed over. fits: whether all gradients make one bucket.
        streams: that gradients of shards appear on.
    """

    def __init__(
        self,
        names: Sequence[str],
        parameters: Sequence[nn.Parameter],
        *,
        places: Sequence[tuple[int, int]],
        ledgers: int,
        sharded: bool,
        running: bool,
    ) -> None:
        self.gradients: dict[int, Tensor | None] = {}
        self.now = Pass()
        self.opener: int | None = None  # the parameter that the pass under way reached first
        self.kept: tuple[int, Tensor] | None = None
        self.limit = bucket_bytes(sharded=sharded, running=running)
        self._nbytes = [local_numel(parameter) * parameter.element_size() for parameter in parameters]
        self.fits = sum(self._nbytes) < self.limit
        self.streams = Streams()
        self._names, self._parameters = names, parameters
        self._places, self._ledgers = places, ledgers
        self._sharded, self._running = sharded, running
        self._orders: dict[int, tuple[list[int], list[_Some]]] = {}  # by the first one

    def size_of(self, index: int) -> int:
        """Bytes of a parameter's gradient."""
        return self._nbytes[index]

    def add(self, index: int, gradient: Tensor | None) -> bool:
        """Keeps a parameter's gradient; whether the bucket is full."""
        self.gradients[index] = gradient
        self.now.bytes += self._nbytes[index]
        return self.now.bytes >= self.limit

    def keep(self) -> None:
        """Keeps a copy of the running sum that the next pass is going to write first: that which this one began with.

        A pass within a re-entrant checkpoint may be the last that is seen of its contribution, which the first hook of
        the next pass ends; one gradient then has more in it already.
        """
        gradient = None if self.opener is None else self._parameters[self.opener].grad
        self.kept = None if self.opener is None or gradient is None else (self.opener, gradient.detach().clone())

    def put_back(self, index: int, ledgers: Sequence[Ledger]) -> bool:
        """Has what was kept read in place of the gradient of ``index``; False where another one was kept."""
        if self.kept is None:
            return True
        (kept, gradient), self.kept = self.kept, None
        which, region = self._places[index]
        return kept == index and ledgers[which].read_instead(region, local_part(gradient))

    def merge(self, index: int, gradient: Tensor | None, *, direct: bool) -> Tensor | None:
        """The gradient of a parameter that came twice in one backward pass (re-entrant checkpointing of a tied weight).

        Args:
            index: of the parameter. gradient: the second one. direct: whether its ledger takes gradients as they are.

        Raises RuntimeError where the first one was handed over already and cannot be taken back.
        """
        earlier = self.gradients.pop(index, None)
        if earlier is not None and gradient is not None:
            return earlier.detach() + gradient.detach()
        if direct:
            raise RuntimeError(
                f"parameter {self._names[index]!r} received two gradients in one backward pass, more than a bucket "
                'apart: checkpoint with use_reentrant=False, or patch with estimator="sketch"'
            )
        return gradient

    def clear(self) -> None:
        """Forgets what is pending."""
        self.gradients.clear()
        self.now.bytes = 0

    def take(self, moments: SecondMoments | None) -> list[Batch]:
        """Empties the bucket: what each ledger is to read.

        Raises RuntimeError where a gradient was cleared during the backward pass.
        """
        batches = self._in_one_order() if moments is None and not self._sharded else None
        if batches is None:
            batches = self._batches(moments)
        self.clear()
        return batches

    def _in_one_order(self) -> list[Batch] | None:
        """The batches in the plain case, without a line of Python per parameter; else None.

        Parameters get their gradients in the same order pass after pass: whose is which is looked up once.
        """
        if self._running and set(self.gradients.values()) != {None}:  # buffers that were handed over
            return None
        order = list(self.gradients)
        if not order:
            return None
        known, found = self._orders.get(order[0], (None, []))
        if known != order:
            if sum(len(one) for one, _ in self._orders.values()) > 4 * len(self._parameters):
                self._orders.clear()  # passes that all differ must not fill the memory
            found = [([], [], []) for _ in range(self._ledgers)]
            for index in order:
                which, region = self._places[index]
                regions, indices, parameters = found[which]
                regions.append(region)
                indices.append(index)
                parameters.append(self._parameters[index])
            self._orders[order[0]] = order, found
        result = []
        for regions, indices, parameters in found:
            if self._running:
                gradients = [parameter.grad for parameter in parameters]
            elif len(indices) == len(order):
                gradients = list(self.gradients.values())
            else:
                gradients = [self.gradients[index] for index in indices]
            try:
                if any(map(_is_sparse, gradients)):
                    return None
            except AttributeError:  # one is None
                return None
            result.append(Batch(regions, gradients, []))  # type: ignore[arg-type]
        return result

    def _batches(self, second_moments: SecondMoments | None) -> list[Batch]:
        eps = 0.0 if second_moments is None else second_moments.eps
        batches = [Batch([], [], [], eps) for _ in range(self._ledgers)]
        for index, gradient in self.gradients.items():
            which, region = self._places[index]
            batch = batches[which]
            if gradient is None:
                gradient = self._parameters[index].grad
                if gradient is None:
                    raise RuntimeError(
                        f"the gradient of parameter {self._names[index]!r} was cleared during the backward pass (by a "
                        'hook that steps an optimizer?): patch with estimator="exact", which reads gradients as they '
                        "arrive"
                    )
            if second_moments is not None:
                v = second_moments.of(self._parameters[index])
                if v is None:
                    continue  # the optimizer has not met this parameter: its scale there is unknown
                batch.moments.append(local_part(v))
            batch.regions.append(region)
            if self._sharded:
                gradient = local_gradient(gradient, self._parameters[index])
            batch.gradients.append(gradient.to_dense() if gradient.layout is torch.sparse_coo else gradient)
        return batches


def resolve_buffers(buffers: object, names: Sequence[str], parameters: Sequence[nn.Parameter]) -> list[Tensor | None]:
    """The buffers that a trainer keeps its gradients in, one for each parameter; see :meth:`gac.Mixer.observe`.

    Raises ValueError where one does not fit its parameter, or there is none at all.
    """
    if isinstance(buffers, str):
        found = [getattr(parameter, buffers, None) for parameter in parameters]
    elif callable(buffers):
        found = [buffers(parameter) for parameter in parameters]
    else:
        found = list(buffers)  # type: ignore[call-overload]
    if len(found) != len(parameters):
        raise ValueError(f"buffers must be one for each of {len(parameters)} parameters, got {len(found)}")
    for name, parameter, buffer in zip(names, parameters, found, strict=True):
        if buffer is not None and buffer.numel() != parameter.numel():
            raise ValueError(
                f"the buffer of parameter {name!r} has {buffer.numel()} elements, the parameter {parameter.numel()}"
            )
    if all(buffer is None for buffer in found):
        raise ValueError("none of the parameters has a buffer: name the attribute that holds their gradients")
    return found

"""What both kinds of reduction share: a message that is posted when the step ends, and read when it is needed."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from gac.observe.crossing import Crossing
from gac.observe.observer import Observer
from gac.observe.reduction.message import Message
from gac.observe.reduction.weights import scalar
from gac.observe.topology import Topology
from gac.statistics.sums import StepSums, SumsOnHost


class Reduction(ABC):
    """Adds up a step's sums. Made when the step ends, which posts the collective; :meth:`finish` waits for it.

    The ledgers may be cleared in between. Every rank must make one in the same step.

    Args:
        observer: its ledgers hold the step.
        device: where the sums go.
        topology: of the ranks.
        time_noise: ``[2]``, of the elements that this rank holds.
        silent: whether no hook has ever run on this rank.
        costs: numbers that are added up over the ranks beside the sums; None: none are.
        crossing: earlier gradients, for products with them; None: there are no products.

    Attributes:
        costs: added up, once :meth:`finish` has waited; on one rank as they were given.
        totals: likewise ``[2m]`` for each ledger, both branches' gradients as far as this rank can have them.
    """

    def __init__(
        self,
        observer: Observer,
        device: torch.device,
        topology: Topology,
        *,
        time_noise: Tensor,
        silent: bool,
        costs: Sequence[Tensor | float] | None = None,
        crossing: Crossing | None = None,
    ) -> None:
        self._crossing = crossing
        self.totals: list[Tensor] = []
        self.costs: Sequence[Tensor | float] | Tensor | None = costs
        self._topology = topology
        self._device = device
        self._ledgers = observer.ledgers
        self._contributions = observer.seen.contributions
        self._by_module = observer.by_module
        self._modules = len(observer.module_labels)
        self._dtype = time_noise.dtype
        nonfinite = self._over_ledgers(ledger.nonfinite() for ledger in self._ledgers) + float(observer.seen.broken)
        own = {"nonfinite": nonfinite, "silent": self._full(float(silent)), "time_noise": time_noise}
        if costs is not None and topology.groups:
            own["costs"] = torch.stack([scalar(cost, device, self._dtype) for cost in costs])
        self._message = Message(own | self._pack(), device, topology.groups)

    def finish(self) -> StepSums:
        """The sums; the device (on a CPU: the host) waits for the collective."""
        found = self._message.unpack()
        self.costs = found.pop("costs", self.costs)
        return self._unpack(found)

    def finish_on_host(self) -> SumsOnHost:
        """The sums as numbers, without those by module; the host waits."""
        return self.finish().on_host()

    def finish_in_numbers(self, *, lone: bool) -> array[float]:
        """The same as :meth:`finish_on_device` has it; the host waits.

        Args:
            lone: whether there is noise from time.
        """
        return array("d", self.finish().stacked().tolist())

    def finish_on_device(self) -> Tensor:
        """The sums as one vector, ``[13]``, without those by module: :meth:`gac.statistics.sums.StepSums.stacked`."""
        return self.finish().stacked()

    @abstractmethod
    def _pack(self) -> dict[str, Tensor]:
        """What this rank adds to the message, by name."""

    @abstractmethod
    def _unpack(self, found: dict[str, Tensor]) -> StepSums:
        """The sums, from what all ranks' messages add up to."""

    def _full(self, value: float) -> Tensor:
        return torch.full((), value, dtype=self._dtype, device=self._device)

    def _no_modules(self) -> Tensor:
        return torch.zeros(self._modules, dtype=self._dtype, device=self._device)

    def _number(self, piece: Tensor) -> Tensor:
        return piece.reshape(()).to(self._dtype)

    def _over_ledgers(self, parts: Iterable[Tensor]) -> Tensor:
        return functools.reduce(torch.add, (part.to(self._device, non_blocking=True) for part in parts))

"""The sums of a step's sequences over ranks."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from gac.observe.reduction.message import Message
from gac.observe.reduction.weights import scalar
from gac.observe.topology import Topology
from gac.sequences.observer import SequenceObserver
from gac.sequences.sources import StepOfSources, pairs_of
from gac.statistics.sums import StepSums, SumsOnHost
from gac_kernels import pair_moments

Costs = Sequence[Tensor | float] | Tensor | None


class SequenceReduction:
    """Adds up what the sequences of all ranks left behind; made when the step ends, which posts the collective.

    Every rank has sequences of its own, whatever it holds of the model, and data parallelism averages gradients over
    the ``W`` ranks: a contribution counts as ``x / W``. Branch sums of sketches and a few numbers are all that travels,
    and sums of sketches for each source where all are named beforehand.

    Args:
        observer: of the step. device: where the sums go. topology: of the ranks.
        time_noise: ``[2]``, zeros. silent: whether no hook has ever run on this rank.
        costs: as of :class:`gac.observe.reduction.Reduction`.

    Attributes:
        costs: likewise.
    """

    def __init__(
        self,
        observer: SequenceObserver,
        device: torch.device,
        topology: Topology,
        *,
        time_noise: Tensor,
        silent: bool,
        costs: Costs = None,
    ) -> None:
        self.costs, self._time_noise = costs, time_noise
        sums, scale = observer.sums, 1.0 / topology.ranks
        self._observer, self._demonstrations = observer, sums.demonstrations
        self._labels = observer.history.labels if topology.groups else None
        record = None if self._labels else sums.sources.record(sums.totals, sums.power_of_rows, sums.n)
        if record is not None:
            observer.history.add(record)
        self._device, self._segments = device, observer.layers.segments
        self._dtype = sums.power.dtype
        message = {
            "power": sums.power * scale**2,
            "tokens": sums.tokens,
            "n": sums.n,
            "nonfinite": sums.nonfinite + float(observer.seen.broken),
            "silent": torch.full((), float(silent), dtype=self._dtype, device=device),
            "totals": sums.totals * scale,
        }
        if sums.module_power is not None:
            message["module_power"] = sums.module_power * scale**2
        if self._labels:
            rows, numbers = sums.sources.of_labels(self._labels, sums.totals, sums.power)
            message |= {
                "source_totals": rows * scale,
                "source_power": torch.cat([numbers[0], sums.power_of_rows]) * scale**2,
                "source_n": numbers[1],
            }
        if costs is not None and topology.groups:
            message["costs"] = torch.stack([scalar(cost, device, self._dtype) for cost in costs])
        self._message = Message(message, device, topology.groups)

    def finish(self) -> StepSums:
        """The sums; the device (on a CPU: the host) waits for the collective."""
        found = {name: piece.to(self._device) for name, piece in self._message.unpack().items()}
        self.costs = found.pop("costs", self.costs)
        totals = found["totals"].view(2, -1)
        for index, rows in self._demonstrations:
            self._observer.history.alignments.take(index, rows, totals[1])
        if self._labels:
            self._take_sources(found, totals)
        numbers = {name: found[name].reshape(-1).to(self._dtype) for name in ("power", "tokens", "n")}
        module_power = module_norms = None
        if "module_power" in found:
            module_power = found["module_power"].to(self._dtype).view(-1, 2)
            left, right = ([branch[a:b] for a, b in self._segments] for branch in totals)
            module_norms = pair_moments(left, right, per_tensor=True).to(self._dtype)
        return StepSums(
            **numbers,
            nonfinite=self._number(found["nonfinite"]),
            silent=self._number(found["silent"]),
            norms=pair_moments(totals[0], totals[1]).to(self._dtype),
            time_noise=self._time_noise,
            module_power=module_power,
            module_norms=module_norms,
        )

    def finish_on_host(self) -> SumsOnHost:
        """:meth:`finish` in numbers."""
        return self.finish().on_host()

    def finish_in_numbers(self, *, lone: bool) -> array[float]:
        """:meth:`finish` as one vector of the host; nothing is cleared."""
        return array("d", self.finish().stacked().tolist())

    def finish_on_device(self) -> Tensor:
        """:meth:`finish` as one vector."""
        return self.finish().stacked()

    def _take_sources(self, found: dict[str, Tensor], totals: Tensor) -> None:
        """The step's sources over all ranks, and both branches behind them."""
        sources = pairs_of(self._labels or ())
        rows = torch.cat([found["source_totals"].view(len(sources), -1), totals])
        numbers = torch.stack([found["source_power"], torch.cat([found["source_n"], found["n"].reshape(-1)])])
        record = StepOfSources(sources, (rows @ rows.T).to(self._dtype), numbers.to(self._dtype))
        self._observer.history.add(record)

    def _number(self, piece: Tensor) -> Tensor:
        return piece.reshape(()).to(self._dtype)

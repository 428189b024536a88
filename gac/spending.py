"""What steps cost, over ranks and devices: the account that a cadence decides by."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from time import perf_counter

import torch
from torch import Tensor

from gac.cadence import WARM_UP, Account, Cadence, Costs
from gac.metrics import HostMirror
from gac.observe.device_time import DeviceTime, Launching

PAUSE = 16
"""A step counts as no longer than the longest of so many before it: what takes longer is a pause."""


_AT_ONCE = 1024
"""Steps that are looked at together at most."""


class StepClock:
    """Tells how long steps take outside GAC, with pauses left out.

    An evaluation or a checkpoint falls into the step that follows it. It is no part of what a step takes, and must not
    pay for measuring; generation that comes every few steps must. So a step counts as at most the longest of the
    :data:`PAUSE` before it: what comes again within them counts in full, the rest as one of them.

    Args:
        now: seconds on the clock of :func:`time.perf_counter`; None: at present.
    """

    def __init__(self, now: float | None = None) -> None:
        self._since = perf_counter() if now is None else now
        self._ended: list[tuple[float, float]] = []  # looked at later, all together: that is what caches are for
        self._gac = self._rest = 0.0
        self._steps = 0
        self._before: deque[float] = deque(maxlen=PAUSE)
        self._longest = math.inf  # of those

    def tick(self, now: float, gac: float) -> None:
        """A step ends; ``gac``: seconds in GAC since :meth:`take`."""
        self._ended.append((now, gac))
        if len(self._ended) == _AT_ONCE:
            self._look()

    def _look(self) -> None:
        for now, gac in self._ended:
            rest = now - self._since - (gac - self._gac)
            if rest < 0.0:
                rest = 0.0
            self._since, self._gac = now, gac
            self._rest += min(rest, self._longest)
            self._before.append(rest)
            self._longest = max(self._before)
        self._steps += len(self._ended)
        self._ended.clear()

    def take(self) -> tuple[float, int]:
        """Seconds outside GAC of the steps that have ended since this was last asked, and how many they are."""
        self._look()
        found = self._rest, self._steps
        self._gac = self._rest = 0.0
        self._steps = 0
        return found


class Spending:
    """Keeps this rank's account, and tells the cadence what steps have cost all ranks.

    Args:
        cadence: which steps are measured.
        timed: whose kernels take time on devices.
        device: of the step's numbers.
        ranks: that measure together.

    Attributes:
        account: what this rank's steps cost.
        clock: how long they take.
    """

    def __init__(self, cadence: Cadence, timed: Sequence[Launching], device: torch.device, ranks: int) -> None:
        self.cadence, self.account, self.clock = cadence, Account(), StepClock()
        self._device, self._ranks = device, ranks
        self._device_time = DeviceTime(timed if cadence.counts_costs else ())
        self._on_their_way = HostMirror(device)  # costs of measured steps, to the host

    def ended(self, gac: float, *, measured: bool) -> None:
        """Steps have ended that took so many seconds in GAC, all but the last not measured; ``measured``: the last."""
        rest, steps = self.clock.take()
        self.account.ended(gac, rest, measured=measured, steps=steps)
        self._device_time.ended(gac)
        if late := self._device_time.beyond_host():
            self.account.late(late)
        if not measured:
            self.cadence.passed(steps)
        if self.cadence.counts_costs and self.cadence.measurements <= WARM_UP:
            self.account.forget()

    def report(self) -> list[Tensor | float] | None:
        """The numbers of :class:`gac.cadence.Costs` of this rank's steps since the last measured one, that included."""
        return [*self.account.report(), self.account.moved] if self.cadence.counts_costs else None

    def decide(self, costs: Sequence[Tensor | float] | Tensor | None) -> None:
        """A step was measured: what the steps before have cost, over all ranks, decides which one is next.

        On a GPU the costs that came with the measurement before are gone by, which are on the host by now.

        Args:
            costs: sums over the ranks of what each has reported.
        """
        if costs is None:
            self.cadence.measured(None)
            return
        if self._device.type == "cpu":
            found = [float(cost) for cost in costs]
        else:  # a copy behind an event: a plain read would wait for all that the device has to do
            known, there = ([], costs) if isinstance(costs, Tensor) else (costs[:-1], torch.as_tensor(costs[-1]))
            there = there.reshape(-1).to(self._device, torch.float64, non_blocking=True)
            self._on_their_way.publish(known, there)
            arrived = self._on_their_way.one_behind()
            found = [0.0] * 5 if arrived is None else [*arrived[0], *arrived[1]]
        found = [cost / self._ranks for cost in found]
        self.cadence.measured(Costs(*found) if found[3] > 0 else None)

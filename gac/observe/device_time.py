"""Seconds that a GPU spends in kernels that measure, by events that are read when they have passed."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch


class Launching(Protocol):
    """What runs kernels on one device: a ledger, or the observer of sequences.

    Attributes:
        device: where. launching: names of the methods that do.
    """

    device: torch.device
    launching: tuple[str, ...]


class DeviceTime:
    """Puts a pair of events around each call that runs kernels on a GPU. Nothing is waited for.

    Args:
        timed: ledgers, or the observer of sequences, which has none; those on CPUs are left alone.
        event: makes an event that can be timed.
    """

    def __init__(self, timed: Iterable[Launching], event: Callable[[], Any] | None = None) -> None:
        self._event = event or (lambda: torch.cuda.Event(enable_timing=True))
        self._pairs: dict[torch.device, list[tuple[Any, Any]]] = {}  # of the step under way
        self._steps: deque[tuple[dict[torch.device, list[tuple[Any, Any]]], float]] = deque()
        for one in timed:
            if one.device.type == "cuda":
                for name in one.launching:
                    setattr(one, name, self._timed(getattr(one, name), one.device))

    def _timed(self, function: Callable[..., None], device: torch.device) -> Callable[..., None]:
        def call(*args: Any) -> None:
            begin, end = self._event(), self._event()
            stream = torch.cuda.current_stream(device)
            begin.record(stream)
            function(*args)
            end.record(stream)
            self._pairs.setdefault(device, []).append((begin, end))

        return call

    def ended(self, host: float) -> None:
        """A step has ended whose host spent so many seconds in GAC."""
        if self._pairs:
            self._steps.append((self._pairs, host))
            self._pairs = {}

    def beyond_host(self) -> float:
        """Seconds by which devices took longer than the host, of the steps whose kernels have passed since last asked.

        Devices work at the same time: the busiest counts.
        """
        found = 0.0
        while self._steps and all(pairs[-1][1].query() for pairs in self._steps[0][0].values()):
            by_device, host = self._steps.popleft()
            busiest = max(sum(begin.elapsed_time(end) for begin, end in pairs) for pairs in by_device.values())
            found += max(1e-3 * busiest - host, 0.0)
        return found

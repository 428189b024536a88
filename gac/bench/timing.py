"""Timing of several variants in one interleaved loop, with cold caches.

Every round calls each variant once (short ones several times), in an order that is drawn anew, so that drifts of the
machine hit all of them alike. The speed-up over a peer is the median over rounds of the ratio within a round.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from time import perf_counter

import torch

Call = Callable[[int], object]
"""Runs a variant on the input set of that number."""

_SHORTEST = 100e-6
"""Seconds that one sample lasts at least, by repetition, where the clock is the host's."""


_LONG = 0.05
"""Seconds from which on one call is warm-up enough."""

_ENOUGH = 30
"""Rounds after which a median is good to a few percent on a machine whose memory others share."""


def quantile(values: list[float], q: float) -> float:
    """The ``q`` quantile, interpolated."""
    ordered = sorted(values)
    position = q * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (position - low) * (ordered[high] - ordered[low])


@dataclass
class Samples:
    """Seconds per call of one variant, one number a round.

    Attributes:
        time: on the device (CPU: the call itself).
        host: until the call returned, on devices that run on their own.
        wall: until the device had finished, starting from an idle device, likewise.
    """

    time: list[float] = field(default_factory=list)
    host: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)

    @classmethod
    def joined(cls, measurements: Iterable[Samples]) -> Samples:
        """The rounds of several measurements."""
        result = cls()
        for found in measurements:
            for name in ("time", "host", "wall"):
                getattr(result, name).extend(getattr(found, name))
        return result

    def summary(self) -> dict[str, float | int]:
        """``p20``, ``p50``, ``p80`` in seconds and ``rounds``; medians of ``host`` and ``wall`` where taken."""
        result: dict[str, float | int] = {f"p{q}": quantile(self.time, q / 100) for q in (20, 50, 80)}
        result["rounds"] = len(self.time)
        for name in ("host", "wall"):
            if getattr(self, name):
                result[name] = quantile(getattr(self, name), 0.5)
        return result


def ratio(slower: list[float], faster: list[float]) -> float:
    """Median over the rounds that both took part in of ``slower / faster``."""
    return quantile([s / f for s, f in zip(slower, faster, strict=False)], 0.5)


def ratio_interval(slower: list[float], faster: list[float], error: float = 1e-3) -> tuple[float, float]:
    """Bounds of the median of the rounds' ratios that miss it with probability `error` at most, whatever their spread.

    Order statistics: the median lies below the k-th smallest of n ratios with the probability that a fair coin falls
    heads fewer than k times in n. With too few rounds for `error` they are the smallest and the largest. A table has
    some 300 ratios, which is why `error` is small.
    """
    ratios = sorted(s / f for s, f in zip(slower, faster, strict=False))
    n, k, below = len(ratios), 0, 0.5 ** len(ratios)
    while 2 * below <= error and k < (n - 1) // 2:
        k += 1
        below += math.comb(n, k) * 0.5**n
    k = max(0, k - 1)
    return ratios[k], ratios[n - 1 - k]


def cache_bytes(device: torch.device) -> int:
    """Size of the last-level cache (GPU: the L2); 64 MiB where the system does not tell."""
    if device.type == "cuda":
        return getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) or 64 << 20
    units = {"K": 1 << 10, "M": 1 << 20}
    largest = 0
    for index in range(5):
        try:
            with open(f"/sys/devices/system/cpu/cpu0/cache/index{index}/size", encoding="ascii") as file:
                text = file.read().strip()
        except OSError:
            continue
        if text[-1:] in units and text[:-1].isdigit():
            largest = max(largest, int(text[:-1]) * units[text[-1]])
    return largest or 64 << 20


class CpuTimer:
    """Times calls on the CPU. Each call takes the next input set; the sets together exceed the cache."""

    def __init__(self) -> None:
        self._next = 0

    def measure(
        self, variants: Mapping[str, Call], sets: int, *, seconds: float, rounds: tuple[int, int] = (5, 60)
    ) -> dict[str, Samples]:
        """``seconds`` is what to spend, about; ``rounds`` the fewest and most.

        Where a slow peer would leave few rounds, calls below 50 ms go on without it up to :data:`_ENOUGH` rounds: their
        ratios are what the figures rest on.
        """
        estimates = {}
        for name, call in variants.items():
            estimates[name] = self._time(call, 1, sets)
            if estimates[name] < _LONG:
                estimates[name] = min(self._time(call, 1, sets), self._time(call, 1, sets))
        repeats = {name: max(1, min(256, round(_SHORTEST / t))) for name, t in estimates.items()}
        one_round = sum(repeats[name] * t for name, t in estimates.items())
        count = max(rounds[0], min(rounds[1], int(seconds / one_round)))
        shares = {
            name: max(count, _ENOUGH) if t < _LONG else 1 if t > seconds else count for name, t in estimates.items()
        }
        samples = {name: Samples() for name in variants}
        order, draw = list(variants), random.Random(0)
        for k in range(max(shares.values())):
            draw.shuffle(order)
            for name in order:
                if k >= shares[name]:
                    continue
                samples[name].time.append(self._time(variants[name], repeats[name], sets))
        return samples

    def _time(self, call: Call, repeat: int, sets: int) -> float:
        indices = [(self._next + k) % sets for k in range(repeat)]
        self._next = (self._next + repeat) % sets
        start = perf_counter()
        for index in indices:
            call(index)
        return (perf_counter() - start) / repeat


class CudaTimer:
    """Times calls on a GPU by events, with the L2 emptied before each call by reading a larger buffer.

    While a call is queued the device is kept busy, so that its time is not that of the host; the host's time is taken
    beside it. A second call, on an idle device, is timed from start to finish.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._flush = torch.zeros(max(4 * cache_bytes(device), 256 << 20) // 4, dtype=torch.int32, device=device)
        self._hertz = 2.1e9  # a bound on the clock: the pause is never too short

    def measure(
        self, variants: Mapping[str, Call], sets: int, *, seconds: float, rounds: tuple[int, int] = (10, 50)
    ) -> dict[str, Samples]:
        """``seconds`` is what to spend; ``rounds`` the fewest and most. All calls take input set 0."""
        pauses, one_round = {}, 0.0
        for name, call in variants.items():
            for _ in range(2):  # compiles, then warms up
                call(0)
            torch.cuda.synchronize(self.device)
            start = perf_counter()
            call(0)
            host = perf_counter() - start
            torch.cuda.synchronize(self.device)
            one_round += 2 * (perf_counter() - start) + host + 1e-3
            pauses[name] = int(self._hertz * (2 * host + 100e-6))
        count = max(rounds[0], min(rounds[1], int(seconds / one_round)))
        samples = {name: Samples() for name in variants}
        order, draw = list(variants), random.Random(0)
        for _ in range(count):
            draw.shuffle(order)
            for name in order:
                self._time(variants[name], pauses[name], samples[name])
        return samples

    def _time(self, call: Call, pause: int, samples: Samples) -> None:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.sum()
        torch.cuda._sleep(pause)
        begin.record()
        start = perf_counter()
        call(0)
        samples.host.append(perf_counter() - start)
        end.record()
        end.synchronize()
        samples.time.append(begin.elapsed_time(end) * 1e-3)
        self._flush.sum()
        torch.cuda.synchronize(self.device)
        start = perf_counter()
        call(0)
        torch.cuda.synchronize(self.device)
        samples.wall.append(perf_counter() - start)


def timer_for(device: torch.device) -> CpuTimer | CudaTimer:
    """The timer of a device."""
    return CudaTimer(device) if device.type == "cuda" else CpuTimer()

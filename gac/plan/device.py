"""Devices and the links between them: published peaks, and the share of them that is counted on."""

from __future__ import annotations

import math
from dataclasses import dataclass

LATENCY = 5e-6
"""Seconds of one hop of a collective."""

NODE = 8
"""Ranks that share the fast links of one machine."""


@dataclass(frozen=True)
class Device:
    """Published peaks of one rank's device, and the share of them that is counted on.

    Attributes:
        bandwidth: of the memory, bytes a second. flops: dense, in the gradients' 16-bit type, operations a second.
        link, network: bytes a second, one direction, to ranks of the same machine and of others.
        memory: bytes; None: unknown.
        gap: device seconds between dependent kernels.
        synchronous: whether the host does the work itself, so that its time adds to the device's.
    """

    name: str
    bandwidth: float
    flops: float
    link: float
    network: float
    memory: float | None = None
    read_efficiency: float = 0.9
    compute_efficiency: float = 0.4
    link_efficiency: float = 0.7
    gap: float = 3e-6
    synchronous: bool = False

    @property
    def read(self) -> float:
        """Bytes a second that kernels read."""
        return self.bandwidth * self.read_efficiency

    @property
    def compute(self) -> float:
        """Operations a second of a training step."""
        return self.flops * self.compute_efficiency

    def all_reduce_seconds(self, size: int, ranks: int) -> float:
        """Seconds of one all-reduce of ``size`` bytes: a ring's transfers and a tree's hops."""
        if ranks < 2:
            return 0.0
        link = self.link if ranks <= NODE else self.network
        moved = 2 * (ranks - 1) / ranks * size
        return moved / (link * self.link_efficiency) + 2 * math.ceil(math.log2(ranks)) * LATENCY


DEVICES = {
    device.name: device
    for device in (
        Device("h100", 3.35e12, 989e12, 450e9, 50e9, 80e9),
        Device("h200", 4.8e12, 989e12, 450e9, 50e9, 141e9),
        Device("a100", 2.039e12, 312e12, 300e9, 25e9, 80e9),
        Device("b200", 8.0e12, 2250e12, 900e9, 50e9, 180e9),
        Device(
            "cpu", 2.7e10, 8.4e10, 1.25e9, 1.25e9, read_efficiency=1.0, compute_efficiency=1.0, gap=0.0,
            synchronous=True,
        ),
    )
}  # fmt: skip
"""SXM boards, and two cores of the CPU of benchmarks/results/cpu.json as measured; sources in docs/scaling.md."""

"""The read limit: how fast this machine reads the very bytes that an operation reads, measured in the same loop.

On the CPU it is ``torch.sum`` over the buffers; on a GPU the faster of ``torch.sum`` and a plain Triton kernel that
reads and adds, with the datasheet's bandwidth beside it. 16-bit buffers are summed both as they are and as the float32
numbers that the same bytes spell, which converts nothing.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

METHOD = {
    "cpu": "the faster of torch.sum over the same buffers and torch.sum over the same bytes as float32",
    "cuda": "the faster of torch.sum over the same buffers and a plain Triton kernel that reads and adds them",
}

_DATASHEET = {
    "H200": 4.8e12,
    "H100 80GB HBM3": 3.35e12,
    "H100 PCIe": 2.0e12,
    "A100-SXM4-80GB": 2.04e12,
    "A100-SXM4-40GB": 1.56e12,
    "B200": 8.0e12,
}


def nominal_bandwidth(device: torch.device) -> float | None:
    """Bytes a second by the datasheet; None where it is not known."""
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    for name, value in _DATASHEET.items():
        if name in properties.name:
            return value
    clock, width = getattr(properties, "memory_clock_rate", 0), getattr(properties, "memory_bus_width", 0)
    return 2.0 * clock * 1e3 * width / 8 or None


def readers(buffers: list[list[Tensor]]) -> dict[str, Callable[[int], object]]:
    """Ways to read the flat tensors ``buffers[k]`` of input set ``k``, by name."""
    found: dict[str, Callable[[int], object]] = {"torch.sum": lambda k: [torch.sum(flat) for flat in buffers[k]]}
    first = buffers[0][0]
    if first.is_cuda:
        from gac.bench.read_kernel import read

        found["plain kernel"] = lambda k: [read(flat) for flat in buffers[k]]
    elif first.element_size() == 2 and all(f.numel() % 2 == 0 for flats in buffers for f in flats):
        wide = [[flat.view(torch.float32) for flat in flats] for flats in buffers]
        found["torch.sum as float32"] = lambda k: [torch.sum(flat) for flat in wide[k]]
    return found

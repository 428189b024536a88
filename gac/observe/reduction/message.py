"""One vector of numbers by name, on its way through the ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor


class Message:
    """Packs named tensors into one fp32 vector, adds it up over ranks and takes it apart again.

    On one rank there is no vector: what was put in comes out as it was.

    Args:
        pieces: by name, on any devices; every rank has the same names and shapes.
        device: where the vector lies.
        groups: process groups to add up over, one after the other (the dimensions of a device mesh); none on one rank.
    """

    def __init__(
        self, pieces: Mapping[str, Tensor], device: torch.device, groups: Sequence[dist.ProcessGroup | None]
    ) -> None:
        self._pieces = dict(pieces)
        self._works: list[dist.Work] = []
        self._vector: Tensor | None = None
        if not groups:
            return
        flat = [piece.reshape(-1).to(device, torch.float32, non_blocking=True) for piece in pieces.values()]
        self._vector = torch.cat(flat)
        for group in groups:
            for work in self._works:  # the next dimension of the mesh adds up what this one gave
                work.wait()
            self._works = [dist.all_reduce(self._vector, group=group, async_op=True)]

    def unpack(self) -> dict[str, Tensor]:
        """The sums by name, flat where they travelled; the device (on a CPU: the host) waits for the collective."""
        for work in self._works:
            work.wait()
        if self._vector is None:
            return dict(self._pieces)
        parts = self._vector.split([piece.numel() for piece in self._pieces.values()])
        return dict(zip(self._pieces, parts, strict=True))

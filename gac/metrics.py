"""Numbers of a finished step, brought to the host without making it wait."""

from __future__ import annotations

import torch
from torch import Tensor


class HostMirror:
    """Keeps the newest vector of numbers whose copy to the host has finished.

    On a CUDA device each vector goes into one of two pinned buffers, with an event behind the copy; reading never
    waits unless asked to. Elsewhere the vector is read when it is asked for.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._slots: list[tuple[int, Tensor, object] | None] = [None, None]
        self._published = 0

    def publish(self, tag: int, vector: Tensor) -> None:
        """Starts the copy of ``vector`` (1-D), labelled ``tag``."""
        slot = self._published % 2
        self._published += 1
        if not self._cuda:
            self._slots[slot] = (tag, vector, None)
            return
        with torch.cuda.device(vector.device):
            old = self._slots[slot]
            host = old[1] if old else torch.empty_like(vector, device="cpu", pin_memory=True)
            event = old[2] if old else torch.cuda.Event()
            host.copy_(vector, non_blocking=True)
            event.record()
        self._slots[slot] = (tag, host, event)

    def latest(self, *, wait: bool = False) -> tuple[int, list[float]] | None:
        """Tag and numbers of the newest finished copy; None before the first. ``wait`` waits for the newest."""
        slots = sorted((s for s in self._slots if s is not None), key=lambda s: s[0], reverse=True)
        for tag, host, event in slots:
            if event is not None:
                if wait:
                    event.synchronize()
                elif not event.query():
                    continue
            return tag, host.tolist()
        return None

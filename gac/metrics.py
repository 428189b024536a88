"""Names and numbers of a finished step, brought to the host without making it wait."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gac.accumulation import Accumulation
from gac.silence import ZERO, Silence
from gac.statistics.branch import Branch
from gac.statistics.step import NAN, Statistics

OF_LAW = {"mu_raw": "raw", "mu_se": "mu_se", "prior": "prior"}
"""Numbers that a law may have in its state: their names in the metrics and there."""

NAMES = ("mu", *OF_LAW, "skipped", *Statistics.names(), "cosine")
"""What travels to the host, in this order; :meth:`gac.Mixer.metrics` says what each is."""


_LETTERS = {"s": Branch.SFT, "r": Branch.RL}


class _Look:
    """What is looked at of a branch in every step, by its place in the row."""

    __slots__ = ("accumulation", "branch", "n", "norm2", "sigma2")

    def __init__(self, letter: str, branch: Branch) -> None:
        self.branch, self.accumulation = branch, Accumulation(branch.value.upper())
        self.n, self.sigma2, self.norm2 = (NAMES.index(x.format(letter)) for x in ("n_{}", "sigma_{}2", "norm_{}2"))


class StepMetrics:
    """The numbers of each step by name: those of the device as soon as they have arrived, beside those of the host.

    Args:
        device: where the numbers are made.
        shows: entries of the law's state that are shown besides.
    """

    def __init__(self, device: torch.device, shows: Sequence[str] = ()) -> None:
        self._shows, self._names = shows, (*NAMES, *shows)
        self._mirror = HostMirror(device)
        self._zero = Silence(ZERO)
        self._looks = [_Look(x, branch) for x, branch in _LETTERS.items()]
        self._looked_at: float | str = -1
        self._not_measured = _row(Statistics(n_s=torch.zeros((), device=device)))
        self._unknown: Tensor | None = None
        self._measured: tuple[dict[str, float | str], Sequence[float]] | None = None  # the newest such step

    def publish(
        self,
        step: int,
        *,
        mu: Tensor,
        law: Mapping[str, Tensor],
        skipped: Tensor,
        statistics: Statistics | None,
        seconds: float,
        estimator: str,
        overhead: float,
    ) -> None:
        """Sends a step's numbers on their way.

        Args:
            step: its number, from 0.
            mu: of the step to come. law: the law's state. skipped: steps dropped so far.
            statistics: None where the step was not measured.
            seconds: host time spent in GAC. estimator: what the step was measured with. overhead: the share of GAC in
                the time of late.
        """
        self._look_back()
        dtype = law["mu"].dtype
        if self._unknown is None:
            self._unknown = torch.full_like(law["mu"], NAN)
        numbers = [mu.to(dtype), *(law.get(name, self._unknown) for name in OF_LAW.values()), skipped.to(dtype)]
        measured = self._not_measured if statistics is None else _row(statistics)
        parts = [torch.stack(numbers), measured]
        if self._shows:
            parts.append(torch.stack([law[name] for name in self._shows]))
        self._keep(step, torch.cat(parts), seconds, estimator, overhead)

    def publish_numbers(
        self, step: int, numbers: Sequence[float] | Tensor, *, seconds: float, estimator: str, overhead: float
    ) -> None:
        """:meth:`publish` for numbers that are together: those of :data:`NAMES`, in that order."""
        self._look_back()
        self._keep(step, numbers, seconds, estimator, overhead)

    def _keep(
        self, step: int, numbers: Tensor | Sequence[float], seconds: float, estimator: str, overhead: float
    ) -> None:
        of_host = {"seconds": seconds, "estimator": estimator, "overhead": overhead, "step": step}
        self._mirror.publish(of_host, numbers)

    def _look_back(self) -> None:
        latest = self._mirror.latest()
        if latest is not None:
            self._look(*latest)

    def latest(self, *, wait: bool, measured: bool = False) -> dict[str, float | str]:
        """Everything of the newest step that has arrived, or of the newest `measured` one; empty before the first."""
        latest = self._mirror.latest(wait=wait)
        if latest is None:
            return {}
        self._look(*latest)
        if not measured:
            return self._named(*latest)
        return {} if self._measured is None else self._named(*self._measured)

    def _named(self, of_host: dict[str, float | str], values: Sequence[float]) -> dict[str, float | str]:
        numbers: dict[str, Any] = dict(zip(self._names, values, strict=True))
        silent = {f"silent_{x}": float(numbers[f"n_{x}"] > 0 and numbers[f"norm_{x}2"] == 0) for x in _LETTERS}
        return numbers | silent | of_host

    def _look(self, of_host: dict[str, float | str], values: Sequence[float]) -> None:
        """Looks at a step, once: whether it was measured, a branch is silent, or divided too often."""
        if of_host["step"] == self._looked_at:
            return
        self._looked_at = of_host["step"]
        for look in self._looks:
            n, norm2 = values[look.n], values[look.norm2]
            if n > 0:
                self._measured = of_host, values
                self._zero.take(look.branch, silent=norm2 == 0)
                look.accumulation.take(n, values[look.sigma2], norm2)


def _row(statistics: Statistics) -> Tensor:
    """What the metrics say of a step's statistics, and the cosine."""
    return torch.cat([statistics.stacked(), statistics.cosine[None]])


class HostMirror:
    """Keeps the newest vector of numbers whose copy to the host has finished.

    On a CUDA device each vector goes into one of two pinned buffers, with an event behind the copy; reading never
    waits unless asked to. Elsewhere the vector is read when it is asked for.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._slots: list[tuple[Any, Any, torch.cuda.Event | None] | None] = [None, None]
        self._published = 0

    def publish(self, tag: Any, vector: Tensor | Sequence[float]) -> None:
        """Starts the copy of ``vector`` (1-D), labelled ``tag``; numbers of the host are there already."""
        slot = self._published % 2
        self._published += 1
        if not isinstance(vector, Tensor) or not self._cuda:
            self._slots[slot] = (tag, vector, None)
            return
        with torch.cuda.device(vector.device):
            old = self._slots[slot]
            host = old[1] if old else torch.empty_like(vector, device="cpu", pin_memory=True)
            event = (old[2] if old else None) or torch.cuda.Event()
            host.copy_(vector, non_blocking=True)
            event.record()
        self._slots[slot] = (tag, host, event)

    def one_behind(self) -> tuple[Any, list[float]] | None:
        """Tag and numbers of the copy before the newest, which is waited for; None before the second."""
        slot = self._slots[self._published % 2]
        if slot is None:
            return None
        tag, host, event = slot
        if event is not None:
            event.synchronize()
        return tag, host.tolist() if isinstance(host, Tensor) else list(host)

    def latest(self, *, wait: bool = False) -> tuple[Any, list[float]] | None:
        """Tag and numbers of the newest finished copy; None before the first. ``wait`` waits for the newest."""
        for back in (1, 2):
            slot = self._slots[(self._published - back) % 2]
            if slot is None:
                continue
            tag, host, event = slot
            if event is not None:
                if wait:
                    event.synchronize()
                elif not event.query():
                    continue
            return tag, host.tolist() if isinstance(host, Tensor) else list(host)
        return None

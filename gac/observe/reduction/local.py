"""One process: the sums are at hand, and nothing travels."""

from __future__ import annotations

import functools
from array import array
from typing import Any

import torch
from torch import Tensor

from gac.observe.observer import Observer
from gac.observe.reduction.replica import ReplicaReduction
from gac.observe.reduction.weights import scalar
from gac.statistics.branch import Branch
from gac.statistics.sums import StepSums, SumsOnHost


class LocalReduction(ReplicaReduction):
    """Sums of a lone process. They are taken when they are asked for: the ledgers must not be cleared before."""

    def __init__(self, observer: Observer, device: torch.device, *arguments: Any, **more: Any) -> None:
        self._begin = lambda: super(LocalReduction, self).__init__(observer, device, *arguments, **more)
        self._observer, self._time_noise = observer, more["time_noise"]
        self._device = device
        self.costs = more.get("costs")
        self._crossing, self._device = more.get("crossing"), device

    def finish(self) -> StepSums:
        self._begin()
        return super().finish()

    def finish_on_host(self) -> SumsOnHost:
        ledgers, seen = self._observer.ledgers, self._observer.seen
        of_ledgers = [ledger.powers_on_host() for ledger in ledgers]
        powers = [sum(parts) for parts in zip(*of_ledgers, strict=True)]
        power, tokens, n = {}, {}, {}
        for branch in Branch:
            own = [k for k, c in enumerate(seen.contributions) if c.branch is branch]
            told = [seen.contributions[k].tokens for k in own]
            counts = [1.0 if t is None else float(t) for t in told]
            power[branch] = sum(powers[k] * (1.0 / t) for k, t in zip(own, counts, strict=True) if t > 0)
            tokens[branch] = sum(counts)
            n[branch] = float(sum(t > 0 for t in counts))
        norms = [sum(parts) for parts in zip(*(x.inner(x.both_totals).tolist() for x in ledgers), strict=True)]
        s, r = Branch.SFT, Branch.RL
        worth = None
        if self._crossing is not None:
            self.totals = [x.both_totals for x in ledgers]
            worth = tuple(self._crossing.products(self.totals, self._device).tolist())
        return SumsOnHost(
            power=(power[s], power[r]),
            tokens=(tokens[s], tokens[r]),
            n=(n[s], n[r]),
            nonfinite=sum(float(ledger.nonfinite()) for ledger in ledgers) + float(seen.broken),
            silent=0.0,
            norms=(norms[0], norms[1], norms[2]),
            time_noise=tuple(self._time_noise.tolist()),
            worth=worth,
        )

    def finish_in_numbers(self, *, lone: bool) -> array[float]:
        ledgers, seen = self._observer.ledgers, self._observer.seen
        found = None
        if len(ledgers) == 1 and self._crossing is None and not self._observer.by_module:
            found = ledgers[0].sums_on_host(seen.contributions)
        if found is None:
            return super().finish_in_numbers(lone=lone)
        found[6] += seen.broken
        if lone:
            found[11:] = array("d", self._time_noise.tolist())
        return found

    def finish_on_device(self) -> Tensor:
        ledgers, seen = self._observer.ledgers, self._observer.seen
        branches = [int(c.branch is Branch.RL) for c in seen.contributions]
        if self._observer.by_module or not all(ledger.gathers(branches) for ledger in ledgers):
            return self.finish().stacked()
        parts = []
        for k, ledger in enumerate(ledgers):
            first = k == 0  # what is no sum over parameters counts once
            noise = self._time_noise if first else None
            tokens = self._tokens(ledger.device)
            parts.append(ledger.gather(branches, tokens, noise, float(seen.broken and first), counts=first))
        return functools.reduce(torch.add, (part.to(self._device, non_blocking=True) for part in parts))

    def _tokens(self, device: torch.device) -> Tensor | None:
        """``[K]``: what each contribution counts for; None where all count 1."""
        told = [c.tokens for c in self._observer.seen.contributions]
        if all(t is None for t in told):
            return None
        if not any(isinstance(t, Tensor) for t in told):
            from gac_kernels.triton.ending import upload  # it imports Triton

            return upload([1.0 if t is None else float(t) for t in told], device)
        return torch.stack([scalar(t, device, torch.float64) for t in told])

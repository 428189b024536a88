"""Shards (FSDP2, tensor parallelism): all ranks hold pieces of the same contributions."""

from __future__ import annotations

import torch
from torch import Tensor

from gac.observe.reduction.base import Reduction
from gac.observe.reduction.weights import Weights, scalar
from gac.statistics.branch import Branch
from gac.statistics.sums import StepSums


class ShardReduction(Reduction):
    """Sums of shards: squares of pieces add up, so numbers are all that travels.

    What a contribution counts for is known once all ranks' tokens are added up, so the message has a number of each.
    """

    def _pack(self) -> dict[str, Tensor]:
        counted = [scalar(c.tokens, self._device, self._dtype) for c in self._contributions]
        nothing = torch.zeros(0, dtype=self._dtype, device=self._device)
        message = {
            "tokens": torch.stack(counted) if counted else nothing,
            "powers": self._over_ledgers(ledger.powers() / ledger.copies for ledger in self._ledgers),
            "norms": self._over_ledgers(ledger.inner(ledger.both_totals) / ledger.copies for ledger in self._ledgers),
        }
        self.totals = [ledger.both_totals for ledger in self._ledgers]
        if self._crossing is not None:
            copies = [ledger.copies for ledger in self._ledgers]
            message["worth"] = self._crossing.products(self.totals, self._device, copies)
        if self._by_module:
            parts = nothing.view(0, 1).expand(0, self._modules)
            if counted:
                parts = self._over_ledgers(ledger.module_powers() / ledger.copies for ledger in self._ledgers)
            inner = [ledger.module_inner(ledger.both_totals) / ledger.copies for ledger in self._ledgers]
            message |= {"module_powers": parts, "module_norms": self._over_ledgers(inner)}
        return message

    def _unpack(self, found: dict[str, Tensor]) -> StepSums:
        found = {name: piece.to(self._dtype) for name, piece in found.items()}
        tokens, powers = found["tokens"], found["powers"]
        rows, module_rows = [], []
        parts = found["module_powers"].view(-1, self._modules) if self._by_module else None
        for branch in Branch:
            own = [k for k, c in enumerate(self._contributions) if c.branch is branch]
            told = bool(own) and self._contributions[own[0]].tokens is not None
            counts = torch.stack([tokens[k] for k in own]) if told else None
            weights = Weights(counts, len(own), self._device, self._dtype)
            power = weights.divide(torch.stack([powers[k] for k in own])).sum() if own else self._full(0.0)
            rows.append(torch.stack([power, weights.total, weights.n]))
            if parts is not None:
                part = weights.divide(torch.stack([parts[k] for k in own])).sum(0) if own else self._no_modules()
                module_rows.append(part)
        table = torch.stack(rows)
        return StepSums(
            power=table[:, 0],
            tokens=table[:, 1],
            n=table[:, 2],
            nonfinite=self._number(found["nonfinite"]),
            silent=self._number(found["silent"]),
            norms=found["norms"],
            time_noise=found["time_noise"],
            module_power=torch.stack(module_rows, dim=1) if parts is not None else None,
            module_norms=found["module_norms"].view(-1, 3) if parts is not None else None,
            worth=found.get("worth"),
        )

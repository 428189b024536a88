"""Replicas (one process, DDP): every rank makes contributions of its own."""

from __future__ import annotations

import torch
from torch import Tensor

from gac.observe.reduction.base import Reduction
from gac.observe.reduction.weights import Weights
from gac.statistics.branch import Branch
from gac.statistics.sums import StepSums


class ReplicaReduction(Reduction):
    """Sums of replicas: the sketches of both branches travel with the numbers.

    A contribution counts as ``x / W``, because data parallelism averages gradients over the ``W`` ranks.
    """

    def _pack(self) -> dict[str, Tensor]:
        scale = 1.0 / self._topology.ranks
        powers = self._over_ledgers(ledger.powers() for ledger in self._ledgers)
        parts = None
        if self._by_module and self._contributions:
            parts = self._over_ledgers(ledger.module_powers() for ledger in self._ledgers)
        numbers, module_numbers = [], []
        for branch in Branch:
            own = [k for k, c in enumerate(self._contributions) if c.branch is branch]
            weights = Weights.told([self._contributions[k].tokens for k in own], self._device, self._dtype)
            power = weights.divide(torch.stack([powers[k] for k in own])).sum() if own else self._full(0.0)
            numbers.append(torch.stack([scale**2 * power, weights.total, weights.n]))
            if self._by_module:
                part = self._no_modules()
                if parts is not None and own:
                    part = weights.divide(torch.stack([parts[k] for k in own])).sum(0)
                module_numbers.append(scale**2 * part)
        message = {"numbers": torch.cat(numbers)}
        if self._by_module:
            message["module_power"] = torch.cat(module_numbers)
        for index, ledger in enumerate(self._ledgers):
            message[f"totals.{index}"] = ledger.both_totals * scale if scale < 1 else ledger.both_totals
        return message

    def _unpack(self, found: dict[str, Tensor]) -> StepSums:
        table = found["numbers"].to(self._dtype).view(2, 3)
        pairs = [
            (ledger, found[f"totals.{index}"].to(ledger.device, non_blocking=True))
            for index, ledger in enumerate(self._ledgers)
        ]
        self.totals = [total for _, total in pairs]
        worth = None if self._crossing is None else self._crossing.products(self.totals, self._device)
        module_power = module_norms = None
        if self._by_module:
            module_power = found["module_power"].to(self._dtype).view(2, -1).T
            module_norms = self._over_ledgers(ledger.module_inner(total) for ledger, total in pairs)
        return StepSums(
            power=table[:, 0],
            tokens=table[:, 1],
            n=table[:, 2],
            nonfinite=self._number(found["nonfinite"]),
            silent=self._number(found["silent"]),
            norms=self._over_ledgers(ledger.inner(total) for ledger, total in pairs),
            time_noise=found["time_noise"].to(self._dtype),
            module_power=module_power,
            module_norms=module_norms,
            worth=worth,
        )

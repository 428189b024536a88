"""The sums that statistics are computed from, once they are over all contributions, devices and ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class SumsOnHost(NamedTuple):
    """:class:`StepSums` as Python numbers, without those by module."""

    power: tuple[float, float]
    tokens: tuple[float, float]
    n: tuple[float, float]
    nonfinite: float
    silent: float
    norms: tuple[float, float, float]
    time_noise: tuple[float, float]
    worth: tuple[float, ...] | None = None


@dataclass(frozen=True)
class StepSums:
    """What the contributions of a step add up to, over all ranks. Pairs are SFT, RL; all on one device.

    Attributes:
        power: ``[2]``, ``sum_k |x_k|^2 / t_k`` with the tokens ``t_k`` that a contribution counts for (1 if untold).
        tokens: ``[2]``, ``sum_k t_k``.
        n: ``[2]``, contributions that count (those with ``t_k > 0``).
        nonfinite: 0-dim, non-finite elements; a failed backward pass counts as one.
        silent: 0-dim, ranks on which no hook has ever run.
        norms: ``[3]``, ``|G_s|^2``, ``|G_r|^2``, ``<G_s, G_r>``.
        time_noise: ``[2]``, noise found by comparing a lone contribution with earlier steps.
        module_power: ``[M, 2]``, the part of each module in ``power``; None unless the step is taken apart.
        module_norms: ``[M, 3]``, likewise.
        worth: ``[4]``, products with earlier gradients (:class:`gac.statistics.worth.Worth`); None unless asked for.
    """

    power: Tensor
    tokens: Tensor
    n: Tensor
    nonfinite: Tensor
    silent: Tensor
    norms: Tensor
    time_noise: Tensor
    module_power: Tensor | None = None
    module_norms: Tensor | None = None
    worth: Tensor | None = None

    def stacked(self) -> Tensor:
        """``[13]``: all but those by module, in this order."""
        pieces = (self.power, self.tokens, self.n, self.nonfinite, self.silent, self.norms, self.time_noise)
        return torch.cat([x.reshape(-1) for x in pieces])

    def on_host(self) -> SumsOnHost:
        """The same as numbers; the host waits for the device."""
        ps, pr, ts, tr, ns, nr, nonfinite, silent, a, b, d, vs, vr = self.stacked().tolist()
        worth = None if self.worth is None else tuple(self.worth.tolist())
        return SumsOnHost((ps, pr), (ts, tr), (ns, nr), nonfinite, silent, (a, b, d), (vs, vr), worth)

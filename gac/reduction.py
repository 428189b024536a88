"""The sums of one optimizer step, over devices and over the ranks that train replicas of a model."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from gac.ledger import Branch, Ledger
from gac.observer import Observer


@dataclass
class StepSums:
    """What the contributions of a step add up to. Pairs are SFT, RL; all on one device.

    Attributes:
        power: ``[2]``, ``sum_k |x_k|^2 / t_k`` with the tokens ``t_k`` that a contribution counts for (1 if untold).
        tokens: ``[2]``, ``sum_k t_k``.
        n: ``[2]``, contributions that count (those with ``t_k > 0``).
        nonfinite: 0-dim, non-finite elements.
        norms: ``[3]``, ``|G_s|^2``, ``|G_r|^2``, ``<G_s, G_r>``.
        module_power: ``[M, 2]``, the part of each module in ``power``; None unless the step is taken apart.
        module_norms: ``[M, 3]``, likewise.
    """

    power: Tensor
    tokens: Tensor
    n: Tensor
    nonfinite: Tensor
    norms: Tensor
    module_power: Tensor | None = None
    module_norms: Tensor | None = None

    def scaled(self, factor: Tensor) -> StepSums:
        """The same sums of contributions whose squares are ``factor`` times as large."""
        squares = ("power", "norms", "module_power", "module_norms")
        found = {name: getattr(self, name) for name in squares}
        return replace(self, **{name: factor * value for name, value in found.items() if value is not None})


def step_sums(observer: Observer, device: torch.device, *, ranks: int, group: dist.ProcessGroup | None) -> StepSums:
    """Adds up what the observer's ledgers hold, on ``device``.

    Data parallelism averages gradients over the ``W`` ranks, so a local contribution counts as ``x / W`` there. With
    several ranks every one of them must call this in the same step; the ledgers then hold the totals of all.
    """
    ledgers = observer.ledgers
    dtype = ledgers[0].powers().dtype
    powers = _sum(ledger.powers().to(device, non_blocking=True) for ledger in ledgers)
    nonfinite = _sum(ledger.nonfinite().to(device, non_blocking=True) for ledger in ledgers) + float(observer.broken)
    by_module = ledgers[0].by_module
    parts = None
    if by_module and observer.contributions:
        parts = _sum(ledger.module_powers().to(device, non_blocking=True) for ledger in ledgers)
    numbers, module_numbers = [], []
    for branch in Branch:
        own = [k for k, c in enumerate(observer.contributions) if c.branch is branch]
        weights = _Weights([observer.contributions[k].tokens for k in own], device, dtype)
        numbers.append(torch.stack([weights.apply([powers[k] for k in own]), weights.tokens, weights.n]))
        if by_module:
            rows = torch.zeros(len(observer.module_labels), dtype=dtype, device=device)
            module_numbers.append(weights.apply([parts[k] for k in own]) if own else rows)
    packed = torch.cat([nonfinite[None], *numbers, *module_numbers])
    if ranks > 1:
        packed = _all_reduce(packed, ledgers, ranks, group)

    table = packed[1:7].view(2, 3)
    sums = StepSums(
        power=table[:, 0],
        tokens=table[:, 1],
        n=table[:, 2],
        nonfinite=packed[0],
        norms=_sum(ledger.inner().to(device, non_blocking=True) for ledger in ledgers),
    )
    if by_module:
        sums.module_power = packed[7:].view(2, -1).T
        sums.module_norms = _sum(ledger.module_inner().to(device, non_blocking=True) for ledger in ledgers)
    return sums


def gather_rows(rows: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """``[sum of B, C]`` from every rank's ``[B, C]``, in the order of ranks; ``B`` may differ and be 0.

    The host waits for the largest ``B``: a collective needs it as a number.
    """
    world = dist.get_world_size(group)
    sizes = torch.zeros(world, dtype=torch.int64, device=rows.device)
    sizes[dist.get_rank(group)] = len(rows)
    dist.all_reduce(sizes, group=group)
    sizes = sizes.tolist()
    padded = rows.new_zeros(max(sizes), rows.shape[1])
    padded[: len(rows)] = rows
    gathered = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(gathered, padded, group=group)
    return torch.cat([part[:size] for part, size in zip(gathered, sizes, strict=True)])


class _Weights:
    """The tokens that a branch's contributions count for; ``apply`` divides by them and adds up."""

    def __init__(self, tokens: list[Tensor | float | None], device: torch.device, dtype: torch.dtype) -> None:
        self._tokens = None
        count = torch.full((), float(len(tokens)), dtype=dtype, device=device)
        self.tokens, self.n = count, count
        if tokens and tokens[0] is not None:
            self._tokens = torch.stack([_scalar(t, device, dtype) for t in tokens])
            self.tokens, self.n = self._tokens.sum(), (self._tokens > 0).sum().to(dtype)
        self._zero = torch.zeros((), dtype=dtype, device=device)

    def apply(self, values: list[Tensor]) -> Tensor:
        if not values:
            return self._zero
        stacked = torch.stack(values)
        if self._tokens is not None:
            inverse = torch.where(self._tokens > 0, 1.0 / self._tokens, 0.0)
            stacked = stacked * inverse.view(-1, *[1] * (stacked.dim() - 1))
        return stacked.sum(0)


def _scalar(value: Tensor | float, device: torch.device, dtype: torch.dtype) -> Tensor:
    if isinstance(value, Tensor):
        return value.detach().reshape(()).to(device=device, dtype=dtype, non_blocking=True)
    return torch.full((), float(value), dtype=dtype, device=device)


def _sum(parts: Iterable[Tensor]) -> Tensor:
    return functools.reduce(torch.add, parts)


def _all_reduce(packed: Tensor, ledgers: Sequence[Ledger], ranks: int, group: dist.ProcessGroup | None) -> Tensor:
    """Sums numbers and totals over ranks in one collective, as contributions to the mean gradient."""
    scaled = packed.clone()
    scaled[1] /= ranks**2  # the powers of SFT
    scaled[4] /= ranks**2  # ... and of RL
    scaled[7:] /= ranks**2
    pieces = [scaled, *(ledger.reduced for ledger in ledgers)]
    message = torch.cat([piece.to(device=packed.device, dtype=torch.float32) for piece in pieces])
    dist.all_reduce(message, group=group)
    received = message.split([piece.numel() for piece in pieces])
    for ledger, totals in zip(ledgers, received[1:], strict=True):
        torch.div(totals.to(ledger.device), ranks, out=ledger.reduced)
    return received[0].to(packed.dtype)

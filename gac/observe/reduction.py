"""The sums of one optimizer step, over contributions, devices and ranks; one collective on its way at most.

Two cases (:class:`~gac.observe.topology.Topology`).
Replicas: every rank makes contributions of its own, so the sketches of
both branches travel with the numbers, and a contribution counts as ``x / W`` because data parallelism averages
gradients over the ``W`` ranks. Shards: all ranks hold pieces of the same contributions, so numbers are enough. In
neither case does the message grow with the number of ranks.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from gac.observe.observer import Observer
from gac.observe.topology import Topology
from gac.statistics import Branch


@dataclass
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


class Reduction:
    """Adds up a step's sums. Made when the step ends, which posts the collective; :meth:`finish` waits for it.

    The ledgers may be cleared in between. Every rank must make one in the same step.

    Args:
        observer: its ledgers hold the step.
        device: where the sums go.
        topology: of the ranks.
        time_noise: ``[2]``, of the elements that this rank holds.
        silent: whether no hook has ever run on this rank.
    """

    def __init__(
        self, observer: Observer, device: torch.device, topology: Topology, *, time_noise: Tensor, silent: bool
    ) -> None:
        self._topology = topology
        self._device = device
        self._ledgers = observer.ledgers
        self._by_module = observer.by_module
        self._modules = len(observer.module_labels)
        self._dtype = time_noise.dtype
        nonfinite = self._over_ledgers(ledger.nonfinite() for ledger in observer.ledgers) + float(observer.broken)
        own = torch.stack([nonfinite, self._full(float(silent))])
        if topology.sharded:
            pieces = self._shard_pieces(observer, own, time_noise)
        else:
            pieces = [own, time_noise, *self._replica_pieces(observer)]
        self._sizes = [piece.numel() for piece in pieces]
        self._works = []
        if topology.ranks == 1:
            self._pieces = pieces
            return
        self._message = torch.cat([piece.reshape(-1).to(device, torch.float32, non_blocking=True) for piece in pieces])
        for group in topology.groups:
            for work in self._works:  # the next dimension of the mesh adds up what this one gave
                work.wait()
            self._works = [dist.all_reduce(self._message, group=group, async_op=True)]

    @property
    def nbytes(self) -> int:
        """Bytes that this rank puts into the collective."""
        return 4 * sum(self._sizes) if self._topology.ranks > 1 else 0

    def finish(self) -> StepSums:
        """The sums; the device (on a CPU: the host) waits for the collective."""
        for work in self._works:
            work.wait()
        if self._topology.ranks > 1:
            self._pieces = list(self._message.split(self._sizes))
        return self._shard_sums() if self._topology.sharded else self._replica_sums()

    # -- replicas -------------------------------------------------------------------------------------------------

    def _replica_pieces(self, observer: Observer) -> list[Tensor]:
        """Numbers of each branch, and the sketches where there are several ranks."""
        scale = 1.0 / self._topology.ranks
        powers = self._over_ledgers(ledger.powers() for ledger in self._ledgers)
        parts = None
        if self._by_module and observer.contributions:
            parts = self._over_ledgers(ledger.module_powers() for ledger in self._ledgers)
        numbers, module_numbers = [], []
        for branch in Branch:
            own = [k for k, c in enumerate(observer.contributions) if c.branch is branch]
            weights = _Weights.told([observer.contributions[k].tokens for k in own], self._device, self._dtype)
            power = weights.divide(torch.stack([powers[k] for k in own])).sum() if own else self._full(0.0)
            numbers.append(torch.stack([scale**2 * power, weights.total, weights.n]))
            if self._by_module:
                part = weights.divide(torch.stack([parts[k] for k in own])).sum(0) if own else self._no_modules()
                module_numbers.append(scale**2 * part)
        totals = [ledger.both_totals * scale if scale < 1 else ledger.both_totals for ledger in self._ledgers]
        return [torch.cat([*numbers, *module_numbers]), *totals]

    def _replica_sums(self) -> StepSums:
        own, time_noise, numbers, *totals = self._pieces
        numbers = numbers.to(self._dtype)
        table = numbers[:6].view(2, 3)
        totals = [t.to(ledger.device, non_blocking=True) for t, ledger in zip(totals, self._ledgers, strict=True)]
        pairs = list(zip(self._ledgers, totals, strict=True))
        sums = StepSums(
            power=table[:, 0],
            tokens=table[:, 1],
            n=table[:, 2],
            nonfinite=own[0].to(self._dtype),
            silent=own[1],
            norms=self._over_ledgers(ledger.inner(total) for ledger, total in pairs),
            time_noise=time_noise.to(self._dtype),
        )
        if self._by_module:
            sums.module_power = numbers[6:].view(2, -1).T
            sums.module_norms = self._over_ledgers(ledger.module_inner(total) for ledger, total in pairs)
        return sums

    # -- shards ---------------------------------------------------------------------------------------------------

    def _shard_pieces(self, observer: Observer, own: Tensor, time_noise: Tensor) -> list[Tensor]:
        """Numbers of each contribution: what it counts for is known once all ranks' tokens are added up."""
        self._branches = [c.branch for c in observer.contributions]
        tokens = [c.tokens for c in observer.contributions]
        self._told = [t is not None for t in tokens]
        counted = [_scalar(1.0 if t is None else t, self._device, self._dtype) for t in tokens]
        pieces = [
            own,
            time_noise,
            torch.stack(counted) if counted else torch.zeros(0, dtype=self._dtype, device=self._device),
            self._over_ledgers(ledger.powers() / ledger.copies for ledger in self._ledgers),
            self._over_ledgers(ledger.inner(ledger.both_totals) / ledger.copies for ledger in self._ledgers),
        ]
        if self._by_module:
            if counted:
                pieces.append(self._over_ledgers(ledger.module_powers() / ledger.copies for ledger in self._ledgers))
            else:
                pieces.append(torch.zeros(0, self._modules, dtype=self._dtype, device=self._device))
            inner = [ledger.module_inner(ledger.both_totals) / ledger.copies for ledger in self._ledgers]
            pieces.append(self._over_ledgers(inner))
        return pieces

    def _shard_sums(self) -> StepSums:
        own, time_noise, tokens, powers, norms, *by_module = (piece.to(self._dtype) for piece in self._pieces)
        rows, module_rows = [], []
        parts = by_module[0].view(-1, self._modules) if by_module else None
        for branch in Branch:
            k = [k for k, b in enumerate(self._branches) if b is branch]
            told = bool(k) and self._told[k[0]]
            counts = torch.stack([tokens[j] for j in k]) if told else None
            weights = _Weights(counts, len(k), self._device, self._dtype)
            power = weights.divide(torch.stack([powers[j] for j in k])).sum() if k else self._full(0.0)
            rows.append(torch.stack([power, weights.total, weights.n]))
            if by_module:
                part = weights.divide(torch.stack([parts[j] for j in k])).sum(0) if k else self._no_modules()
                module_rows.append(part)
        table = torch.stack(rows)
        sums = StepSums(table[:, 0], table[:, 1], table[:, 2], own[0], own[1], norms, time_noise)
        if by_module:
            sums.module_power = torch.stack(module_rows, dim=1)
            sums.module_norms = by_module[1].view(-1, 3)
        return sums

    # -- both -----------------------------------------------------------------------------------------------------

    def _full(self, value: float) -> Tensor:
        return torch.full((), value, dtype=self._dtype, device=self._device)

    def _no_modules(self) -> Tensor:
        return torch.zeros(self._modules, dtype=self._dtype, device=self._device)

    def _over_ledgers(self, parts: Iterable[Tensor]) -> Tensor:
        return functools.reduce(torch.add, (part.to(self._device, non_blocking=True) for part in parts))


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
    """What the contributions of a branch count for.

    Args:
        tokens: ``[K]``; None where all count alike.
        k: number of contributions.
    """

    def __init__(self, tokens: Tensor | None, k: int, device: torch.device, dtype: torch.dtype) -> None:
        self._tokens = tokens
        if tokens is None:
            self.total = self.n = torch.full((), float(k), dtype=dtype, device=device)
        else:
            self.total, self.n = tokens.sum(), (tokens > 0).sum().to(dtype)

    @classmethod
    def told(cls, tokens: Sequence[Tensor | float | None], device: torch.device, dtype: torch.dtype) -> _Weights:
        """From what the user said of each contribution."""
        stacked = None
        if tokens and tokens[0] is not None:
            stacked = torch.stack([_scalar(t, device, dtype) for t in tokens])
        return cls(stacked, len(tokens), device, dtype)

    def divide(self, values: Tensor) -> Tensor:
        """``[K, ...]`` over the tokens; 0 where there are none."""
        if self._tokens is None:
            return values
        inverse = torch.where(self._tokens > 0, 1.0 / self._tokens, 0.0)
        return values * inverse.view(-1, *[1] * (values.dim() - 1))


def _scalar(value: Tensor | float, device: torch.device, dtype: torch.dtype) -> Tensor:
    if isinstance(value, Tensor):
        return value.detach().reshape(()).to(device=device, dtype=dtype, non_blocking=True)
    return torch.full((), float(value), dtype=dtype, device=device)

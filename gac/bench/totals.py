"""The cases of the operations that add gradients to totals: ``accumulate_`` and ``absorb_sketch_``."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

import gac_kernels
from gac.bench import gates, peers
from gac.bench.case import SCALE, Case, Prepared, dtype_of, inputs
from gac.bench.inputs import Pools
from gac.observe.ledger import sketch_size
from gac_kernels import SketchLayout
from gac_kernels.layout import LANES, sign_key


def accumulate(case: Case, pools: Pools) -> Prepared:
    """Incoming gradients, added to a float32 total: read, and the total read and written."""
    (x, sums), readers, read_bytes, sets = inputs(case, pools, ("a", "total"), wide=("total",))
    lists, numels = x.tensors, [math.prod(shape) for shape in case.shapes]
    totals = [flat[: sum(numels)] for flat in sums.flat]
    parts = [[part.view(shape) for part, shape in zip(t.split(numels), case.shapes, strict=True)] for t in totals]
    scale = torch.tensor(SCALE, device=pools.device)
    prepared = Prepared(
        ours=lambda k: gac_kernels.accumulate_(lists[k], totals[k], scale=scale),
        gate=lambda: gates.check_accumulate(gac_kernels.accumulate_, lists[0], totals[0], scale),
        bytes=read_bytes + totals[0].nbytes,
        readers=readers,
        read_bytes=read_bytes,
        sets=sets,
    )
    expression = peers.compiled(peers.accumulate_expression)

    def eager(k: int) -> Tensor:
        for part, one in zip(parts[k], lists[k], strict=True):
            part.add_(one, alpha=SCALE)
        return torch.stack([one.norm() for one in lists[k]]).norm()

    def foreach(k: int) -> Tensor:
        torch._foreach_add_(parts[k], lists[k], alpha=SCALE)
        return torch.stack(torch._foreach_norm(lists[k])).norm()

    def fused(k: int) -> Tensor:
        rows = [expression(p.view(-1), t.view(-1), scale) for p, t in zip(parts[k], lists[k], strict=True)]
        return torch.stack(rows).sum(0)

    prepared.peers = {"eager: add_, norm": eager, "foreach: add_, norm": foreach, "compile: same": fused}
    return prepared


def absorb_sketch(case: Case, pools: Pools) -> Prepared:
    """Running sums, whose sketch gives and takes: read, and three times a vector of sketches."""
    (x,), readers, read_bytes, sets = inputs(case, pools, "a")
    lists, numels = x.tensors, [math.prod(shape) for shape in case.shapes]
    layout = SketchLayout.per_tensor(numels, size=sketch_size(sum(numels)))
    previous, total = torch.randn(2, layout.size, device=pools.device)
    scale = torch.tensor(SCALE, device=pools.device)
    prepared = Prepared(
        ours=lambda k: gac_kernels.absorb_sketch_(lists[k], previous, total, scale, layout=layout),
        gate=lambda: gates.check_absorb_sketch(gac_kernels.absorb_sketch_, lists[0], previous, total, scale, layout),
        bytes=read_bytes + 4 * total.nbytes,
        readers=readers,
        read_bytes=read_bytes,
        sets=sets,
    )
    prepared.omitted["foreach: sketch"] = "torch._foreach has no projection"
    rows, numel = layout.rows_per_slab, numels[0]
    if case.model or numel % (rows * LANES):
        reason = "written for one tensor that fills whole slabs; a parameter list would need padding and a sign each"
        return replace(prepared, omitted=prepared.omitted | {"eager: signs": reason, "compile: same": reason})
    ones = [tensors[0] for tensors in lists]
    expression, key = peers.compiled(peers.absorb_sketch_expression), sign_key(layout.seed, 0)
    signs = torch.empty(numel // (rows * LANES), rows, LANES, dtype=dtype_of(case.dtype), device=pools.device)
    signs.bernoulli_(0.5).mul_(2).sub_(1)

    def eager(k: int) -> tuple[Tensor, Tensor]:
        now = (ones[k].view_as(signs) * signs).sum(1).view(-1).float()
        return peers.absorb_expression(now, previous, total, scale), ones[k].norm()

    prepared.peers = {
        "eager: stored signs, norm, absorb": eager,
        "compile: same": lambda k: expression(ones[k], previous, total, scale, key, rows, LANES),
    }
    return prepared

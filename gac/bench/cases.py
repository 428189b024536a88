"""The timed cases: an operation on given inputs, beside its peers and the readers of the same bytes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

import gac_kernels
from gac.bench import gates, kronecker, peers, totals
from gac.bench.case import LISTS, SCALE, Case, Prepared, dtype_of, inputs
from gac.bench.inputs import Pools
from gac.observe.ledger import sketch_size
from gac.plan.shapes import LlamaShape
from gac_kernels import SketchLayout
from gac_kernels.layout import LANES, sign_key

LIST_OPERATIONS = (
    "moments",
    "sketch",
    "weighted_sketch",
    "absorb_sketch_",
    "accumulate_",
    "pair_moments",
    "mix_",
    "kronecker_sketch",
)
"""Operations that take lists of tensors, or are timed on the layers of a model's block. ``weighted_sketch`` is
``sketch`` with second moments, which are float32 whatever the gradient is."""

OPERATIONS = (*LIST_OPERATIONS[:-1], "absorb_", "token_moments", "kronecker_sketch")

PEER_KINDS = ("eager", "foreach", "compile")

MU = 0.3
_SMALL_INPUT = 1 << 22  # no sketch and no batch of tokens is larger
_LONGEST_SEQUENCE = 8192


def applies(operation: str, dtype: str, elements: int) -> bool:
    """Whether such a case occurs: sketches are float32, and neither they nor batches of tokens are that large."""
    if operation == "absorb_":
        return dtype == "fp32" and LANES <= elements <= _SMALL_INPUT
    if operation == "kronecker_sketch":
        return elements >= LANES
    return operation != "token_moments" or 8 <= elements <= _SMALL_INPUT


def model_case(operation: str, dtype: str, shape: LlamaShape, room: int, tokens: int = 0) -> Case | None:
    """The case of a model's list within ``room`` bytes, with fewer layers where it is too large; None if none fit.

    Args:
        tokens: of ``kronecker_sketch``, which is timed on one block.
    """
    if operation == "kronecker_sketch":
        note = f"one block, {tokens:,} tokens, sketches of {kronecker.SKETCH} x {kronecker.SKETCH}"
        case = Case(operation, dtype, model=shape, note=note, tokens=tokens)
        return case if case.memory() <= room else None
    fitting = shape.fitting(room // (LISTS[operation] * dtype_of(dtype).itemsize))
    if fitting is None:
        return None
    note = (
        ""
        if fitting == shape
        else f"{fitting.layers} of {shape.layers} layers: inputs are held to {room / 2**30:.1f} GiB"
    )
    return Case(operation, dtype, model=replace(fitting), note=note)


def prepare(case: Case, pools: Pools, kinds: Sequence[str] = PEER_KINDS) -> Prepared:
    """Builds the inputs of a case and everything that is timed on them."""
    prepared = _BUILDERS[case.operation](case, pools)
    missing = peers.compiler_missing(pools.device)
    for name in list(prepared.peers):
        kind = name.split(":")[0]
        if kind not in kinds:
            del prepared.peers[name]
        elif kind == "compile" and missing:
            del prepared.peers[name]
            prepared.omitted[name] = missing
    return prepared


def drop_failing(prepared: Prepared) -> None:
    """Runs each peer once; one that raises is left out, and says why. Peers change inputs: the gate comes first."""
    for name, call in list(prepared.peers.items()):
        try:
            call(0)
        except Exception as error:
            del prepared.peers[name]
            prepared.omitted[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:160]}"


def _moments(case: Case, pools: Pools) -> Prepared:
    (x,), readers, read_bytes, sets = inputs(case, pools, "a")
    lists = x.tensors
    prepared = Prepared(
        ours=lambda k: gac_kernels.moments(lists[k]),
        gate=lambda: gates.check_moments(gac_kernels.moments, lists[0]),
        bytes=read_bytes,
        readers=readers,
        read_bytes=read_bytes,
        sets=sets,
    )
    expression = peers.compiled(peers.moments_expression)
    if case.model:
        prepared.peers = {
            "eager: norm": lambda k: torch.stack([t.norm() for t in lists[k]]).norm(),
            "foreach: norm": lambda k: torch.stack(torch._foreach_norm(lists[k])).norm(),
            "compile: same": lambda k: torch.stack([expression(t.view(-1)) for t in lists[k]]).sum(0),
        }
    else:
        ones = [tensors[0] for tensors in lists]
        prepared.ours = lambda k: gac_kernels.moments(ones[k])
        prepared.peers = {
            "eager: norm": lambda k: ones[k].norm(),
            "foreach: norm": lambda k: torch._foreach_norm(lists[k]),
            "compile: same": lambda k: expression(ones[k]),
        }
    return prepared


def _pair_moments(case: Case, pools: Pools) -> Prepared:
    (x, y), readers, read_bytes, sets = inputs(case, pools, "ab")
    a, b = x.tensors, y.tensors
    prepared = Prepared(
        ours=lambda k: gac_kernels.pair_moments(a[k], b[k]),
        gate=lambda: gates.check_pair_moments(gac_kernels.pair_moments, a[0], b[0]),
        bytes=read_bytes,
        readers=readers,
        read_bytes=read_bytes,
        sets=sets,
    )
    expression = peers.compiled(peers.pair_expression)

    def dots(s: Tensor, t: Tensor) -> Tensor:
        s, t = s.view(-1), t.view(-1)
        return torch.stack([torch.dot(s, s), torch.dot(t, t), torch.dot(s, t)])

    def foreach(k: int) -> list[Tensor]:
        difference = torch._foreach_sub(a[k], b[k])
        return [torch.stack(torch._foreach_norm(part)).norm() for part in (a[k], b[k], difference)]

    prepared.peers["foreach: norm, norm, norm(sub)"] = foreach
    if case.model:
        prepared.peers |= {
            "eager: dot, dot, dot": lambda k: torch.stack([dots(s, t) for s, t in zip(a[k], b[k], strict=True)]).sum(0),
            "eager: norm, norm, norm(a-b)": lambda k: torch.stack(
                [torch.stack([s.norm(), t.norm(), (s - t).norm()]) for s, t in zip(a[k], b[k], strict=True)]
            ).norm(dim=0),
            "compile: same": lambda k: torch.stack(
                [expression(s.view(-1), t.view(-1)) for s, t in zip(a[k], b[k], strict=True)]
            ).sum(0),
        }
        if case.dtype != "fp32" and pools.device.type == "cpu":
            del prepared.peers["eager: dot, dot, dot"]
            reason = "torch.dot of 16-bit numbers takes minutes for such a list on a CPU; see the single tensors"
            prepared.omitted["eager: dot, dot, dot"] = reason
    else:
        left, right = [tensors[0] for tensors in a], [tensors[0] for tensors in b]
        prepared.ours = lambda k: gac_kernels.pair_moments(left[k], right[k])
        prepared.peers |= {
            "eager: dot, dot, dot": lambda k: (
                torch.dot(left[k], left[k]), torch.dot(right[k], right[k]), torch.dot(left[k], right[k])
            ),
            "eager: norm, norm, norm(a-b)": lambda k: (
                left[k].norm(), right[k].norm(), (left[k] - right[k]).norm()
            ),
            "compile: same": lambda k: expression(left[k], right[k]),
        }  # fmt: skip
    return prepared


def _mix(case: Case, pools: Pools) -> Prepared:
    (x, y), readers, read_bytes, sets = inputs(case, pools, "ab")
    a, b = x.tensors, y.tensors
    mu = torch.tensor(MU, device=pools.device)
    rest = (1 - mu).to(dtype_of(case.dtype))
    expression = peers.compiled(peers.mix_expression)
    prepared = Prepared(
        ours=lambda k: gac_kernels.mix_(a[k], b[k], mu),
        gate=lambda: gates.check_mix(gac_kernels.mix_, a[0], b[0], mu),
        bytes=read_bytes + read_bytes // 2,
        readers=readers,
        read_bytes=read_bytes,
        sets=sets,
        peers={"foreach: lerp_": lambda k: torch._foreach_lerp_(a[k], b[k], 1 - MU)},
    )
    if case.model:

        def eager(k: int) -> None:
            for s, t in zip(a[k], b[k], strict=True):
                s.lerp_(t, rest)

        def fused(k: int) -> None:
            for s, t in zip(a[k], b[k], strict=True):
                expression(s.view(-1), t.view(-1), mu)

        prepared.peers |= {"eager: lerp_": eager, "compile: same": fused}
    else:
        left, right = [tensors[0] for tensors in a], [tensors[0] for tensors in b]
        prepared.ours = lambda k: gac_kernels.mix_(left[k], right[k], mu)
        prepared.peers |= {
            "eager: lerp_": lambda k: left[k].lerp_(right[k], rest),
            "compile: same": lambda k: expression(left[k], right[k], mu),
        }
    return prepared


def _sketch(case: Case, pools: Pools) -> Prepared:
    weighted = case.operation == "weighted_sketch"
    (x, *second), readers, read_bytes, sets = inputs(case, pools, "av" if weighted else "a", wide="v")
    lists, seconds = x.tensors, [None] * sets
    if weighted:
        seconds = second[0].tensors
        for flat in second[0].flat:
            flat.abs_()
    numels = [math.prod(shape) for shape in case.shapes]
    layout = SketchLayout.per_tensor(numels, size=sketch_size(sum(numels)))
    out = torch.zeros(layout.size, device=pools.device)
    prepared = Prepared(
        ours=lambda k: gac_kernels.sketch(lists[k], out, layout=layout, second_moments=seconds[k]),
        gate=lambda: gates.check_sketch(gac_kernels.sketch, lists[0], out, layout, seconds[0]),
        bytes=read_bytes + out.nbytes,
        readers=readers,
        read_bytes=read_bytes,
        sets=sets,
    )
    prepared.omitted["foreach: sketch"] = "torch._foreach has no projection"
    rows, numel = layout.rows_per_slab, numels[0]
    if case.model or numel % (rows * LANES):
        reason = "written for one tensor that fills whole slabs; a parameter list would need padding and a sign each"
        return replace(prepared, omitted=prepared.omitted | {"eager: signs": reason, "compile: same": reason})
    ones, moments = [t[0] for t in lists], [None if t is None else t[0] for t in seconds]
    expression, key = peers.compiled(peers.sketch_expression), sign_key(layout.seed, 0)
    signs = torch.empty(numel // (rows * LANES), rows, LANES, dtype=dtype_of(case.dtype), device=pools.device)
    signs.bernoulli_(0.5).mul_(2).sub_(1)

    def eager(k: int) -> tuple[Tensor, Tensor]:
        second = moments[k]
        values = ones[k] if second is None else peers.weighted(ones[k], second)
        return (values.view_as(signs) * signs).sum(1), values.norm()

    prepared.peers = {
        "eager: stored signs, norm": eager,
        "compile: same": lambda k: expression(ones[k], out, key, rows, LANES, moments[k]),
    }
    return prepared


def _absorb(case: Case, pools: Pools) -> Prepared:
    lists, readers, read_bytes, sets = inputs(case, pools, ("current", "previous", "total"))
    current, previous, total = ([tensors[0] for tensors in one.tensors] for one in lists)
    scale = torch.tensor(SCALE, device=pools.device)
    expression = peers.compiled(peers.absorb_expression)

    def foreach(k: int) -> Tensor:
        delta = torch._foreach_sub([current[k]], [previous[k]])
        torch._foreach_mul_(delta, SCALE)
        torch._foreach_add_([total[k]], delta)
        torch._foreach_copy_([previous[k]], [current[k]])
        return delta[0].square().view(-1, LANES).sum(1)

    prepared = Prepared(
        ours=lambda k: gac_kernels.absorb_(current[k], previous[k], total[k], scale),
        gate=lambda: gates.check_absorb(gac_kernels.absorb_, current[0], previous[0], total[0], scale),
        bytes=read_bytes + read_bytes // 3 * 2,
        readers=readers,
        read_bytes=read_bytes,
        sets=sets,
    )
    if case.elements % LANES:
        reason = "written for whole cells of 1,024 elements"
        return replace(prepared, omitted=dict.fromkeys(("eager: same", "foreach: same", "compile: same"), reason))
    prepared.peers = {
        "eager: same": lambda k: peers.absorb_expression(current[k], previous[k], total[k], scale),
        "foreach: same": foreach,
        "compile: same": lambda k: expression(current[k], previous[k], total[k], scale),
    }
    return prepared


def _token_moments(case: Case, pools: Pools) -> Prepared:
    length = min(_LONGEST_SEQUENCE, max(1, case.elements // 8))
    rows = case.elements // length
    shaped = replace(case, elements=rows * length)
    lists, readers, read_bytes, sets = inputs(shaped, pools, ("logprobs", "advantages"))
    logprobs, advantages = ([t[0].view(rows, length) for t in one.tensors] for one in lists)
    for flat in lists[0].flat:
        flat.abs_().neg_()
    mask = torch.rand(rows, length, device=pools.device) < 0.75
    is_expert = torch.arange(rows, device=pools.device) % 4 == 0
    expression = peers.compiled(peers.token_expression)
    arguments = lambda k: (logprobs[k], advantages[k], mask, is_expert)
    prepared = Prepared(
        ours=lambda k: gac_kernels.token_moments(*arguments(k)),
        gate=lambda: gates.check_token_moments(gac_kernels.token_moments, *arguments(0)),
        bytes=read_bytes + mask.nbytes,
        readers=readers,
        read_bytes=read_bytes,
        sets=sets,
        peers={
            "eager: same": lambda k: peers.token_expression(*arguments(k)),
            "compile: same": lambda k: expression(*arguments(k)),
        },
    )
    prepared.omitted["foreach: same"] = "torch._foreach has no reduction along a dimension"
    return prepared


def _kronecker(case: Case, pools: Pools) -> Prepared:
    (x,), readers, read_bytes, sets = inputs(case, pools, "a")
    layers = [kronecker.layers(tensors) for tensors in x.tensors]
    prepared = Prepared(
        ours=lambda k: kronecker.ours(layers[k]),
        gate=lambda: kronecker.check(gac_kernels.kronecker_sketch, layers[0]),
        bytes=read_bytes + 2 * sum(layer.out.nbytes for layer in layers[0]),
        readers=readers,
        read_bytes=read_bytes,
        sets=sets,
        peers=kronecker.peers_of(layers, peers.compiled(kronecker.by_matmul)),
    )
    prepared.omitted["foreach: same"] = "torch._foreach has no matrix product"
    if case.model and pools.device.type == "cpu":
        del prepared.peers[kronecker.GRADIENTS]
        reason = "per-sample gradients of such layers take minutes on a CPU; see the single layers"
        prepared.omitted[kronecker.GRADIENTS] = reason
    return prepared


_BUILDERS: dict[str, Callable[[Case, Pools], Prepared]] = {
    "moments": _moments,
    "sketch": _sketch,
    "weighted_sketch": _sketch,
    "absorb_sketch_": totals.absorb_sketch,
    "accumulate_": totals.accumulate,
    "pair_moments": _pair_moments,
    "mix_": _mix,
    "absorb_": _absorb,
    "token_moments": _token_moments,
    "kronecker_sketch": _kronecker,
}

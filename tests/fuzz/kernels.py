"""The target ``kernels``: every public operation of ``gac_kernels``, on each backend, against its definition."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterable
from time import monotonic
from types import ModuleType

import torch
from torch import Tensor

import gac_kernels
from gac_kernels.arguments import overlaps_itself
from gac_kernels.layout import LANES, SketchLayout
from tests.fuzz import kernel_truth as truth
from tests.fuzz.kernel_draw import Call, drawn
from tests.fuzz.kernel_totals import absorb_sketch, accumulate
from tests.fuzz.kernel_truth import LATER, ROUNDOFF, ROWS, SMALLEST, U32, U64, far
from tests.fuzz.report import Tally, as_code
from tests.fuzz.run import is_ours

BACKENDS = ("cpu", "fallback", "reference", "dispatch")
MOST = 20
"""Failures after which it is enough."""


def backend_of(name: str) -> ModuleType:
    """The module that has the operations; ``triton`` needs TRITON_INTERPRET=1 where there is no GPU."""
    if name == "dispatch":
        return gac_kernels
    return importlib.import_module(f"gac_kernels.{name}")


def fuzz(seed: int, numbers: Iterable[int], *, until: float = math.inf, backend: str | None = None) -> Tally:
    """Makes the calls of ``numbers`` until ``monotonic()`` says ``until``, on one backend or all that run on CPUs."""
    tally, start = Tally("kernels"), monotonic()
    for number in numbers:
        call = drawn(seed, number)
        tally.draws += 1
        for name in BACKENDS if backend is None else (backend,):
            what = check(call, name)
            if what is not None:
                tally.failures.append(
                    f"{name}, draw {number} of seed {seed}: {what}\n"
                    "    from tests.fuzz.kernel_draw import Call, Tensors\n"
                    "    from tests.fuzz.kernels import check\n"
                    f"    print(check({as_code(call)}, {name!r}))"
                )
        if monotonic() >= until or len(tally.failures) >= MOST:
            break
    tally.seconds = monotonic() - start
    return tally


def check(call: Call, name: str) -> str | None:
    """What is wrong with a call on a backend; None where nothing is."""
    try:
        if call.wrong is not None:
            return _refused(call, backend_of(name))
        return _CHECKS[call.operation](call, backend_of(name), name)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def _refused(call: Call, backend: ModuleType) -> str | None:
    tensors: list = [spec.make() for spec in call.tensors]
    out, options, other = torch.zeros(sum(t.numel() for t in tensors) + 1), {}, list(tensors)
    if call.wrong == "integers":
        tensors[-1] = tensors[-1].detach().to(torch.int32, copy=True)
    elif call.wrong == "complex":
        tensors[-1] = torch.zeros(tensors[-1].shape, dtype=torch.complex64)
    elif call.wrong == "text":
        tensors[-1] = "text"
    elif call.wrong == "sparse":
        tensors[-1] = torch.eye(3).to_sparse()
    elif call.operation == "pair_moments":
        other = other[:-1]
    elif call.operation == "moments":
        return None
    elif call.wrong == "out":
        out = out.bfloat16()
    elif call.wrong == "scale":
        options["scale"] = "large"
    else:
        options |= {"layout": SketchLayout((out.numel() + 1,), 1)}
    calls = {
        "moments": lambda: backend.moments(tensors),
        "pair_moments": lambda: backend.pair_moments(tensors, other),
        "sketch": lambda: backend.sketch(tensors, out, **options),
    }
    try:
        calls[call.operation]()
    except (TypeError, ValueError) as error:
        return None if is_ours(error) else f"a foreign {type(error).__name__}: {error}"
    return "accepted"


def _moments(call: Call, backend: ModuleType, name: str) -> str | None:
    tensors = [spec.make() for spec in call.tensors]
    copies = [t.detach().clone() for t in tensors]
    scales = [spec.scales(t) if call.options["scales"] else None for spec, t in zip(call.tensors, tensors, strict=True)]
    rows = truth.moments(truth.scaled(tensors, scales))
    per_tensor = call.options["per_tensor"]
    want = rows if per_tensor else rows.sum(0)
    got = backend.moments(
        tensors, per_tensor=per_tensor, **({"block_scales": scales} if call.options["scales"] else {})
    )
    bound = truth.sums_bound(want[..., 0], tensors, name)
    found = far("squares", got[..., 0], want[..., 0], bound)
    if found is None and not torch.equal(got[..., 1], want[..., 1]):
        found = f"non-finite elements are {got[..., 1].tolist()}, have to be {want[..., 1].tolist()}"
    return found or _changed(tensors, copies)


def _changed(tensors: list[Tensor], copies: list[Tensor]) -> str | None:
    wide = [(t.detach().double(), c.double()) for t, c in zip(tensors, copies, strict=True)]
    same = [bool(((t == c) | (t.isnan() & c.isnan())).all()) for t, c in wide]
    return None if all(same) else "an input was changed"


def _pair(call: Call, *, own: bool) -> tuple[list[Tensor], list[Tensor]]:
    """Two lists; ``own`` leaves out what overlaps itself."""
    a, b = [spec.make() for spec in call.tensors], [spec.make(seed=1) for spec in call.tensors]
    kept = [k for k, x in enumerate(a) if not (own and overlaps_itself(x))]
    return [a[k] for k in kept], [b[k] for k in kept]


def _bound_of_pairs(rows: Tensor, tensors: list[Tensor], name: str) -> Tensor:
    sizes = rows.abs()
    sizes[..., 2] = (sizes[..., 0] + sizes[..., 1]) / 2
    return truth.sums_bound(sizes, tensors, name)


def _pair_moments(call: Call, backend: ModuleType, name: str) -> str | None:
    a, b = _pair(call, own=False)
    rows = truth.pairs(a, b)
    want = rows if call.options["per_tensor"] else rows.sum(0)
    return far("moments", backend.pair_moments(a, b, **call.options), want, _bound_of_pairs(want, a + b, name))


def _mix(call: Call, backend: ModuleType, name: str) -> str | None:
    a, b = _pair(call, own=True)
    a = [x.detach() for x in a]
    before, mu = [x.clone() for x in a], call.options["mu"]
    weight = torch.tensor(mu, dtype=torch.float64) if call.options["tensor"] else mu
    got = backend.mix_(a, b, weight, moments=call.options["moments"])
    if call.options["moments"]:
        want = truth.pairs(before, b).sum(0)
        found = far("moments", got, want, _bound_of_pairs(want, a + b, name))
        if found:
            return found
    for k, (x, old, y) in enumerate(zip(a, before, b, strict=True)):
        left, right = mu * old.double(), (1 - mu) * y.detach().double()
        wide = old.dtype == torch.float64
        least = SMALLEST[torch.float64 if wide else torch.float32]
        # four roundings there, and as many of the float64 numbers here
        compute = 4 * ((U64 if wide else U32) + U64) * (left.abs() + right.abs()) + 4 * least
        if name == "triton" and not call.options["tensor"]:  # kernels get 48 bits of a Python float
            compute = compute + 2.0**-48 * mu * (old.double().abs() + y.detach().double().abs())
        unit = ROUNDOFF[x.dtype]
        bound = compute + unit * ((left + right).abs() + compute) + SMALLEST[x.dtype]
        found = far(f"mixed {k}", x, left + right, bound)
        if found:
            return found
    return None


def _sketch(call: Call, backend: ModuleType, name: str) -> str | None:
    o = call.options
    tensors = [spec.make() for spec in call.tensors]
    numels = [t.numel() for t in tensors]
    dtype = getattr(torch, o["out"])
    arguments: dict = {"accumulate": o["accumulate"], "per_tensor": o["per_tensor"]}
    regions, starts = list(range(len(tensors))), [0] * len(tensors)
    if o["layout"] is None:
        size = max(min(sum(numels), LANES), sum(numels) // o["rows"])
        layout = SketchLayout.flat(sum(numels), size, seed=o["seed"])
        regions, starts = [0] * len(tensors), [sum(numels[:k]) for k in range(len(numels))]
        arguments["seed"] = o["seed"]
    elif o["layout"] == "own":
        layout = SketchLayout(tuple(numels), o["rows"], o["seed"], o["lanes"])
        arguments["layout"], size = layout, layout.size
    else:  # pieces of one region, the last first, with elements between them that nobody gives
        regions, starts = [0] * len(tensors), [sum(numels[:k]) + 5 * k for k in range(len(numels))]
        tensors, numels, starts = tensors[::-1], numels[::-1], starts[::-1]
        layout = SketchLayout((sum(numels) + 5 * len(numels) + 1,), o["rows"], o["seed"], o["lanes"])
        arguments |= {"layout": layout, "regions": regions, "starts": starts}
        size = layout.size
    taken, error = tensors, 0.0
    wide = dtype == torch.float64 or any(t.dtype == torch.float64 for t in tensors)
    if o["second"]:
        seconds = truth.second_moments(tensors)
        arguments |= {"second_moments": seconds, "eps": o["eps"]}
        taken = [truth.weighted(x, v, o["eps"]) for x, v in zip(tensors, seconds, strict=True)]
        error = 7.01 * (U64 if wide and name != "triton" else U32)
    if o["scales"] and o["layout"] == "own":  # elsewhere tensors begin anywhere
        scales = [spec.scales(t) for spec, t in zip(call.tensors, tensors, strict=True)]
        arguments["block_scales"], taken = scales, truth.scaled(tensors, scales)
    scale = 1.0 if o["scale"] is None else o["scale"]
    if o["scale"] is not None:
        arguments["scale"] = torch.tensor(scale, dtype=torch.float64) if o["tensor"] else scale
    start = torch.arange(size, dtype=torch.float64).sin().to(dtype)
    out = start.clone()
    rows = truth.moments(taken)
    want_moments = rows if o["per_tensor"] else rows.sum(0)
    if o["into"]:
        arguments["into"] = torch.ones_like(want_moments)
    got = backend.sketch(tensors, out, **arguments)
    if o["into"]:
        if got is not arguments["into"]:
            return "into was not returned"
        want_moments = want_moments + 1.0
    bound = truth.sums_bound(want_moments[..., 0], tensors, name, terms=ROWS, error=error)
    found = far("squares", got[..., 0], want_moments[..., 0], bound)
    if found or not torch.equal(got[..., 1], want_moments[..., 1]):
        return found or f"non-finite: {got[..., 1].tolist()}, have to be {want_moments[..., 1].tolist()}"
    total, mass, count = truth.projected(taken, layout, regions, starts)
    named = torch.zeros(layout.size, dtype=torch.bool)
    for region in set(regions):
        begin = layout.bucket_offsets[region]
        named[begin : begin + layout.region_size(layout.numels[region])] = True
    pad = lambda x: torch.cat([x, torch.zeros(size - len(x), dtype=x.dtype)])
    total, mass, count, named = pad(total), pad(mass), pad(count), pad(named)
    named[layout.size :] = True
    kept = start.double() if o["accumulate"] else torch.where(named, 0.0, start.double())
    want = kept + scale * total
    narrow = U64 if wide and name != "triton" else U32
    bound = abs(scale) * ((count.clamp(max=ROWS) * narrow + (count + LATER) * U64 + error) * mass)
    bound += abs(scale) * SMALLEST[torch.float32] * count + 2 * ROUNDOFF[dtype] * want.abs() + SMALLEST[dtype]
    if name == "triton":  # kernels get 48 bits of a Python float
        bound += 2.0**-48 * abs(scale) * mass
    if o["accumulate"] and name == "reference":  # it rounds what it adds, and then the sum
        bound += ROUNDOFF[dtype] * (scale * total).abs()
    return far("out", out, want, bound)


def _absorb(call: Call, backend: ModuleType, name: str) -> str | None:
    o = call.options
    current, previous, total = (spec.make() for spec in call.tensors)
    before, old = previous.clone(), total.clone()
    scale = torch.tensor(o["scale"]) if o["tensor"] else o["scale"]
    factor = float(scale)
    cells = -(-current.numel() // LANES)
    into = torch.ones(cells, dtype=torch.float64) if o["into"] else None
    got = backend.absorb_(current, previous if o["previous"] else None, total, scale, into=into)
    delta = factor * (current.double() - (before.double() if o["previous"] else 0.0))
    squares = torch.nn.functional.pad(delta.square(), (0, cells * LANES - delta.numel())).view(cells, LANES).sum(1)
    want = squares + (1.0 if o["into"] else 0.0)
    if not torch.equal(previous, current if o["previous"] else before):
        return "previous is not current"
    found = far("squares", got, want, 2 * LANES * U64 * want)
    return found or far("total", total, old.double() + delta, 2 * U32 * (old.double() + delta).abs() + 2.0**-149)


def _token_moments(call: Call, backend: ModuleType, name: str) -> str | None:
    o, spec = call.options, call.tensors[0]
    rows, length = o["rows"], o["length"]
    generator = torch.Generator().manual_seed(spec.seed)
    dtype = getattr(torch, spec.dtype)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    logprobs = (-draw(rows, length).abs() * 3).to(dtype)
    shape = {"rows": (rows,), "tokens": (rows, length), "column": (rows, 1)}[o["advantages"]]
    advantages = draw(*shape).to(dtype)
    mask = (draw(rows, length) > 0).to(getattr(torch, o["mask"]))
    logprobs = logprobs + torch.where(mask != 0, 0.0, math.nan).to(dtype)
    if o["strided"]:
        logprobs, mask = logprobs.t().contiguous().t(), torch.stack([mask, mask], -1)[..., 0]
    expert = torch.arange(rows) % 3 == 1
    got = backend.token_moments(logprobs, advantages, mask, expert)
    want, sizes = truth.token_rows(logprobs, advantages, mask, expert)
    return far("rows", got, want, (length + 16) * U64 * sizes)


_CHECKS = {
    "moments": _moments,
    "pair_moments": _pair_moments,
    "mix_": _mix,
    "sketch": _sketch,
    "absorb_": _absorb,
    "accumulate_": accumulate,
    "absorb_sketch_": absorb_sketch,
    "token_moments": _token_moments,
}

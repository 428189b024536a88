"""Drawn calls of ``accumulate_`` and ``absorb_sketch_`` against their definitions, for the target ``kernels``."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from gac_kernels.layout import CELL_LANES, SketchLayout
from tests.fuzz import kernel_truth as truth
from tests.fuzz.kernel_draw import Call
from tests.fuzz.kernel_truth import LATER, ROWS, SMALLEST, U32, U64, far


def _start(size: int, shift: float) -> Tensor:
    return (torch.arange(size, dtype=torch.float64) + shift).sin().float()


def _scale(call: Call) -> Tensor | float:
    return torch.tensor(call.options["scale"]) if call.options["tensor"] else call.options["scale"]


def accumulate(call: Call, backend: ModuleType, name: str) -> str | None:
    """What is off in a call of ``accumulate_``."""
    o, tensors = call.options, [spec.make() for spec in call.tensors]
    numels = [t.numel() for t in tensors]
    scales = [spec.scales(t) for spec, t in zip(call.tensors, tensors, strict=True)] if o["scales"] else None
    ends = [sum(numels[:k]) for k in range(len(numels) + 1)]
    arguments: dict = {"scale": _scale(call), "per_tensor": o["per_tensor"]}
    offsets, size = ends[:-1], ends[-1]
    if o["layout"] == "own":
        layout = SketchLayout(tuple(numels), 1, o["seed"], o["lanes"])
        arguments["layout"] = layout
    elif o["layout"] == "pieces":  # of the second of two regions, the last first, with gaps
        starts = [ends[k] + 5 * k for k in range(len(numels))]
        tensors, numels, starts = tensors[::-1], numels[::-1], starts[::-1]
        scales = None if scales is None else scales[::-1]
        layout = SketchLayout((7, ends[-1] + 5 * len(numels) + 1), 1, o["seed"], o["lanes"])
        arguments |= {"layout": layout, "regions": [1] * len(numels), "starts": starts}
        offsets, size = [7 + s for s in starts], layout.size
    taken = truth.scaled(tensors, [None] * len(tensors) if scales is None else scales)
    units = [0.0] * len(tensors)
    if scales is not None:
        arguments["block_scales"] = scales
    if o["second"]:
        seconds = truth.second_moments(tensors)
        arguments |= {"second_moments": seconds, "eps": o["eps"]}
        taken = [truth.weighted(x, v, o["eps"]) for x, v in zip(tensors, seconds, strict=True)]
        wide = name == "fallback"  # in float64 everywhere; others where a tensor is
        units = [7.01 * (U64 if wide or t.dtype == torch.float64 else U32) for t in tensors]
    scale, start = float(arguments["scale"]), _start(size, 0.0)
    before = _start(size, 0.5) if o["previous"] else None
    total, previous = start.clone(), None if before is None else before.clone()
    rows = truth.moments(taken)
    if o["into"]:
        arguments["into"] = torch.ones_like(rows if o["per_tensor"] else rows.sum(0))
    got = backend.accumulate_(tensors, total, previous=previous, **arguments)
    if o["into"] and got is not arguments["into"]:
        return "into was not returned"
    error, want, bound, untouched = 0.0, start.double(), torch.zeros(size), torch.ones(size, dtype=torch.bool)
    bound = bound.double()
    for k, (x, offset) in enumerate(zip(taken, offsets, strict=True)):
        here = slice(offset, offset + len(x))
        untouched[here] = False
        element = units[k] * x.abs() + (SMALLEST[torch.float32] if units[k] else 0.0)
        added = x
        if before is not None and previous is not None:
            element = element + (2 * U32 * x.abs() + SMALLEST[torch.float32] if units[k] else 0.0)
            found = far(f"previous of {k}", previous[here], x.float().double(), element)
            if found:
                return found
            added = x.float().double() - before[here].double()
            rows[k, 0] = float(added.square().sum())
        error += float((2 * added.abs() * element + element.square()).nan_to_num(0.0, 0.0, 0.0).sum()) * 1.01
        want[here] = want[here] + scale * added
        # the scale of 48 bits; in float32, where the fallback adds nothing but plain tensors, product and sum
        term = (2.0**-46 + (2 * U32 if name == "fallback" else 0.0)) * (scale * added).abs() + abs(scale) * element
        bound[here] = 1.01 * term + 1.01 * U32 * want[here].abs() + SMALLEST[torch.float32]
    expected = rows if o["per_tensor"] else rows.sum(0)
    expected = expected + 1.0 if o["into"] else expected
    # squares are float64 everywhere but in the fallback
    sums = truth.sums_bound(expected[..., 0], tensors, "cpu" if name == "triton" else name) + error
    found = far("squares", got[..., 0], expected[..., 0], sums) or far("total", total, want, bound)
    if found or not torch.equal(got[..., 1], expected[..., 1]):
        return found or f"non-finite: {got[..., 1].tolist()}, have to be {expected[..., 1].tolist()}"
    return None if torch.equal(total[untouched], start[untouched]) else "total was changed where nothing is added"


def absorb_sketch(call: Call, backend: ModuleType, name: str) -> str | None:
    """What is off in a call of ``absorb_sketch_``: the sketch, then what follows from it."""
    o, tensors = call.options, [spec.make() for spec in call.tensors]
    numels, regions = [t.numel() for t in tensors], list(range(len(call.tensors)))
    arguments: dict = {}
    if o["layout"] == "turned":
        regions = [len(numels) - k for k in range(len(numels))]
        layout = SketchLayout((5, *reversed(numels), 900), o["rows"], o["seed"], o["lanes"])
        arguments["regions"] = regions
    else:
        layout = SketchLayout(tuple(numels), o["rows"], o["seed"], o["lanes"])
    taken, error = tensors, 0.0
    if o["scales"]:
        scales = [spec.scales(t) for spec, t in zip(call.tensors, tensors, strict=True)]
        arguments["block_scales"], taken = scales, truth.scaled(tensors, scales)
    if o["second"]:
        seconds = truth.second_moments(tensors)
        arguments |= {"second_moments": seconds, "eps": o["eps"]}
        taken = [truth.weighted(x, v, o["eps"]) for x, v in zip(tensors, seconds, strict=True)]
        error = 7.01 * U32
    scale = float(_scale(call))
    before, start = _start(layout.size, 0.5), _start(layout.size, 0.0)
    previous, total = before.clone(), start.clone()
    if o["into"]:
        arguments["into"] = torch.ones(2 + layout.cells, dtype=torch.float64)
    got = backend.absorb_sketch_(tensors, previous, total, _scale(call), layout=layout, **arguments)
    if o["into"]:
        if got is not arguments["into"]:
            return "into was not returned"
        got = got - 1.0
    moments = truth.moments(taken).sum(0)
    bound = truth.sums_bound(moments[0], tensors, name, terms=ROWS, error=error) + 8 * U64 * float(o["into"])
    found = far("squares", got[:1], moments[:1], bound)
    if found or got[1] != moments[1]:
        return found or f"non-finite: {float(got[1])}, have to be {float(moments[1])}"
    now, mass, count = truth.projected(taken, layout, regions, [0] * len(tensors))
    named = torch.zeros(layout.size, dtype=torch.bool)
    cells, limit = torch.zeros(layout.cells, dtype=torch.float64), 0.0
    delta = scale * (previous.double() - before.double())
    for region in regions:
        first, size = layout.bucket_offsets[region], layout.region_size(layout.numels[region])
        named[first : first + size] = True
        cell = layout.cell_offsets[region]
        for slab in delta[first : first + size].split(layout.lanes) if size else ():
            parts = [float(part.square().sum()) for part in slab.split(CELL_LANES)]
            cells[cell : cell + len(parts)] = torch.tensor(parts, dtype=torch.float64)
            cell += layout.cells_of_slab
            limit = max([limit, *(part for part in parts if part < float("inf"))])
    if not (torch.equal(previous[~named], before[~named]) and torch.equal(total[~named], start[~named])):
        return "regions that were not named have changed"
    off = (count.clamp(max=ROWS) * U32 + (count + LATER) * U64 + error) * mass
    off += SMALLEST[torch.float32] * (count + 1) + 2 * U32 * now.abs()
    found = far("previous", previous[named], now[named], off[named])
    exact = start.double() + delta
    off = 2.0**-46 * delta.abs() + 1.01 * U32 * exact.abs() + SMALLEST[torch.float32]
    found = found or far("total", total[named], exact[named], off[named])
    return found or far("cells", got[2:], cells, torch.tensor(1e-12 * limit + 8 * U64 * float(o["into"])))

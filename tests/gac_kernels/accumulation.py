"""Cases of ``accumulate_`` and its checks against the reference in float64, for every backend.

Error bounds. An element ``x`` is exact, or divided by ``sqrt(v) + eps`` with an error of ``weight`` units (of float32,
or of float64 where a tensor or its second moment is) and, in float32, of its smallest number. The total is rounded once
to float32, after sums in float64 (a Python scale may have 48 bits). With ``previous`` the element is rounded to float32
before the difference, which a weighted one may be to either neighbour. Squares err by ``sums``, relative.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from gac_kernels import reference
from gac_kernels.layout import SketchLayout
from tests.gac_kernels.cases import (
    DTYPES,
    SMALLEST,
    SketchCase,
    misaligned,
    nonfinite_cases,
    poisoned,
    second_moments,
    tensor_cases,
    values,
    weighted,
    weighted_cases,
)

U32, U64 = 2.0**-24, 2.0**-53


@dataclass(frozen=True)
class Errors:
    """What a backend rounds.

    Attributes:
        weight: units by which a weighted element errs. wide: they are those of float64 everywhere.
        sums: relative error of a sum of squares. added: of what is added, without weights, in units of float32.
    """

    weight: float
    sums: float
    wide: bool = False
    added: float = 0.0


def _lossless(case: SketchCase) -> SketchCase:
    numels = tuple(t.numel() for t in case.make("cpu")) if case.regions is None else case.layout.numels
    layout = SketchLayout(numels, 1)
    return dataclasses.replace(case, layout=layout, size=layout.size)


def accumulate_cases() -> list[SketchCase]:
    """Lists of every dtype and stride, addresses off by an element on either side, pieces, weights, no layout."""
    cases = []

    def add(name, make, layout=None, regions=None, starts=None, second=None, **options):
        size = layout.size if layout else sum(t.numel() for t in make("cpu"))
        cases.append(SketchCase(name, make, layout, size, regions, starts, options, second))

    for case in tensor_cases():
        add(case.name, case.make, SketchLayout(tuple(t.numel() for t in case.make("cpu")), 1))
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        name = str(dtype).removeprefix("torch.")
        for by in range(1, 5):  # the second tensor begins at an address of the total of every alignment
            tensors = lambda device, d=dtype, by=by: [
                values(by, device=device),
                *(values(n, dtype=d, device=device, seed=n) for n in (9000, 9001)),
                misaligned(7000, d, device, 5, by),
            ]
            add(f"after_{by}_{name}", tensors, scale=0.37)
    pieces = lambda device: [values(n, device=device, seed=n) for n in (500, 1, 3000, 700)]
    layout = SketchLayout((10, 4000, 33, 5000, 0), 1, lanes=96)
    add("pieces", pieces, layout, (3, 1, 3, 1), (4500, 17, 1000, 3000), scale=-1.5)
    add("pieces_weighted", pieces, layout, (3, 1, 3, 1), (4500, 17, 1000, 3000), second_moments, eps=0.25)
    return cases + [_lossless(case) for case in weighted_cases() if case.size < 100_000]


def check_accumulate(backend, case: SketchCase, device: str, errors: Errors) -> None:
    """One case with and without ``previous``, with a scale on the device and one from the host, fresh and added."""
    tensors, options = case.make(device), {k: v for k, v in case.options.items() if k != "accumulate"}
    options |= {"layout": case.layout, "regions": case.regions, "starts": case.starts}
    seconds = case.second(tensors) if case.second else None
    taken = [t.detach().double().reshape(-1) for t in tensors]
    units = [0.0] * len(tensors)
    if seconds is not None:
        options["second_moments"] = seconds
        taken = weighted(tensors, seconds, options.get("eps", 1e-8))
        for k, pair in enumerate(zip(tensors, seconds, strict=True)):
            wide = errors.wide or any(t.dtype == torch.float64 for t in pair)
            units[k] = errors.weight * (U64 if wide else U32)
    offsets = _offsets(case, taken)
    start = values(case.size, seed=7, device=device)
    for previous in (None, values(case.size, seed=8, device=device)):
        scale = options.get("scale", 1.0)
        if previous is not None:
            options["scale"] = torch.tensor(scale, device=device)
            scale = float(options["scale"])
        want, got = (t.clone() for t in (start, start))
        last = [None, None] if previous is None else [previous.clone(), previous.clone()]
        expected = reference.accumulate_(tensors, want, previous=last[0], per_tensor=True, **options)
        found = backend.accumulate_(tensors, got, previous=last[1], per_tensor=True, **options)
        assert found.dtype == torch.float64
        assert found.shape == expected.shape == (len(tensors), 2)
        assert torch.equal(found[:, 1], expected[:, 1].to(device))
        untouched = torch.ones(case.size, dtype=torch.bool, device=device)
        for k, (x, offset) in enumerate(zip(taken, offsets, strict=True)):
            here = slice(offset, offset + x.numel())
            untouched[here] = False
            element = units[k] * x.abs() + (SMALLEST[torch.float32] if units[k] else 0.0)
            added = x
            if previous is not None:
                moved = element + (2 * U32 * x.abs() + SMALLEST[torch.float32] if units[k] else 0.0)
                assert ((last[1][here].double() - last[0][here].double()).abs() <= moved).all()
                added, element = x.float().double() - previous[here].double(), moved
            exact = start[here].double() + scale * added
            term = (errors.added * U32 + 2.0**-46) * (scale * added).abs() + abs(scale) * element
            bound = 1.01 * term + (1 + 1e-6) * U32 * exact.abs() + SMALLEST[torch.float32]
            assert ((got[here].double() - exact).abs() <= bound)[torch.isfinite(exact)].all()
            square = float(added.square().sum())
            slack = errors.sums * square + float((2 * added.abs() * element + element.square()).sum()) * 1.01
            slack += 0.0 if previous is not None or units[k] else _vanished(errors, x)
            if math.isfinite(square):
                assert abs(float(found[k, 0]) - square) <= slack + 1e-300
        assert torch.equal(got[untouched], start[untouched])
        into = torch.tensor([3.0, 1.0], dtype=torch.float64, device=device)
        again, rest = start.clone(), None if previous is None else previous.clone()
        assert backend.accumulate_(tensors, again, previous=rest, into=into, **options) is into
        assert torch.equal(again, got)
        assert rest is None or torch.equal(rest, last[1])
        torch.testing.assert_close(into, found.sum(0) + into.new_tensor([3.0, 1.0]), rtol=1e-12, atol=0)


def _vanished(errors: Errors, x: Tensor) -> float:
    """What squares below float32's range may lose where they are added in float32."""
    return 2.0**-149 * x.numel() if errors.sums > 1e-9 else 0.0


def _offsets(case: SketchCase, taken: list[Tensor]) -> list[int]:
    if case.layout is None:
        return [sum(t.numel() for t in taken[:k]) for k in range(len(taken))]
    regions = range(len(taken)) if case.regions is None else case.regions
    starts = [0] * len(taken) if case.starts is None else case.starts
    return [case.layout.bucket_offsets[r] + s for r, s in zip(regions, starts, strict=True)]


def check_accumulated_nonfinite(backend, device: str, cases=None) -> None:
    """NaN and infinities are counted in either form and reach the total; overflow of a weight is not counted."""
    for case in nonfinite_cases() if cases is None else cases:
        tensors = case.make(device)
        size = sum(t.numel() for t in tensors)
        bad = torch.cat([~torch.isfinite(t) for t in tensors])
        for previous in (None, torch.zeros(size, device=device)):
            total = torch.zeros(size, device=device)
            got = backend.accumulate_(tensors, total, previous=previous)
            assert got[1] == bad.sum()
            assert not torch.isfinite(got[0])
            assert torch.equal(~torch.isfinite(total), bad)
            assert previous is None or torch.equal(~torch.isfinite(previous), bad)
    x, v = torch.full((5000,), 1e35, device=device), torch.full((5000,), 1e-40, device=device)
    v[1234:] = 1.0
    for previous in (None, torch.zeros(5000, device=device)):
        total = torch.zeros(5000, device=device)
        got = backend.accumulate_(x, total, second_moments=v, previous=previous)
        assert got[1] == 0
        assert torch.isinf(total[:1234]).all()
        assert torch.isfinite(total[1234:]).all()
        if previous is None:
            expected = reference.accumulate_(x.double(), torch.zeros(5000, device=device), second_moments=v.double())
            torch.testing.assert_close(got[0], expected[0], rtol=1e-6, atol=0)
    holes = poisoned(values(5000, device=device), [3, 4999], math.nan)
    got = backend.accumulate_(holes, torch.zeros(5000, device=device), second_moments=v, previous=torch.zeros_like(v))
    assert got[1] == 2


def check_contributions_of_a_running_sum(backend, device: str) -> None:
    """Differences of a running sum add up to it, and their squares are those of what was added to it."""
    running, previous, total = (torch.zeros(6001, device=device) for _ in range(3))
    layout = SketchLayout((1000, 5001), 1)
    into = torch.zeros(2, dtype=torch.float64, device=device)
    squares = 0.0
    for seed in range(4):
        part = (values(6001, seed=seed, device=device) * 64).round() / 64  # few digits: every sum is exact
        running += part
        backend.accumulate_(
            [running[1000:], running[:1000]],
            total,
            layout=layout,
            regions=[1, 0],
            previous=previous,
            scale=0.5,
            into=into,
        )
        squares += float(part.double().square().sum())
        assert torch.equal(previous, running)
        assert torch.equal(total, running / 2)
    assert into.tolist() == [squares, 0.0]


def check_accumulate_errors(backend, device: str) -> None:
    """What is refused, by name, before anything is written."""
    x, total = values(10, device=device), torch.zeros(10, device=device)
    layout = SketchLayout((10,), 1)
    for error, message, arguments, options in (
        (TypeError, "total must be a float32 tensor, got torch.float64", (x, total.double()), {}),
        (TypeError, "total must be a float32 tensor, got list", (x, [0.0]), {}),
        (ValueError, "total must be contiguous and 1-D", (x, total.view(2, 5)), {}),
        (ValueError, "previous has 9 elements, total 10", (x, total), {"previous": total[:9]}),
        (TypeError, "previous must be a float32 tensor", (x, total), {"previous": total.half()}),
        (ValueError, "total has 10 elements, 5 are needed", (x[:5], total), {}),
        (ValueError, "total has 10 elements, 11 are needed", (x, total), {"layout": SketchLayout((11,), 1)}),
        (ValueError, "need a layout", (x, total), {"regions": [0]}),
        (ValueError, "covers elements 3 to 13 of region 0", (x, total), {"layout": layout, "starts": [3]}),
        (ValueError, "layout has 2 rows a slab", (x, total), {"layout": SketchLayout((10,), 2)}),
        (
            ValueError,
            r"tensors\[0\] and tensors\[2\] share elements",
            ([x[:5], x[:0], x[:5]], total),
            {"layout": layout, "regions": [0, 0, 0], "starts": [4, 4, 0]},
        ),
        (TypeError, "into must be a torch.float64 tensor", (x, total), {"into": torch.zeros(2, device=device)}),
        (ValueError, "second_moments has 2 tensors", (x, total), {"second_moments": [x, x]}),
        (ValueError, "scale must be a 0-dim", (x, total), {"scale": torch.ones(2, device=device)}),
        (TypeError, r"tensors\[0\] must be floating point", (x.int(), total), {}),
        (ValueError, "total on meta", (x, total.to("meta")), {}),
    ):
        with pytest.raises(error, match=message):
            backend.accumulate_(*arguments, **options)
    assert not total.any()
    assert backend.accumulate_([], total[:0]).tolist() == [0.0, 0.0]
    assert backend.accumulate_([x[:0]], total[:0], per_tensor=True).tolist() == [[0.0, 0.0]]


def absorbed_lists(device: str) -> dict[str, tuple[list[Tensor], SketchLayout, list[int] | None, list[Tensor] | None]]:
    """Lists that fill their regions: dtypes, strides, short and long slabs, lanes that no cell divides, weights."""
    numels = (3000, 70, 1025, 1, 5000)
    found = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        tensors = [values(n, dtype=dtype, device=device, seed=n) for n in numels]
        found[str(dtype)] = tensors, SketchLayout(numels, 3, seed=1), None, None
    mixed = [values(n, dtype=d, device=device, seed=n) for n, d in zip(numels, (*DTYPES, torch.float32), strict=True)]
    layout = SketchLayout((5, *reversed(numels), 900), 2, seed=2, lanes=96)
    found["mixed dtypes, some regions, narrow lanes"] = mixed[:4], layout, [5, 4, 3, 2], None
    found["one long slab"] = [values(400_000, device=device)], SketchLayout((400_000,), 391), None, None
    found["weighted"] = mixed, SketchLayout(numels, 2), None, second_moments(mixed)
    strided = [values(40, 50, device=device).t(), values(2000, device=device)[::2], values(9, device=device)]
    found["strided, lossless"] = strided, SketchLayout((2000, 1000, 9), 1), None, None
    found["nothing"] = [], SketchLayout((2000,), 2), [], None
    found["empty tensors"] = [values(0, device=device), values(40, device=device)], SketchLayout((0, 40), 2), None, None
    turned = [values(40, device=device), values(0, device=device)]
    found["an empty tensor after its neighbour"] = turned, SketchLayout((0, 40), 2), [1, 0], None
    return found


def check_absorb_sketch(backend, device: str, names: list[str] | None = None) -> None:
    """Equal to the backend's own ``sketch``, absorbed in float64; what is not named stays, whatever it is."""
    for name, (tensors, layout, regions, seconds) in absorbed_lists(device).items():
        if names is not None and name not in names:
            continue
        options = {"layout": layout, "regions": regions, "second_moments": seconds}
        named = torch.zeros(layout.size, dtype=torch.bool, device=device)
        cells = torch.zeros(2 + layout.cells, dtype=torch.float64, device=device)
        for region in range(len(tensors)) if regions is None else regions:
            begin = layout.bucket_offsets[region]
            named[begin : begin + layout.region_size(layout.numels[region])] = True
        start = values(layout.size, seed=1, device=device).masked_fill(~named, math.nan)
        before = values(layout.size, seed=2, device=device).masked_fill(~named, math.nan)
        for scale in (0.37, torch.tensor(-1.5, device=device)):
            now, previous, total = before.clone(), before.clone(), start.clone()
            moments = backend.sketch(tensors, now, **options)
            got = backend.absorb_sketch_(tensors, previous, total, scale, **options)
            assert torch.equal(previous[named], now[named]), name
            assert torch.isnan(previous[~named]).all()
            assert torch.isnan(total[~named]).all()
            delta = float(scale) * (now.double() - before.double())
            exact = start.double() + delta
            bound = (1 + 1e-6) * U32 * exact.abs() + 2.0**-46 * delta.abs() + SMALLEST[torch.float32]
            assert ((total.double() - exact).abs() <= bound)[named].all(), name
            expected = cells.clone()
            expected[:2] = moments
            for region in range(len(tensors)) if regions is None else regions:
                for k in range(layout.region_size(layout.numels[region])):
                    cell = layout.cell_offsets[region] + k // layout.lanes * layout.cells_of_slab
                    if k % layout.lanes % 128 == 0:
                        first, size = layout.bucket_offsets[region], layout.region_size(layout.numels[region])
                        begin = first + k
                        end = min(begin + min(128, layout.lanes - k % layout.lanes), first + size)
                        expected[2 + cell + k % layout.lanes // 128] = delta[begin:end].square().sum()
            torch.testing.assert_close(got, expected, rtol=1e-12, atol=0, msg=name)
            into = torch.rand_like(got)
            sums = into + got
            assert backend.absorb_sketch_(tensors, before.clone(), start.clone(), scale, into=into, **options) is into
            torch.testing.assert_close(into, sums, rtol=1e-13, atol=0)


def check_absorb_sketch_errors(backend, device: str) -> None:
    """What is refused, by name, before anything is written; and non-finite elements are counted."""
    layout = SketchLayout((3000, 7), 2)
    x, y = values(3000, device=device), values(7, device=device)
    vectors = torch.zeros(2, layout.size, device=device)
    for error, message, arguments, options in (
        (TypeError, "previous must be a float32 tensor", ([x, y], vectors[0].double(), vectors[1], 1.0), {}),
        (TypeError, "total must be a float32 tensor", ([x, y], vectors[0], vectors[1].double(), 1.0), {}),
        (ValueError, "total has 5 elements, previous", ([x, y], vectors[0], vectors[1, :5], 1.0), {}),
        (ValueError, "the layout needs", ([x, y], vectors[0, :9], vectors[1, :9], 1.0), {}),
        (ValueError, r"tensors\[1\] has 6 elements, its region 7", ([x, y[:6]], *vectors, 1.0), {}),
        (ValueError, "covers elements", ([y, x], *vectors, 1.0), {}),
        (ValueError, "regions must differ", ([y, y], *vectors, 1.0), {"regions": [1, 1]}),
        (ValueError, "has 2 regions", ([y], *vectors, 1.0), {"regions": [2]}),
        (TypeError, "scale must be a number", ([x, y], *vectors, "one"), {}),
        (TypeError, "into must be a torch.float64", ([x, y], *vectors, 1.0), {"into": torch.zeros(2, device=device)}),
        (ValueError, "second_moments has 1 tensors", ([x, y], *vectors, 1.0), {"second_moments": [x]}),
    ):
        with pytest.raises(error, match=message):
            backend.absorb_sketch_(*arguments, layout=layout, **options)
    assert not vectors.any()
    got = backend.absorb_sketch_([poisoned(x, [5, 2999], math.inf), y], *vectors, 1.0, layout=layout)
    assert got[1] == 2
    assert not torch.isfinite(got[2:].sum())

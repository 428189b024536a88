"""Inputs shared by the tests of every backend, and the error bounds that follow from how a backend accumulates.

A case is a name and a function of the device, so that collecting tests allocates nothing. Values are drawn on the host
with a fixed seed: every backend sees the same numbers.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from gac_kernels import reference
from gac_kernels.layout import SketchLayout

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
UNIT_ROUNDOFF = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
SMALLEST = {torch.float64: 2.0**-1074, torch.float32: 2.0**-149, torch.float16: 2.0**-24, torch.bfloat16: 2.0**-133}
"""Smallest positive number of a dtype: what rounding may lose below the normal range."""

SIZES = (0, 1, 2, 7, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 129, 255, 257, 1023, 1024, 1025, 2047, 2049, 4097, 32769)
"""Element counts around vectors, sign words, rows and small chunks."""


@functools.lru_cache(maxsize=256)
def _normal(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def values(*shape: int, dtype=torch.float32, device="cpu", seed: int = 0, scale: float = 1.0) -> Tensor:
    """Normal numbers, the same on every device."""
    return (_normal(shape, seed) * scale).to(dtype).to(device)


def misaligned(numel: int, dtype=torch.float32, device="cpu", seed: int = 0, by: int = 1) -> Tensor:
    """A contiguous view whose address is only element-aligned."""
    return values(numel + by, dtype=dtype, device=device, seed=seed)[by:]


def poisoned(tensor: Tensor, where: Iterable[int], value: float) -> Tensor:
    """A copy with ``value`` at some flat positions."""
    flat = tensor.reshape(-1).clone()
    for index in where:
        flat[index] = value
    return flat.view(tensor.shape)


@dataclass(frozen=True)
class Case:
    """A list of tensors: ``make(device)`` builds it."""

    name: str
    make: Callable[[str], list[Tensor]]

    def __str__(self) -> str:
        return self.name


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def strided_tensors(device: str, dtype=torch.float32, values=values) -> dict[str, Tensor]:
    """One tensor for each kind of stride pattern, its numbers drawn by ``values``."""
    block = values(6, 40, 96, dtype=dtype, device=device, seed=3)
    return {
        "columns": block[0, :, 5:70],
        "every_other_row": block[0, ::2],
        "inner_block": block[:, 3:30, 7:90],
        "collapsible": values(6, 40, 192, dtype=dtype, device=device, seed=4)[:, :, :130],
        "transposed": block[0].t(),
        "permuted": block.permute(2, 0, 1),
        "step_two": values(2001, dtype=dtype, device=device, seed=5)[::2],
        "expanded_scalar": values(1, dtype=dtype, device=device, seed=6).expand(37, 53),
        "expanded_rows": values(1, 1100, dtype=dtype, device=device, seed=7).expand(9, 1100),
        "expanded_columns": values(700, 1, dtype=dtype, device=device, seed=8).expand(700, 5),
        "channels_last": values(2, 8, 5, 7, dtype=dtype, device=device, seed=9).to(memory_format=torch.channels_last),
        "narrow_rows": block[0, :, :3],
        "overlapping_windows": values(500, dtype=dtype, device=device, seed=10).unfold(0, 64, 16),
    }


def tensor_cases() -> list[Case]:
    """Lists of tensors that every reduction has to get right."""
    cases = [Case("empty_list", lambda device: [])]
    for dtype in DTYPES:
        name = _dtype_name(dtype)
        cases += [
            Case(
                f"sizes_{name}",
                lambda device, d=dtype: [values(n, dtype=d, device=device, seed=n) for n in SIZES],
            ),
            Case(
                f"misaligned_{name}",
                lambda device, d=dtype: [misaligned(n, d, device, n, by) for n in (5, 64, 1025, 5000) for by in (1, 3)],
            ),
            Case(f"strided_{name}", lambda device, d=dtype: list(strided_tensors(device, d).values())),
            Case(f"beyond_a_chunk_{name}", lambda device, d=dtype: [values(300_001, dtype=d, device=device, seed=1)]),
        ]
    cases += [
        Case("zero_dim", lambda device: [values(dtype=d, device=device, seed=2) for d in DTYPES]),
        Case(
            "zero_size",
            lambda device: [values(0, 5, device=device), values(3, device=device), values(4, 0, 2, device=device)],
        ),
        Case(
            "mixed_dtypes",
            lambda device: [values(1000 + 17 * k, dtype=DTYPES[k % 4], device=device, seed=k) for k in range(12)],
        ),
        Case(
            "three_hundred",
            lambda device: [values(1 + 37 * k % 1500, dtype=DTYPES[k % 4], device=device, seed=k) for k in range(300)],
        ),
        Case("parameters", lambda device: [torch.nn.Parameter(values(30, 40, device=device))]),
    ]
    for scale in (1e25, 1e-25):
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            cases.append(
                Case(
                    f"around_{scale:g}_{_dtype_name(dtype)}",
                    lambda device, d=dtype, s=scale: [values(70_001, dtype=d, device=device, seed=5, scale=s)],
                )
            )
    cases.append(
        Case(
            "subnormal",
            lambda device: [
                values(3000, device=device, scale=1e-40),
                values(3000, dtype=torch.bfloat16, device=device, scale=1e-39),
                values(3000, dtype=torch.float16, device=device, scale=1e-6),
            ],
        )
    )
    return cases


def nonfinite_cases() -> list[Case]:
    """Lists with NaN and infinities at the first, the last and awkward places."""
    cases = []
    for dtype in DTYPES:
        for numel in (1, 33, 1025, 70_001):
            where = sorted({0, numel // 2, numel - 1, min(numel - 1, 31), min(numel - 1, 1024)})
            for value in (float("nan"), float("inf"), float("-inf")):
                cases.append(
                    Case(
                        f"{value}_{numel}_{_dtype_name(dtype)}",
                        lambda device, d=dtype, n=numel, w=tuple(where), v=value: [
                            values(n, dtype=d, device=device, seed=n),
                            poisoned(values(n, dtype=d, device=device, seed=n), w, v),
                        ],
                    )
                )
    return cases


def pair_cases() -> list[tuple[Case, Case]]:
    """Two lists of equal shapes: the tensor cases against other values, other dtypes and other strides."""

    def partner(case: Case) -> Case:
        def make(device: str) -> list[Tensor]:
            made = case.make(device)
            return [
                values(
                    *t.shape,
                    dtype=t.dtype,
                    device=device,
                    seed=77 + k,
                    scale=float(t.detach().double().abs().mean()) or 1.0,
                )
                if t.numel()
                else torch.empty_like(t)
                for k, t in enumerate(made)
            ]

        return Case(f"{case.name}_partner", make)

    def rotated(case: Case) -> Case:
        def make(device: str) -> list[Tensor]:
            return [t.to(DTYPES[k % 4]) for k, t in enumerate(partner(case).make(device))]

        return Case(f"{case.name}_other_dtypes", make)

    cases = tensor_cases()
    pairs = [(c, partner(c)) for c in cases]
    pairs += [(c, rotated(c)) for c in cases if c.name in ("mixed_dtypes", "strided_float32", "three_hundred")]
    return pairs


@dataclass(frozen=True)
class SketchCase:
    """Arguments of one ``sketch`` call: ``make(device)`` gives the tensors, the rest is as in the call."""

    name: str
    make: Callable[[str], list[Tensor]]
    layout: SketchLayout | None
    size: int
    """Buckets of ``out``."""
    regions: tuple[int, ...] | None = None
    starts: tuple[int, ...] | None = None
    options: dict = field(default_factory=dict)
    second: Callable[[list[Tensor]], list[Tensor]] | None = None
    """The second moments of the tensors that ``make`` built."""

    def __str__(self) -> str:
        return self.name


def _pieces(numel: int, cuts: tuple[int, ...], dtype=torch.float32) -> Callable[[str], list[Tensor]]:
    edges = (0, *cuts, numel)
    return lambda device: [
        values(numel, dtype=dtype, device=device, seed=11)[a:b] for a, b in itertools.pairwise(edges)
    ]


def _numels(case: Case) -> tuple[int, ...]:
    return tuple(t.numel() for t in case.make("cpu"))


def sketch_cases() -> list[SketchCase]:
    """Layouts (flat, lossless, one or many slabs, narrow lanes), pieces with any start, several pieces in a region."""
    cases = []
    for case in tensor_cases():
        numels = _numels(case)
        total = sum(numels)
        for rows in (1, 3) if total < 200_000 else (7,):
            layout = SketchLayout(numels, rows, seed=rows)
            cases.append(SketchCase(f"{case.name}_rows{rows}", case.make, layout, layout.size))
        if total:
            cases.append(SketchCase(f"{case.name}_flat", case.make, None, max(min(total, 1024), total // 50)))

    def add(name, make, layout, regions=None, starts=None, **options):
        cases.append(SketchCase(name, make, layout, layout.size, regions, starts, options))

    large = 1_500_000
    add("one_slab", _pieces(large, ()), SketchLayout((large,), 10_000, seed=5))
    add("two_long_slabs", _pieces(large, (), torch.bfloat16), SketchLayout((large,), 1000, seed=6))
    add("lossless", _pieces(200_003, ()), SketchLayout((200_003,), 1))
    for lanes in (32, 96, 1024, 4096):
        for rows in (1, 2, 65):
            layout = SketchLayout((50_021,), rows, seed=lanes, lanes=lanes)
            add(f"lanes{lanes}_rows{rows}", _pieces(50_021, ()), layout)
    cuts = (1, 30, 33, 1000, 1024, 1025, 5000, 5003, 70_000)
    starts = (0, *cuts)
    layout = SketchLayout((90_001,), 9, seed=3)
    add("pieces", _pieces(90_001, cuts), layout, (0,) * 10, starts)
    backwards = _pieces(90_001, cuts)
    add("pieces_backwards", lambda device: backwards(device)[::-1], layout, (0,) * 10, starts[::-1])
    add(
        "same_place_twice",
        lambda device: [values(3000, device=device, seed=1), values(3000, device=device, seed=2)],
        SketchLayout((4000,), 2),
        (0, 0),
        (500, 500),
    )
    add(
        "some_regions",
        lambda device: [values(1500, device=device), values(70, dtype=torch.bfloat16, device=device)],
        SketchLayout((10, 2000, 33, 100, 0), 2),
        (1, 3),
        (17, 30),
    )
    huge = 2**40 + 12345
    add(
        "far_start",
        lambda device: [values(5000, device=device), values(3000, device=device, seed=1)],
        SketchLayout((huge, 2**36 + 7), 2**25),
        (0, 1),
        (2**40 + 4321, 2**32 - 1500),
    )
    layout = SketchLayout((5000, 3000), 2, seed=2**40 + 3)
    tensors = lambda device: [values(5000, device=device), values(3000, device=device, seed=1)]
    add("accumulate", tensors, layout, accumulate=True)
    add("scaled", tensors, layout, scale=0.37)
    add("scaled_accumulate", tensors, layout, scale=-1e-3, accumulate=True)
    return cases


def second_moments(tensors: list[Tensor], dtypes=DTYPES, scale: float = 1.0) -> list[Tensor]:
    """A second moment for each tensor: its dtype the next of ``dtypes``, one element in seven 0."""
    made = []
    for k, tensor in enumerate(tensors):
        second = values(*tensor.shape, seed=500 + k).square() * scale
        second.view(-1)[::7] = 0.0
        made.append(second.to(dtypes[k % len(dtypes)]).to(tensor.device))
    return made


def weighted(tensors: list[Tensor], seconds: list[Tensor], eps: float = 1e-8) -> list[Tensor]:
    """``x / (sqrt(v) + eps)`` in float64, 0 where ``v`` is 0."""
    pairs = [(x.detach().double().reshape(-1), v.double().reshape(-1)) for x, v in zip(tensors, seconds, strict=True)]
    return [torch.where(v == 0, 0.0, x / (v.sqrt() + eps)) for x, v in pairs]


def weighted_cases() -> list[SketchCase]:
    """Every pair of dtypes, addresses off by an element in either list, strides in either, pieces, options."""
    cases = []

    def add(name, make, second, rows=3, layout=None, regions=None, starts=None, **options):
        layout = layout or SketchLayout(tuple(t.numel() for t in make("cpu")), rows, seed=rows)
        cases.append(SketchCase(name, make, layout, layout.size, regions, starts, options, second))

    sizes = (0, 1, 31, 33, 1025, 5000)
    for a, b in itertools.product(DTYPES, DTYPES):
        make = lambda device, a=a: [values(n, dtype=a, device=device, seed=n) for n in sizes]
        add(f"{_dtype_name(a)}_by_{_dtype_name(b)}", make, lambda tensors, b=b: second_moments(tensors, (b,)))
    shift = lambda tensors: [torch.cat([v.view(-1)[:1], v.view(-1)])[1:] for v in tensors]
    for dtype in (torch.float32, torch.bfloat16):
        name = _dtype_name(dtype)
        aligned = lambda device, d=dtype: [values(9000, dtype=d, device=device)]
        moved = lambda device, d=dtype: [misaligned(9000, d, device)]
        plain = lambda tensors: second_moments(tensors, (torch.float32,))
        shifted = lambda tensors: shift(second_moments(tensors, (torch.float32,)))
        add(f"aligned_by_shifted_{name}", aligned, shifted)
        add(f"shifted_by_aligned_{name}", moved, plain)
        add(f"shifted_by_shifted_{name}", moved, shifted)
    strided = lambda device: list(strided_tensors(device).values())
    add("strided_by_contiguous", strided, second_moments)
    add(
        "contiguous_by_strided",
        lambda device: [t.contiguous() for t in strided(device)],
        lambda tensors: list(strided_tensors(tensors[0].device, values=lambda *a, **k: values(*a, **k).abs()).values()),
        eps=0.5,
    )
    add(
        "other_shapes",
        lambda device: [values(40, 50, device=device), values(6, device=device)],
        lambda tensors: [v.view(50, 40) if v.numel() > 6 else v.view(1, 6, 1) for v in second_moments(tensors)],
    )
    add(
        "three_hundred_weighted",
        lambda device: [values(1 + 37 * k % 1500, dtype=DTYPES[k % 4], device=device, seed=k) for k in range(300)],
        lambda tensors: second_moments(tensors, DTYPES[1:]),
    )
    for scale in (0.0, 1e-44, 1e-30, 1e30):  # all 0, subnormal, and weights that are large or small
        add(
            f"second_moments_around_{scale:g}",
            lambda device: [values(3000, device=device), values(3000, dtype=torch.bfloat16, device=device, seed=1)],
            lambda tensors, s=scale: second_moments(tensors, (torch.float32,), s),
        )
    add(
        "subnormal_by_subnormal_without_eps",
        lambda device: [values(3000, device=device, scale=1e-40)],
        lambda tensors: [second_moments(tensors, (torch.float32,), 1e-41)[0].clamp(min=2.0**-149)],
        eps=0.0,
    )
    add("long_slab", _pieces(700_000, ()), lambda tensors: second_moments(tensors, (torch.float32,)), 10_000)
    cuts = (1, 30, 1000, 1025, 5000)
    layout = SketchLayout((10, 9001), 2, seed=3)
    options = {"layout": layout, "regions": (1,) * 6, "starts": (0, *cuts)}
    add("weighted_pieces", _pieces(9001, cuts, torch.bfloat16), second_moments, **options)
    add("weighted_scaled", _pieces(9001, cuts), second_moments, scale=0.37, **options)
    add("weighted_accumulate", _pieces(9001, cuts), second_moments, scale=-0.1, accumulate=True, eps=0.25, **options)
    return cases


def bucket_mass(case: SketchCase, tensors: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Sum of magnitudes and number of elements that land in each bucket (float64): what a rounding bound needs."""
    numels = [t.numel() for t in tensors]
    layout, regions, starts = case.layout, case.regions, case.starts
    if layout is None:
        layout = SketchLayout.flat(sum(numels), case.size)
        regions, starts = [0] * len(numels), [sum(numels[:k]) for k in range(len(numels))]
    regions = regions if regions is not None else range(len(numels))
    starts = starts if starts is not None else [0] * len(numels)
    mass = torch.zeros(case.size, dtype=torch.float64)
    count = torch.zeros(case.size, dtype=torch.float64)
    for tensor, region, start in zip(tensors, regions, starts, strict=True):
        j = torch.arange(tensor.numel()) + start
        bucket = j // (layout.lanes * layout.rows_per_slab) * layout.lanes + j % layout.lanes
        bucket += layout.bucket_offsets[region]
        magnitude = tensor.detach().reshape(-1).double().abs().cpu()
        mass.index_add_(0, bucket, magnitude)
        count.index_add_(0, bucket, torch.ones_like(magnitude))
    return mass, count


def check_weighted_nonfinite(backend, device: str, places=(0, 31, 1024, 1499)) -> None:
    """NaN and infinity in either list, values beyond float32's range, and what is not counted."""
    nan, inf = math.nan, math.inf
    rows = {  # x, v: x / (sqrt(v) + eps)
        "nan over 1": (nan, 1.0),
        "inf over 1": (inf, 1.0),
        "1 over nan": (1.0, nan),
        "1 over a negative": (1.0, -1.0),
        "inf over inf": (inf, inf),
        "1 over inf is 0": (1.0, inf),
        "0 over 0 is 0": (0.0, 0.0),
        "nan over 0": (nan, 0.0),
        "inf over 0": (inf, 0.0),
        "-inf over -0": (-inf, -0.0),
    }
    for x_dtype, v_dtype in itertools.product((torch.float32, torch.bfloat16), (torch.float32, torch.float64)):
        for place in places:
            for name, (x_value, v_value) in rows.items():
                x = poisoned(values(1500, dtype=x_dtype, device=device), [place], x_value)
                v = poisoned(second_moments([x], (v_dtype,))[0], [place], v_value)
                layout = SketchLayout((1500,), 3)
                out, want = torch.zeros(layout.size, device=device), torch.zeros(layout.size, device=device)
                got = backend.sketch(x, out, layout=layout, second_moments=v)
                expected = reference.sketch(x, want, layout=layout, second_moments=v)
                assert got[1] == expected[1] == (0 if "is 0" in name else 1), name
                assert torch.equal(torch.isfinite(out), torch.isfinite(want)), name
                assert torch.isfinite(got[0]) == torch.isfinite(expected[0]), name


def check_weighted_overflow(backend, device: str) -> None:
    """Weighted values beyond float32 are infinite in a float32 bucket, but neither counted nor lost in the squares."""
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.full((5000,), 1e35, dtype=dtype, device=device)
        v = torch.full((5000,), 1e-40, device=device)
        v[1234:] = 1.0
        out = torch.zeros(5000, device=device)
        got = backend.sketch(x, out, second_moments=v)
        expected = reference.sketch(x, torch.zeros(5000, dtype=torch.float64, device=device), second_moments=v)
        assert got[1] == 0
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)
        assert torch.isinf(out[:1234]).all()
        assert torch.isfinite(out[1234:]).all()


def check_second_moments_of_zero(backend, device: str) -> None:
    """A finite element counts as 0 where ``v`` is 0, whatever its size and eps; the smallest ``v`` is not 0."""
    rounded = 16 * 2.0**-24  # a weighted element errs by at most 7 units in float32, its square by twice that
    for x_dtype, v_dtype in itertools.product((torch.float32, torch.float64), DTYPES):
        x = torch.full((1503,), 2.0**127, dtype=x_dtype, device=device)
        v = torch.ones(1503, dtype=v_dtype, device=device)
        v[::2], v[::4] = 0.0, -0.0
        for eps in (0.0, 1e-8):
            out = torch.full((1503,), math.nan, device=device)
            got = backend.sketch(x, out, second_moments=v, eps=eps)
            assert (out[::2] == 0).all()
            torch.testing.assert_close(out[1::2].abs(), x[1::2].float(), rtol=rounded, atol=0)
            want = torch.tensor([751 * 2.0**254, 0.0], dtype=torch.float64)
            torch.testing.assert_close(got.cpu(), want, rtol=rounded, atol=0)
    for dtype in DTYPES:
        smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        x = torch.full((1503,), 0.5 * math.sqrt(smallest), dtype=wide, device=device)
        out = torch.zeros(1503, device=device)
        backend.sketch(x, out, second_moments=torch.full_like(x, smallest, dtype=dtype), eps=0.0)
        torch.testing.assert_close(out.abs(), torch.full_like(out, 0.5), rtol=rounded, atol=0)


def moments_bound(tensors: list[Tensor], unit_roundoff: float, depth: int) -> float:
    """Error of a sum of squares whose every addend passes at most ``depth`` roundings: depth * u * sum x^2.

    (First order, with a factor 2 for the higher orders. Addends are non-negative, so the sum bounds their magnitudes.)
    """
    return 2.0 * depth * unit_roundoff * float(reference.moments(tensors)[0])


def check_added_moments(backend, device: str) -> None:
    """``into`` of ``sketch`` and ``absorb_``: several calls add to what was there what fresh results would hold."""
    tensors = [values(1500, device=device), values(70, dtype=torch.bfloat16, device=device, seed=1)]
    tensors.append(poisoned(values(33, device=device, seed=2), [3, 4], math.inf))
    layout = SketchLayout(tuple(t.numel() for t in tensors), 2)
    for per_tensor in (False, True):
        out = torch.full((layout.size,), math.nan, device=device)
        shape = (3, 2) if per_tensor else (2,)
        into = values(*shape, device=device, dtype=torch.float64).abs()
        expected = into.clone()
        options = {"layout": layout, "per_tensor": per_tensor}
        for count in (2, 3, 0, 1):
            given = tensors[:count] + [t[:0] for t in tensors[count:]]
            expected += backend.sketch(given, out.clone(), **options)
            assert backend.sketch(given, out, into=into, **options) is into
            torch.testing.assert_close(into, expected, rtol=8 * 2.0**-53, atol=0)
    assert into[2, 1] == expected[2, 1]
    for numel in (0, 1, 1025, 3000):
        cells = -(-numel // 1024)
        room = values(cells + 1, dtype=torch.float64, device=device).abs()
        behind = room[cells].clone()
        into, expected = room[:cells], room[:cells].clone()
        for seed in range(3):
            current = values(numel, device=device, seed=seed)
            totals, previous = ([values(numel, device=device, seed=9) for _ in range(2)] for _ in range(2))
            fresh = backend.absorb_(current, previous[0] if seed else None, totals[0], 0.3)
            assert backend.absorb_(current, previous[1] if seed else None, totals[1], 0.3, into=into) is into
            assert torch.equal(*totals)
            assert torch.equal(*previous)
            expected += fresh
            torch.testing.assert_close(into, expected, rtol=4 * 2.0**-53, atol=0)
        assert room[cells] == behind


def check_wrong_into(backend, device: str) -> None:
    """Whatever ``into`` must not be is refused by name before anything is written."""
    x, out = values(5, device=device), torch.zeros(5, device=device)
    wide = torch.zeros(2, 4, dtype=torch.float64, device=device)
    for error, wrong in (
        (TypeError, torch.zeros(2, device=device)),
        (TypeError, [0.0, 0.0]),
        (ValueError, torch.zeros(3, dtype=torch.float64, device=device)),
        (ValueError, torch.zeros(1, 2, dtype=torch.float64, device=device)),
        (ValueError, wide[0, ::2]),
        (ValueError, torch.zeros(2, dtype=torch.float64, device="meta")),
    ):
        with pytest.raises(error, match="into"):
            backend.sketch(x, out, into=wrong)
        with pytest.raises(error, match="into"):
            backend.absorb_(torch.ones(1025, device=device), None, torch.ones(1025, device=device), 1.0, into=wrong)
    with pytest.raises(ValueError, match=r"into must be contiguous with shape \(1, 2\)"):
        backend.sketch(x, out, per_tensor=True, into=wide[0, :2])
    assert not out.any()

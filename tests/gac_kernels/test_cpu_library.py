"""The C++ library against the float64 reference, on every instruction set this CPU has.

Error bounds. All sums of products are float64: an addend passes at most ``DEPTH`` roundings on its way (vector
accumulator over a chunk of 16,384 elements, lanes, chunks, tensors), so a sum errs by at most ``DEPTH * 2**-53`` of the
sum of magnitudes, and the reference by no more. Products of 16-bit elements are exact in float32 and are added there
16 at a time, which adds ``16 * 2**-24``. Sketch buckets are float32 sums of at most 256 rows, emptied into
float64: a bucket of ``n`` elements errs by at most ``min(n, 256) * 2**-24`` of its sum of magnitudes, plus one rounding
of the result; float64 input or output takes float64 lanes. Dividing an element by ``sqrt(v) + eps`` costs three
roundings of its size, in float32 or float64 as the lanes are. Mixing is rounded once to the output's type, after at
most four roundings of the terms' size in float32 (float64 for float64 output), where no fused instruction exists.
"""

import itertools
import math
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gac_kernels import cpu, reference
from gac_kernels.cpu import library as cpu_library
from gac_kernels.layout import SketchLayout
from gac_kernels.strides import overlaps_itself
from tests.gac_kernels.accumulation import (
    Errors,
    accumulate_cases,
    check_absorb_sketch,
    check_absorb_sketch_errors,
    check_accumulate,
    check_accumulate_errors,
    check_accumulated_nonfinite,
    check_contributions_of_a_running_sum,
)
from tests.gac_kernels.cases import (
    SMALLEST,
    UNIT_ROUNDOFF,
    SketchCase,
    bucket_mass,
    check_added_moments,
    check_second_moments_of_zero,
    check_weighted_nonfinite,
    check_weighted_overflow,
    check_wrong_into,
    misaligned,
    nonfinite_cases,
    pair_cases,
    poisoned,
    sketch_cases,
    strided_tensors,
    tensor_cases,
    values,
    weighted,
    weighted_cases,
)
from tests.gac_kernels.scaling import DRAWN, check_doubling, check_scaled, check_scaled_errors, check_scaled_nonfinite

if not cpu.available():
    pytest.skip(f"no CPU library: {cpu.status()['reason']}", allow_module_level=True)

CHUNK = 16_384
DEPTH = CHUNK / 8 + 1000  # additions in a lane of the narrowest float64 vector, then everything behind it
U64, U32 = 2.0**-53, 2.0**-24
LIBRARY = cpu_library.load()


def _available_isas() -> list[str]:
    found, best = [], LIBRARY.isa
    for isa in ("portable", "avx2", "avx512", "neon"):
        try:
            LIBRARY.select(isa)
            found.append(isa)
        except cpu_library.LibraryError:
            pass
    LIBRARY.select(best)
    return found


ISAS = _available_isas()


@pytest.fixture(params=ISAS)
def isa(request):
    """Runs the test on one instruction set."""
    best = LIBRARY.isa
    LIBRARY.select(request.param)
    yield request.param
    LIBRARY.select(best)


@pytest.fixture
def threads():
    """Sets torch's thread count and restores it."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal bit for bit."""
    view = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.view(view), b.view(view))


def assert_sums(got: torch.Tensor, expected: torch.Tensor, magnitudes: torch.Tensor, tensors, error=0.0) -> None:
    """Sums within the bound for the tensors' dtypes (``error``: that of their terms); the same ones are non-finite."""
    assert got.dtype == torch.float64
    assert got.shape == expected.shape
    finite = torch.isfinite(expected)
    assert torch.equal(finite, torch.isfinite(got))
    short = any(t.dtype in (torch.bfloat16, torch.float16) for t in tensors)
    bound = 2 * (DEPTH * U64 + 16 * U32 * short + error) * magnitudes + 1e-300
    assert ((got - expected).abs() <= bound)[finite].all(), (got, expected)


# ------------------------------------------------------------------------------------------------------ reductions


@pytest.mark.parametrize("case", [*tensor_cases(), *nonfinite_cases()], ids=str)
def test_moments(case, isa):
    tensors = case.make("cpu")
    for per_tensor in (False, True):
        expected = reference.moments(tensors, per_tensor=per_tensor)
        got = cpu.moments(tensors, per_tensor=per_tensor)
        assert_sums(got[..., 0], expected[..., 0], expected[..., 0], tensors)
        assert torch.equal(got[..., 1], expected[..., 1])
    for tensor in tensors[:3]:
        expected = reference.moments(tensor)
        got = cpu.moments(tensor)
        assert_sums(got[0], expected[0], expected[0], [tensor])
        assert got[1] == expected[1]


@pytest.mark.parametrize(("first", "second"), pair_cases(), ids=lambda c: c.name)
def test_pair_moments(first, second, isa):
    a, b = first.make("cpu"), second.make("cpu")
    for per_tensor in (False, True):
        expected = reference.pair_moments(a, b, per_tensor=per_tensor)
        got = cpu.pair_moments(a, b, per_tensor=per_tensor)
        magnitudes = expected.abs()
        magnitudes[..., 2] = (magnitudes[..., 0] + magnitudes[..., 1]) / 2  # bounds sum |a b|
        assert_sums(got, expected, magnitudes, a)


@pytest.mark.parametrize("dtype", list(UNIT_ROUNDOFF), ids=str)
def test_edges_of_chunks_and_of_what_one_thread_does(dtype, isa, threads):
    threads(1)
    for numel in [n + d for n in (CHUNK, 2 * CHUNK, 49_152) for d in (-1, 0, 1)]:
        x, y = values(numel, dtype=dtype, seed=1), values(numel, dtype=dtype, seed=2)
        expected = reference.pair_moments(x, y)
        magnitudes = torch.stack([expected[0], expected[1], (expected[0] + expected[1]) / 2])
        assert_sums(cpu.pair_moments(x, y), expected, magnitudes, [x])
        assert same(cpu.pair_moments(x, y), cpu.pair_moments([x, x[:0]], [y, y[:0]]))
        assert_sums(cpu.moments(x)[0], expected[0], expected[0], [x])
        assert same(cpu.moments(x), cpu.moments([x, x[:0]]))
        mixed = x.clone()
        assert_sums(cpu.mix_(mixed, y, 0.3, moments=True), expected, magnitudes, [x])
        exact = 0.3 * x.double() + 0.7 * y.double()
        assert ((mixed.double() - exact).abs() <= _mix_bound(x, y, 0.3, exact)).all()
        layout = SketchLayout((numel,), 4)
        out = torch.empty(layout.size)
        assert_sums(cpu.sketch(x, out, layout=layout)[0], expected[0], expected[0], [x])
    alone = cpu.moments(x), cpu.pair_moments(x, y), mixed
    threads(2)
    mixed = x.clone()
    cpu.mix_(mixed, y, 0.3)
    assert all(same(a, b) for a, b in zip(alone, (cpu.moments(x), cpu.pair_moments(x, y), mixed), strict=True))


def test_lists_of_one_dtype_beside_lists_of_several(isa):
    a = [values(100, seed=k) for k in range(3)]
    b = [values(100, seed=9, dtype=d) for d in (torch.bfloat16, torch.float64, torch.float32)]
    for x, y in ((a, b), (b, a), (a, [t.bfloat16() for t in a])):
        expected = reference.pair_moments(x, y)
        magnitudes = torch.stack([expected[0], expected[1], (expected[0] + expected[1]) / 2])
        assert_sums(cpu.pair_moments(x, y), expected, magnitudes, x)


def test_every_place_of_a_nonfinite_element(isa):
    for dtype in UNIT_ROUNDOFF:
        x = values(161, dtype=dtype)
        for place in range(161):
            for bad in (math.nan, math.inf, -math.inf):
                got = cpu.moments(poisoned(x, [place], bad))
                assert got[1] == 1
                assert not torch.isfinite(got[0])


def test_bfloat16_out_of_the_range_of_float32_products(isa):
    """Products that overflow or vanish in float32 must not: the run is done again in float64."""
    for scale in (1e30, 1e-30, 1e-38, 0.0):
        x, y = (values(20_000, dtype=torch.bfloat16, seed=s, scale=scale) for s in (1, 2))
        expected = reference.pair_moments(x, y)
        for got in (cpu.pair_moments(x, y), cpu.mix_(x.clone(), y, 0.5, moments=True)):
            assert torch.allclose(got, expected, rtol=2 * DEPTH * U64, atol=2 * DEPTH * U64 * float(expected[0]))
        assert torch.allclose(cpu.moments(x)[0], expected[0], rtol=2 * DEPTH * U64, atol=0)
        layout = SketchLayout((20_000,), 5)
        squares = cpu.sketch(x, torch.empty(layout.size), layout=layout)[0]
        assert torch.allclose(squares, expected[0], rtol=2 * DEPTH * U64, atol=0)
    # One huge element among ordinary ones, and ordinary ones among tiny ones.
    x = values(20_000, dtype=torch.bfloat16)
    x[777] = 1e25
    assert torch.allclose(cpu.moments(x), reference.moments(x), rtol=2 * DEPTH * U64)
    x = values(20_000, dtype=torch.bfloat16, scale=1e-30)
    x[777] = 1e-3
    assert torch.allclose(cpu.moments(x), reference.moments(x), rtol=32 * U32)


def test_squares_beyond_float64_are_not_counted_as_nonfinite(isa):
    assert cpu.moments(torch.full((100,), 1e200, dtype=torch.float64)).tolist() == [math.inf, 0.0]


def test_single_tensors_and_tuples_equal_lists(isa):
    x, y = values(3000, seed=1), values(3000, seed=2)
    assert same(cpu.moments(x), cpu.moments([x]))
    assert same(cpu.moments((x,)), cpu.moments([x]))
    assert same(cpu.moments(iter([x])), cpu.moments([x]))
    assert same(cpu.pair_moments(x, y), cpu.pair_moments((x,), [y]))


def test_strided_without_copies_where_rows_are_contiguous():
    from gac_kernels.cpu.tables import strided_table

    tensors = strided_tensors("cpu")
    runs = {name: strided_table([t]).kept[0].data_ptr() == t.data_ptr() for name, t in tensors.items()}
    assert [n for n, kept in runs.items() if kept] == [
        "columns",
        "every_other_row",
        "collapsible",
        "expanded_rows",
        "overlapping_windows",
    ]


# ------------------------------------------------------------------------------------------------------------- mix


def _mix_bound(a, b, mu, exact):
    u = UNIT_ROUNDOFF[a.dtype]
    inner, least = (U64, 2.0**-1074) if a.dtype == torch.float64 else (U32, 2.0**-149)
    magnitude = (mu * a.double()).abs() + ((1 - mu) * b.double()).abs()
    terms = 4 * inner * magnitude + 8 * least / 2  # each of 8 roundings may be one of a subnormal
    return u * exact.abs() + (1 + 2 * u) * terms + SMALLEST[a.dtype] / 2


def _own_memory(tensors):
    """Copies with the same strides, each in memory of its own, without those that overlap themselves."""
    return [
        torch.empty_strided(t.shape, t.stride(), dtype=t.dtype).copy_(t.detach())
        for t in tensors
        if not overlaps_itself(t)
    ]


@pytest.mark.parametrize(("first", "second"), pair_cases(), ids=lambda c: c.name)
def test_mix(first, second, isa):
    inputs, b = first.make("cpu"), [t.detach() for t in second.make("cpu")]
    b = [y for x, y in zip(inputs, b, strict=True) if not overlaps_itself(x)]
    for mu in (0.3, torch.tensor(0.85)):
        a, before, again = (_own_memory(inputs) for _ in range(3))
        expected = reference.pair_moments(a, b)
        moments = cpu.mix_(a, b, mu, moments=True)
        magnitudes = expected.abs()
        magnitudes[2] = (magnitudes[0] + magnitudes[1]) / 2
        assert_sums(moments, expected, magnitudes, a)
        for x, old, y in zip(a, before, b, strict=True):
            weight = float(mu)
            exact = weight * old.double() + (1 - weight) * y.double()
            assert ((x.double() - exact).abs() <= _mix_bound(old, y, weight, exact)).all()
        assert cpu.mix_(again, b, mu) is None
        assert all(same(x.contiguous(), y.contiguous()) for x, y in zip(a, again, strict=True))


def test_mix_leaves_the_gaps_of_a_strided_tensor_alone(isa):
    for name in ("columns", "inner_block", "step_two", "narrow_rows", "transposed"):
        base = values(6, 40, 96, seed=3)
        views = {
            "columns": lambda t: t[0, :, 5:70],
            "inner_block": lambda t: t[:, 3:30, 7:90],
            "step_two": lambda t: t[0, 0, ::2],
            "narrow_rows": lambda t: t[0, :, :3],
            "transposed": lambda t: t[0].t(),
        }
        view = views[name]
        expected = base.clone()
        other = values(*view(base).shape, seed=4)
        version = base._version
        cpu.mix_(view(base), other, 0.5)  # a half: products are exact, and the result is the rounded sum
        reference.mix_(view(expected), other, 0.5)
        assert base._version > version
        assert same(base, expected), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mix_rounds_to_nearest_even(dtype, isa):
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    bits = bits[torch.isfinite(bits)]
    kept = bits.clone()
    cpu.mix_(kept, torch.zeros_like(kept), 1.0)
    assert torch.equal(kept, bits)
    # Half-way between two neighbours: (x + next(x)) / 2 is exact in float32.
    x = bits[(bits > 0) & (bits < 1e4)]
    ordered = x.float().sort().values.to(dtype)
    a, b = ordered[:-1].clone(), ordered[1:].clone()
    expected = ((a.float() + b.float()) / 2).to(dtype)
    cpu.mix_(a, b, 0.5)
    assert torch.equal(a, expected)


def test_mix_with_nan_and_overflow(isa):
    for dtype in UNIT_ROUNDOFF:
        a = poisoned(values(100, dtype=dtype), [3, 50], math.nan)
        cpu.mix_(a, values(100, dtype=dtype, seed=1), 0.5)
        assert torch.isnan(a).nonzero().flatten().tolist() == [3, 50]
    a = torch.full((40,), 60000.0, dtype=torch.float16)
    cpu.mix_(a, torch.full_like(a, -60000.0), 2.0)
    assert torch.isinf(a).all()


# ---------------------------------------------------------------------------------------------------------- sketch


def call(case: SketchCase, backend, tensors, out, **more):
    options = case.options | more
    if case.second:
        options["second_moments"] = case.second(tensors)
    return backend.sketch(tensors, out, layout=case.layout, regions=case.regions, starts=case.starts, **options)


def assert_sketch(case: SketchCase, dtype: torch.dtype, **more) -> None:
    tensors = case.make("cpu")
    accumulate = case.options.get("accumulate", False)
    start = values(case.size, dtype=dtype, seed=99) if accumulate else torch.full((case.size,), math.nan, dtype=dtype)
    named = range(len(tensors)) if case.regions is None else case.regions
    expected, got = start.double(), start.clone()
    expected_moments = call(case, reference, tensors, expected, per_tensor=True)
    got_moments = call(case, cpu, tensors, got, per_tensor=True)
    wide = dtype == torch.float64 or any(t.dtype == torch.float64 for t in tensors)
    error = 0.0
    if case.second:
        seconds = case.second(tensors)
        wide = wide or any(v.dtype == torch.float64 for v in seconds)
        tensors = weighted(tensors, seconds, case.options.get("eps", 1e-8))
        error = 3.01 * (U64 if wide else U32)
    assert_sums(got_moments[:, 0], expected_moments[:, 0], expected_moments[:, 0], tensors, error)
    assert torch.equal(got_moments[:, 1], expected_moments[:, 1])
    mass, count = bucket_mass(case, tensors)
    scale = abs(case.options.get("scale", 1.0))
    unit = U64 if wide else U32
    rows = count if wide else count.clamp(max=256)
    vanished = 0.0 if wide or not case.second else SMALLEST[torch.float32] * count
    bound = (
        scale * ((rows * unit + (count + 64) * U64 + error) * mass + vanished)
        + 2 * UNIT_ROUNDOFF[dtype] * expected.abs()
        + SMALLEST[dtype]
    )
    touched = torch.ones(case.size, dtype=torch.bool)
    if case.layout is not None and not accumulate:
        touched[:] = False
        for region in named:
            begin = case.layout.bucket_offsets[region]
            touched[begin : begin + case.layout.region_size(case.layout.numels[region])] = True
    error = (got.double() - expected).abs()
    assert (error <= bound)[touched].all(), float((error / bound)[touched].max())
    assert same(got[~touched], start[~touched])


@pytest.mark.parametrize("case", sketch_cases() + weighted_cases(), ids=str)
def test_sketch(case, isa):
    assert_sketch(case, torch.float32)


@pytest.mark.parametrize("case", [c for c in sketch_cases() + weighted_cases() if c.size < 50_000], ids=str)
def test_sketch_into_float64(case):
    assert_sketch(case, torch.float64)


def test_instruction_sets_agree_bit_for_bit_on_sketches():
    best = LIBRARY.isa
    for case in sketch_cases() + weighted_cases():
        tensors = case.make("cpu")
        outs = []
        for isa in ISAS:
            LIBRARY.select(isa)
            outs.append(torch.zeros(case.size))
            call(case, cpu, tensors, outs[-1])
        assert all(same(outs[0], out) for out in outs[1:]), case
    LIBRARY.select(best)


def test_results_can_be_added_up():
    check_added_moments(cpu, "cpu")
    check_wrong_into(cpu, "cpu")
    out, into = torch.zeros(5), torch.zeros(2, dtype=torch.float64)
    version = into._version
    cpu.sketch(values(5), out, into=into)
    assert into._version > version


def test_sketch_with_nonfinite_elements(isa):
    layout = SketchLayout((5000, 100), 2)
    tensors = [poisoned(values(5000), [0, 31, 1024, 4999], math.nan), poisoned(values(100), [50], math.inf)]
    out, expected = torch.zeros(layout.size), torch.zeros(layout.size)
    got = cpu.sketch(tensors, out, layout=layout, per_tensor=True)
    reference.sketch(tensors, expected, layout=layout)
    assert got[:, 1].tolist() == [4, 1]
    assert torch.equal(torch.isnan(out), torch.isnan(expected))
    assert torch.equal(torch.isinf(out), torch.isinf(expected))


def test_weighted_sketch_with_nonfinite_elements(isa):
    check_weighted_nonfinite(cpu, "cpu")
    check_weighted_overflow(cpu, "cpu")
    check_second_moments_of_zero(cpu, "cpu")


def test_sign_words_beyond_2_to_the_32(isa):
    """The key changes at word 2**32; 96 lanes put the change inside a batch of words."""
    for lanes in (1024, 96):
        numel = 2**37 + 10_000
        layout = SketchLayout((numel,), 2**31, lanes=lanes, seed=4)
        x = values(9000)
        out = torch.zeros(layout.size)
        expected = torch.zeros(layout.size, dtype=torch.float64)
        cpu.sketch(x, out, layout=layout, regions=[0], starts=[2**37 - 4000])
        reference.sketch(x, expected, layout=layout, regions=[0], starts=[2**37 - 4000])
        count = math.ceil(9000 / lanes)
        assert (out - expected).abs().max() <= count * U32 * count * float(x.abs().max())
        assert out.abs().sum() > 0


def test_pieces_in_any_cut_give_the_same_sketch(isa):
    x = values(20_000)
    layout = SketchLayout((20_000,), 4)
    whole = torch.empty(layout.size)
    cpu.sketch(x, whole, layout=layout)
    parts = torch.zeros(layout.size)
    for begin in range(0, 20_000, 4096):  # whole slabs: the order of additions is the same
        piece = x[begin : begin + 4096]
        cpu.sketch(piece, parts, layout=layout, regions=[0], starts=[begin], accumulate=True)
    assert same(whole, parts)


def test_list_of_regions_is_checked_on_every_call():
    layout = SketchLayout((100, 200), 1)
    out = torch.zeros(300)
    cpu.sketch([values(100)], out, layout=layout, regions=[0])
    with pytest.raises(ValueError, match="covers elements 0 to 101 of region 0"):
        cpu.sketch([values(101)], out, layout=layout, regions=[0])
    for regions, starts in (([2], None), ([-1], None), ([0], [-1]), ([0, 1], None), ([0], [1, 2])):
        with pytest.raises(ValueError, match=r"regions|starts|covers"):
            cpu.sketch([values(100)], out, layout=layout, regions=regions, starts=starts)
    with pytest.raises(ValueError, match="out has 299"):
        cpu.sketch([values(100)], out[1:], layout=layout, regions=[0])
    with pytest.raises(TypeError, match="out must be float32 or float64"):
        cpu.sketch([values(100)], out.bfloat16(), layout=layout, regions=[0])


# ------------------------------------------------------------------------------------------------------ accumulate

ACCUMULATED = Errors(weight=3.01, sums=2 * DEPTH * U64)


@pytest.mark.parametrize("case", accumulate_cases(), ids=str)
def test_accumulate(case, isa):
    check_accumulate(cpu, case, "cpu", ACCUMULATED)


def test_accumulate_beside_the_usual(isa):
    check_accumulated_nonfinite(cpu, "cpu")
    check_contributions_of_a_running_sum(cpu, "cpu")
    check_accumulate_errors(cpu, "cpu")
    total, previous, into = torch.zeros(5), torch.zeros(5), torch.zeros(2, dtype=torch.float64)
    versions = [t._version for t in (total, previous, into)]
    cpu.accumulate_(values(5), total, previous=previous, into=into)
    assert all(t._version > before for t, before in zip((total, previous, into), versions, strict=True))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_eight_bit_floats_give_the_bits_of_widened_ones(dtype, isa, threads, monkeypatch):
    """Every code; lists with others, misaligned, with holes and longer than chunks; no tensor is widened as a whole."""
    codes = torch.arange(256, dtype=torch.uint8).view(dtype)
    total = torch.zeros(256)
    assert cpu.accumulate_(codes, total)[1] == (~torch.isfinite(codes.float())).sum()
    torch.testing.assert_close(total, codes.float(), rtol=0, atol=0, equal_nan=True)
    tensors = [values(n + 1, seed=n).to(dtype)[n % 2 :][:n] for n in (70_001, 5, 2048, 300)]
    tensors += [values(50, 70, seed=3).to(dtype)[:, 3:60], values(300, seed=4), values(300, seed=5).bfloat16()]
    wide = [t.float() if t.dtype is dtype else t for t in tensors]
    seconds = [t.float().abs().to(dtype) for t in tensors]
    layout = SketchLayout(tuple(t.numel() for t in tensors), 3)
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "float", lambda tensor: pytest.fail("a widened copy"))
        for count in (1, 2):
            threads(count)
            assert same(cpu.moments(tensors, per_tensor=True), cpu.moments(wide, per_tensor=True))
            assert same(cpu.moments(tensors[0]), cpu.moments(wide[0]))
        for out_dtype in (torch.float32, torch.float64):
            outs = torch.zeros(2, layout.size, dtype=out_dtype)
            found = [cpu.sketch(x, out, layout=layout) for x, out in zip((tensors, wide), outs, strict=True)]
            assert same(*found)
            assert same(*outs)
            weigh = lambda x, out: cpu.sketch(x, out, layout=layout, second_moments=seconds, eps=0.5)
            found = [weigh(x, out) for x, out in zip((tensors, wide), outs, strict=True)]
            assert same(*outs)
            torch.testing.assert_close(*found, rtol=1e-13, atol=0)  # blocks of 1,024 are added up, then the blocks
        for previous in (None, torch.ones(2, sum(layout.numels))):
            totals = torch.ones(2, sum(layout.numels))
            options = [{"scale": 0.37, "previous": None if previous is None else previous[k]} for k in range(2)]
            found = [cpu.accumulate_(x, totals[k], **options[k]) for k, x in enumerate((tensors, wide))]
            assert same(*found)
            assert same(*totals)
    widened = [v.float() for v in seconds]
    found = [cpu.accumulate_(wide, totals[k], second_moments=v) for k, v in enumerate((seconds, widened))]
    assert same(*totals)
    torch.testing.assert_close(*found, rtol=1e-13, atol=0)


def test_eight_bit_floats_in_pairs_are_widened_first():
    x, y = values(300).to(torch.float8_e5m2), values(300, seed=1).to(torch.float8_e4m3fn)
    for a, b in ((x, y), (x, y.float()), ([x, y], [x, y])):
        wide = [[t.float() for t in (z if isinstance(z, list) else [z])] for z in (a, b)]
        assert same(cpu.pair_moments(a, b), cpu.pair_moments(*wide))
    target = x.clone()
    cpu.mix_(target, x, 0.25)
    assert torch.equal(target.float(), x.float())
    weight = torch.tensor(0.25).to(torch.float8_e5m2)
    mixed = torch.ones(300)
    cpu.mix_(mixed, torch.zeros(300), weight)
    assert (mixed == 0.25).all()


def test_scales_of_blocks(isa):
    check_scaled(cpu, "cpu", 2 * DEPTH * U64 + 32 * U32)  # the second for bfloat16 beside
    check_scaled_nonfinite(cpu, "cpu")
    check_scaled_errors(cpu, "cpu")


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(**DRAWN)
def test_one_more_in_every_scale_doubles(isa, numel, rows, dtype):
    check_doubling(cpu, "cpu", numel, rows, dtype)


def test_absorb_sketch(isa):
    check_absorb_sketch(cpu, "cpu")
    check_absorb_sketch_errors(cpu, "cpu")


# ---------------------------------------------------------------------------------------- tokens and running sketch


MASKS = [torch.bool, torch.uint8, torch.int32, torch.int64, torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", list(UNIT_ROUNDOFF))
def test_token_moments(dtype, isa):
    for rows, length in ((0, 5), (1, 1), (3, 0), (5, 7), (4, 511), (3, 513), (2, 1500)):
        logprobs = (-values(rows, length, seed=1).abs() * 3).to(dtype)
        expert = torch.arange(rows) % 3 == 1
        for k, mask_dtype in enumerate(MASKS):
            mask = (values(rows, length, seed=k) > 0).to(mask_dtype)
            for advantages in (values(rows, dtype=dtype), values(rows, length, dtype=dtype), values(rows, 1)):
                poison = torch.where(mask != 0, 0.0, math.nan).to(dtype)
                assert_tokens(logprobs + poison, advantages, mask, expert)


def assert_tokens(logprobs, advantages, mask, expert):
    expected = reference.token_moments(logprobs, advantages, mask, expert)
    got = cpu.token_moments(logprobs, advantages, mask, expert)
    # exp errs by 2 ulp here and in torch; with p (1 - p) the error of p counts once. Sums of magnitudes bound the rest.
    a = advantages if advantages.dim() == 2 else advantages[:, None]
    clean = [torch.where(mask != 0, t.double(), 0.0).abs() for t in (logprobs, a.expand(logprobs.shape))]
    p = torch.where(mask != 0, clean[0].neg().exp(), 0.0)
    m = (mask != 0).double()
    sizes = torch.stack([m, clean[0], clean[1], clean[1] ** 2, p, p, p * clean[1]], -1).sum(1)
    assert got.shape == expected.shape
    assert ((got - expected).abs() <= (logprobs.shape[1] + 16) * U64 * sizes).all()


def test_token_moments_of_extreme_logprobs(isa):
    logp = torch.tensor([[0.0, -0.0, -1e-300, -1e-12, -708.5, -740.0, -745.0, -800.0, -math.inf, 5.0]]).double()
    ones = torch.ones_like(logp, dtype=torch.bool)
    expert = torch.tensor([False])
    for k in range(logp.shape[1]):
        one = logp[:, k : k + 1].contiguous()
        got = cpu.token_moments(one, torch.ones(1, 1), ones[:, :1], expert)
        expected = reference.token_moments(one, torch.ones(1, 1), ones[:, :1], expert)
        assert torch.allclose(got, expected, rtol=8 * U64, atol=8 * U64 * math.exp(min(0.0, one.item()))), one
    nan = cpu.token_moments(torch.tensor([[math.nan]]), torch.ones(1), ones[:, :1], expert)
    assert torch.isnan(nan[0, 4])


def test_token_moments_of_strided_inputs(isa):
    logprobs = -values(40, 9).abs().t()
    mask = (values(40, 9, seed=1) > 0).t()
    expert = torch.tensor([True, False] * 9)[::2]
    advantages = values(9, 80)[:, ::2]
    assert_tokens(logprobs, advantages, mask, expert)
    zero = torch.full((9, 40), -0.0)
    assert cpu.token_moments(logprobs, advantages, zero, expert).abs().sum() == 0


def test_absorb(isa, threads):
    for m in (0, 1, 7, 1023, 1024, 1025, 5000, 150_001):
        for first in (True, False):
            current, total = values(m, seed=1), values(m, seed=2)
            previous = None if first else values(m, seed=3)
            expected_total, expected_previous = total.clone(), None if first else previous.clone()
            expected = reference.absorb_(current, expected_previous, expected_total, 0.3)
            results = []
            for count in (1, 2):
                threads(count)
                mine, last = total.clone(), None if first else previous.clone()
                cells = cpu.absorb_(current, last, mine, torch.tensor(0.3, dtype=torch.float64))
                assert torch.allclose(cells, expected, rtol=1024 * U64, atol=0)
                assert same(mine, expected_total)
                assert first or same(last, current)
                results.append((cells, mine))
            assert same(results[0][0], results[1][0])


# ---------------------------------------------------------------------------------------------------- determinism


def _everything(large):
    tensors = [*large, *(misaligned(n, seed=n) for n in (5, 1025, 40_000)), values(300, 500)[:, 3:400]]
    other = [values(*t.shape, dtype=t.dtype, seed=50) for t in tensors]
    results = [cpu.moments(tensors, per_tensor=True), cpu.pair_moments(tensors, other)]
    numels = [t.numel() for t in tensors]
    for rows in (1, 40, 2000):
        layout = SketchLayout(tuple(numels), rows)
        out = torch.zeros(layout.size)
        results += [cpu.sketch(tensors, out, layout=layout, per_tensor=True), out]
        out = torch.zeros(layout.size)
        results += [cpu.sketch(tensors, out, layout=layout, second_moments=[t.square() for t in other]), out]
    mixed = [t.clone() for t in tensors]
    results += [cpu.mix_(mixed, other, 0.4, moments=True), *[m.contiguous() for m in mixed]]
    packed, rows = values(700, 499), values(700, 600)[:, 1:500]
    for mu in (0.4, torch.tensor(0.4)):
        whole, together = packed.clone(), packed.clone()
        cpu.mix_([*mixed, whole], [*other, rows], mu)
        cpu.mix_(together, rows, mu, moments=True)
        assert same(whole, together)
        results += [whole, *[m.contiguous() for m in mixed]]
        before, total = torch.zeros(2, layout.size)
        results += [cpu.absorb_sketch_(tensors, before, total, 0.3, layout=layout), before, total]
    for previous in (None, torch.zeros(sum(numels))):
        total = torch.zeros(sum(numels))
        results += [cpu.accumulate_(tensors, total, previous=previous, scale=0.3, per_tensor=True), total]
        results.append(cpu.accumulate_(tensors, total, previous=previous, second_moments=[t.square() for t in other]))
    logprobs = -values(64, 300).abs()
    results.append(cpu.token_moments(logprobs, values(64), torch.ones(64, 300), torch.arange(64) % 2 == 0))
    return results


def test_results_do_not_depend_on_threads_or_repetition(isa, threads):
    large = [values(2_500_000), values(700_003, dtype=torch.bfloat16)]
    threads(1)
    first = _everything(large)
    for count in (1, 2, 3, 7):
        threads(count)
        assert all(same(a, b) for a, b in zip(first, _everything(large), strict=True)), count


def test_own_pool_gives_the_same(threads):
    large = [values(1_000_000)]
    threads(2)
    expected = _everything(large)
    LIBRARY.call.gac_prefer_pool(1)
    try:
        assert LIBRARY.threading == "pool"
        for count in (2, 5, 3):
            threads(count)
            assert all(same(a, b) for a, b in zip(expected, _everything(large), strict=True))
    finally:
        LIBRARY.call.gac_prefer_pool(0)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_works_in_a_forked_child():
    """A child has none of its parent's threads: waiting for them would hang."""
    x = values(1_000_000)
    expected = cpu.moments(x)  # starts the threads of this process
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = 0 if same(LIBRARY_moments(x), expected) else 2
        finally:
            os._exit(code)
    _, state = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(state) == 0


def LIBRARY_moments(x):
    """``moments`` with two threads asked of C itself: torch's own parallel calls are not safe after a fork."""
    out = torch.empty(2, dtype=torch.float64)
    assert LIBRARY.call.gac_moments_one(x.data_ptr(), x.numel() << 16 | 2 << 4, out.data_ptr()) == 0
    return out


def test_many_python_threads_at_once():
    from concurrent.futures import ThreadPoolExecutor

    x = values(500_000)
    layout = SketchLayout((500_000,), 20)

    def one(_):
        out = torch.empty(layout.size)
        return cpu.sketch(x, out, layout=layout), out

    expected = one(0)
    with ThreadPoolExecutor(4) as pool:
        for got in pool.map(one, range(24)):
            assert same(got[0], expected[0])
            assert same(got[1], expected[1])


# ------------------------------------------------------------------------------------------------------ properties

QUIET = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
layouts = st.builds(
    lambda numel, rows, seed, lanes: SketchLayout((numel,), rows, seed, lanes),
    st.integers(0, 9000),
    st.integers(1, 300),
    st.integers(0, 2**33),
    st.sampled_from((32, 64, 96, 1024)),
)


@QUIET
@given(layouts, st.integers(0, 1000), st.floats(-3, 3), st.sampled_from(ISAS))
def test_sketch_is_linear(layout, seed, factor, isa):
    LIBRARY.select(isa)
    numel = layout.numels[0]
    x, y = values(numel, seed=seed, dtype=torch.float64), values(numel, seed=seed + 1, dtype=torch.float64)
    out = torch.empty(3, layout.size, dtype=torch.float64)
    for row, tensor in zip(out, (x, y, factor * x + y), strict=True):
        cpu.sketch(tensor, row, layout=layout)
    assert torch.allclose(out[2], factor * out[0] + out[1], rtol=0, atol=1e-12 * (1 + numel))


@QUIET
@given(layouts, st.integers(0, 1000), st.floats(-3, 3), st.sampled_from(ISAS))
def test_weighted_sketch_is_linear(layout, seed, factor, isa):
    LIBRARY.select(isa)
    numel = layout.numels[0]
    x, y, v = (values(numel, seed=seed + k, dtype=torch.float64) for k in range(3))
    v = v.square()
    out = torch.empty(3, layout.size, dtype=torch.float64)
    for row, tensor in zip(out, (x, y, factor * x + y), strict=True):
        cpu.sketch(tensor, row, layout=layout, second_moments=v, eps=0.1)  # no element grows beyond 10 |x|
    assert torch.allclose(out[2], factor * out[0] + out[1], rtol=0, atol=1e-11 * (1 + numel))


@QUIET
@given(st.lists(st.integers(0, 9000), max_size=6), st.floats(-3, 3), st.booleans(), st.sampled_from(ISAS))
def test_accumulating_pieces_is_accumulating_the_whole(cuts, scale, running, isa):
    LIBRARY.select(isa)
    x, start = values(9000, seed=3), values(9000, seed=4)
    edges = [0, *sorted(cuts), 9000]
    layout = SketchLayout((9000,), 1)
    whole, cut, before = start.clone(), start.clone(), [values(9000, seed=5) if running else None for _ in range(2)]
    moments = cpu.accumulate_(x, whole, previous=before[0], scale=scale)
    pieces = [x[a:b] for a, b in itertools.pairwise(edges)]
    options = {"layout": layout, "regions": [0] * len(pieces), "starts": edges[:-1]}
    parts = cpu.accumulate_(pieces, cut, previous=before[1], scale=scale, **options)
    # fused or not, a float64 sum is rounded to float32: to either neighbour where it lies half-way between them
    assert torch.allclose(whole, cut, rtol=2 * U32, atol=2 * SMALLEST[torch.float32])
    assert not running or same(*before)
    assert torch.allclose(moments, parts, rtol=2 * DEPTH * U64, atol=0)


@QUIET
@given(layouts, st.lists(st.integers(0, 9000), max_size=6), st.sampled_from(ISAS))
def test_cuts_change_nothing(layout, cuts, isa):
    LIBRARY.select(isa)
    numel = layout.numels[0]
    x = values(numel, seed=3)
    edges = [0, *sorted(min(c, numel) for c in cuts), numel]
    pieces = [x[a:b] for a, b in itertools.pairwise(edges)]
    whole, cut = torch.full((2, layout.size), math.nan)
    total = cpu.sketch(x, whole, layout=layout)
    parts = cpu.sketch(pieces, cut, layout=layout, regions=[0] * len(pieces), starts=edges[:-1])
    assert same(whole, cut)  # every lane adds the same numbers in the same order
    assert torch.allclose(total, parts, rtol=2 * DEPTH * U64, atol=0)


@QUIET
@given(st.integers(0, 70_000), st.integers(0, 100), st.floats(0, 1), st.sampled_from(ISAS))
def test_mix_agrees_with_pair_moments(numel, seed, mu, isa):
    """|mu a + (1 - mu) b|^2 expanded, and Cauchy-Schwarz."""
    LIBRARY.select(isa)
    a, b = values(numel, seed=seed, dtype=torch.float64), values(numel, seed=seed + 1, dtype=torch.float64)
    aa, bb, ab = cpu.pair_moments(a, b).tolist()
    assert ab * ab <= aa * bb * (1 + 4 * DEPTH * U64)
    cpu.mix_(a, b, mu)
    expected = mu**2 * aa + (1 - mu) ** 2 * bb + 2 * mu * (1 - mu) * ab
    assert math.isclose(cpu.moments(a)[0].item(), expected, rel_tol=1e-11, abs_tol=1e-11)


# --------------------------------------------------------------------------------------------------- library, errors


def test_errors_are_those_of_the_reference():
    x = values(10)
    calls = [
        lambda m: m.moments(3),
        lambda m: m.moments([x, "y"]),
        lambda m: m.moments([x, torch.arange(3)]),
        lambda m: m.moments(torch.arange(3)),
        lambda m: m.moments(x.to_sparse()),
        lambda m: m.pair_moments(x, x[:5]),
        lambda m: m.pair_moments([x], [x, x]),
        lambda m: m.pair_moments([x, x[:6].view(2, 3)], [x, x[:6].view(3, 2)]),
        lambda m: m.pair_moments([x, x[0]], [x, x[:1]]),
        lambda m: m.mix_([x, x.view(2, 5)], [x, x], 0.5),
        lambda m: m.mix_(x, x, torch.ones((), dtype=torch.int64)),
        lambda m: m.mix_(x[:1].expand(5), x[:5], 0.5),
        lambda m: m.mix_(x, x, "half"),
        lambda m: m.mix_(x, x, torch.ones(2)),
        lambda m: m.sketch(x, torch.zeros(3)),
        lambda m: m.sketch(x, torch.zeros(10), regions=[0]),
        lambda m: m.sketch(x, torch.zeros(10), scale=True),
        lambda m: m.sketch(x, torch.zeros(10), second_moments=[]),
        lambda m: m.sketch([x], torch.zeros(10), second_moments=[x[:9]]),
        lambda m: m.sketch(x, torch.zeros(10), second_moments=3),
        lambda m: m.sketch(x, torch.zeros(10), second_moments=torch.arange(10)),
        lambda m: m.sketch(x, torch.zeros(10), second_moments=x.to("meta")),
        lambda m: m.sketch(x, torch.zeros(10), second_moments=x, eps=-1.0),
        lambda m: m.sketch(x, torch.zeros(10), second_moments=x, eps=1e-40),
        lambda m: m.sketch(x, torch.zeros(10), second_moments=x, eps=math.nan),
        lambda m: m.sketch(x, torch.zeros(10), second_moments=x, eps=torch.ones(())),
        lambda m: m.accumulate_(x, torch.zeros(9)),
        lambda m: m.accumulate_(x, torch.zeros(10), previous=x.double()),
        lambda m: m.token_moments(x, x, x, x),
        lambda m: m.absorb_(x, None, x[:3], 1.0),
    ]
    for k, attempt in enumerate(calls):
        with pytest.raises((TypeError, ValueError)) as expected:
            attempt(reference)
        with pytest.raises((TypeError, ValueError)) as got:
            attempt(cpu)
        assert (got.type, str(got.value)) == (expected.type, str(expected.value)), k


def test_tensors_elsewhere_or_without_memory_are_refused():
    with pytest.raises(ValueError, match="CPU tensors"):
        cpu.moments(torch.empty(3, device="meta"))
    from torch.testing._internal.two_tensor import TwoTensor

    with pytest.raises(TypeError, match="no memory of its own"):
        cpu.moments([TwoTensor(values(5), values(5))])
    with pytest.raises(TypeError, match="no memory of its own"):
        cpu.sketch([values(5)], torch.zeros(5), second_moments=[TwoTensor(values(5), values(5))])


def test_unusual_values_are_read_rightly():
    negated = torch.randn(6, dtype=torch.complex64, generator=torch.Generator().manual_seed(1)).conj().imag
    assert negated.is_neg()
    ones = torch.ones(1)
    for x in (negated, negated[:1], negated[2]):
        assert torch.allclose(cpu.moments([x]), reference.moments([x]), rtol=1e-15)
        assert cpu.pair_moments(x, torch.ones_like(x))[2] == reference.pair_moments(x, torch.ones_like(x))[2]
    target = torch.zeros(1, dtype=torch.complex64)
    lazily = target.conj().imag
    cpu.mix_(lazily, ones, 0.5)
    assert lazily.item() == 0.5
    eight = values(300).to(torch.float8_e4m3fn)
    assert torch.allclose(cpu.moments(eight), reference.moments(eight.float()), rtol=1e-14)


def test_versions_of_written_tensors_move():
    a, out = values(100), torch.zeros(100)
    versions = a._version, out._version
    cpu.mix_(a, values(100), 0.5)
    cpu.sketch(a, out)
    assert (a._version, out._version) > versions
    with torch.inference_mode():
        cpu.mix_(torch.zeros(5), torch.zeros(5), 0.5)


def test_status_and_forced_instruction_set():
    status = cpu.status()
    assert status["available"] is True
    assert set(status["isa"].values()) == {LIBRARY.isa}
    program = (
        "from gac_kernels import cpu; import gac_kernels.cpu.library as l\n"
        "print(l._loaded is None and l._failure is None, cpu.available(), cpu.status())"
    )
    forced = _python(program, GAC_CPU_ISA="portable")
    assert forced.startswith("True True"), "importing loads nothing"
    assert "'moments': 'portable'" in forced
    missing = _python(program, GAC_CPU_ISA="sve9")
    assert missing.startswith("True False")
    assert "sve9" in missing


def _python(program: str, **environment: str) -> str:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    ).stdout

"""The fallback without a compiled library, against the oracle."""

import math

import pytest
import torch

import gac_kernels
from gac_kernels import SketchLayout, backends, fallback, ops, reference
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
    bucket_mass,
    check_added_moments,
    check_second_moments_of_zero,
    check_weighted_nonfinite,
    check_weighted_overflow,
    check_wrong_into,
    nonfinite_cases,
    pair_cases,
    poisoned,
    sketch_cases,
    tensor_cases,
    values,
    weighted,
    weighted_cases,
)
from tests.gac_kernels.scaling import check_scaled, check_scaled_errors, check_scaled_nonfinite

U32, U64 = 2.0**-24, 2.0**-53
BLOCK = fallback._BLOCK
# Rounding errors of a block's n products and sums, each within a unit roundoff and of mean 0, add up beyond
# 8 sqrt(n) units with a probability below 2 exp(-32) (Higham and Mary 2019, theorem 2.4).
DOT = 8 * math.sqrt(BLOCK) * U32


def assert_sums(got, expected, magnitudes):
    assert got.dtype == torch.float64
    assert got.shape == expected.shape
    finite = torch.isfinite(expected)
    assert torch.equal(finite, torch.isfinite(got))
    assert ((got - expected).abs() <= DOT * magnitudes + 1e-300)[finite].all(), (got, expected)


@pytest.mark.parametrize("case", [*tensor_cases(), *nonfinite_cases()], ids=str)
def test_moments(case):
    tensors = case.make("cpu")
    for per_tensor in (False, True):
        expected = reference.moments(tensors, per_tensor=per_tensor)
        got = fallback.moments(tensors, per_tensor=per_tensor)
        assert_sums(got[..., 0], expected[..., 0], expected[..., 0])
        assert torch.equal(got[..., 1], expected[..., 1])


@pytest.mark.parametrize(("first", "second"), pair_cases(), ids=lambda c: c.name)
def test_pairs(first, second):
    a, b = first.make("cpu"), second.make("cpu")
    for per_tensor in (False, True):
        expected = reference.pair_moments(a, b, per_tensor=per_tensor)
        magnitudes = expected.abs()
        magnitudes[..., 2] = (magnitudes[..., 0] + magnitudes[..., 1]) / 2  # bounds sum |a b|
        assert_sums(fallback.pair_moments(a, b, per_tensor=per_tensor), expected, magnitudes)
    pairs = [(x.detach().clone(), y.detach()) for x, y in zip(a, b, strict=True) if not overlaps_itself(x)]
    a, b = [x for x, _ in pairs], [y for _, y in pairs]
    before, expected = [x.clone() for x in a], reference.pair_moments(a, b)
    got = fallback.mix_(a, b, torch.tensor(0.3), moments=True)
    magnitudes = expected.abs()
    magnitudes[2] = (magnitudes[0] + magnitudes[1]) / 2
    assert_sums(got, expected, magnitudes)
    weight = float(torch.tensor(0.3))
    for mixed, x, y in zip(a, before, b, strict=True):
        unit = U64 if torch.float64 in (x.dtype, y.dtype) else U32
        exact = weight * x.double() + (1 - weight) * y.double()
        terms = weight * x.double().abs() + (1 - weight) * y.double().abs()
        bound = 4 * unit * terms + 2 * UNIT_ROUNDOFF[x.dtype] * exact.abs() + SMALLEST[x.dtype]
        assert ((mixed.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e-18, 1.0, 1e18, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_squares_beyond_the_range_of_float32(dtype, scale):
    x, y = (values(3 * BLOCK + 7, dtype=dtype, seed=seed, scale=scale) for seed in (1, 2))
    expected = reference.pair_moments(x, y)
    magnitudes = torch.stack([expected[0], expected[1], (expected[0] + expected[1]) / 2])
    assert_sums(fallback.pair_moments(x, y), expected, magnitudes)
    assert_sums(fallback.moments(x), reference.moments(x), reference.moments(x))


def test_nonfinite_elements_at_the_edges_of_blocks():
    for place in (0, BLOCK - 1, BLOCK, 2 * BLOCK):
        for bad in (math.nan, math.inf, -math.inf):
            x = poisoned(values(2 * BLOCK + 1), [place], bad)
            got = fallback.moments(x)
            assert got[1] == 1
            assert not math.isfinite(got[0])
            assert not math.isfinite(fallback.pair_moments(x, x)[2])


@pytest.mark.parametrize("case", sketch_cases() + weighted_cases(), ids=str)
def test_sketch(case):
    tensors, options = case.make("cpu"), dict(case.options)
    seconds = case.second(tensors) if case.second else None
    options |= {"layout": case.layout, "regions": case.regions, "starts": case.starts, "second_moments": seconds}
    start = values(case.size, seed=99) if options.get("accumulate") else torch.full((case.size,), math.nan)
    want, got = start.double(), start.clone()
    expected = reference.sketch(tensors, want, per_tensor=True, **options)
    found = fallback.sketch(tensors, got, per_tensor=True, **options)
    taken = tensors if seconds is None else weighted(tensors, seconds, options.get("eps", 1e-8))
    mass, count = bucket_mass(case, taken)
    error = (count + 64) * U64 * abs(options.get("scale", 1.0)) * mass
    error += 2 * UNIT_ROUNDOFF[torch.float32] * want.abs() + SMALLEST[torch.float32]
    written = ~torch.isnan(want)
    assert ((got.double() - want).abs() <= error)[written].all()
    assert torch.isnan(got[~written]).all()
    assert_sums(found[:, 0], expected[:, 0], expected[:, 0])
    assert torch.equal(found[:, 1], expected[:, 1])


@pytest.mark.parametrize("rows", [1, 2, 3, 50, 64, 65, 1000])
@pytest.mark.parametrize("start", [0, 5, 1024, 100_003])
def test_pieces_that_begin_anywhere(rows, start):
    layout = SketchLayout((300_000,), rows, seed=3)
    x = values(170_001, dtype=torch.float64)
    got, want = torch.zeros(2, layout.size, dtype=torch.float64)
    for out, backend in ((got, fallback), (want, reference)):
        backend.sketch(x, out, layout=layout, regions=[0], starts=[start])
    assert torch.allclose(got, want, rtol=0, atol=rows * U64 * 40)


def test_the_same_errors_and_edges():
    check_weighted_nonfinite(fallback, "cpu")
    check_weighted_overflow(fallback, "cpu")
    check_second_moments_of_zero(fallback, "cpu")
    check_added_moments(fallback, "cpu")
    check_wrong_into(fallback, "cpu")
    assert fallback.moments([]).tolist() == [0, 0]
    assert fallback.pair_moments([], [], per_tensor=True).shape == (0, 3)
    with pytest.raises(TypeError, match="floating point"):
        fallback.moments(torch.ones(3, dtype=torch.int64))


@pytest.mark.parametrize("case", accumulate_cases(), ids=str)
def test_accumulate(case):
    # In float64, except plain float32, where scale, product and sum are rounded.
    check_accumulate(fallback, case, "cpu", Errors(weight=4.0, wide=True, sums=DOT, added=2.0))


def test_accumulate_beside_the_usual():
    check_accumulated_nonfinite(fallback, "cpu")
    check_contributions_of_a_running_sum(fallback, "cpu")
    check_accumulate_errors(fallback, "cpu")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_eight_bit_floats_are_widened_block_by_block(dtype):
    x = values(BLOCK + 100).to(dtype)
    wide, layout, outs = x.float(), SketchLayout((BLOCK + 100,), 3), torch.zeros(2, BLOCK + 100)
    assert torch.equal(fallback.moments(x), fallback.moments(wide))
    sums = [fallback.accumulate_(t, out, scale=0.5) for t, out in zip((x, wide), outs, strict=True)]
    assert torch.equal(*sums)
    assert torch.equal(*outs)
    outs = torch.zeros(2, layout.size)
    sums = [fallback.sketch(t, out, layout=layout) for t, out in zip((x, wide), outs, strict=True)]
    assert torch.equal(*sums)
    assert torch.equal(*outs)


def test_scales_of_blocks():
    check_scaled(fallback, "cpu", DOT)  # of float32 tensors; scaled ones are float64
    check_scaled_nonfinite(fallback, "cpu")
    check_scaled_errors(fallback, "cpu")


def test_absorb_sketch():
    check_absorb_sketch(fallback, "cpu")
    check_absorb_sketch_errors(fallback, "cpu")


def test_a_machine_without_a_compiled_library_gets_it(monkeypatch):
    from gac_kernels import cpu

    monkeypatch.setattr(cpu, "available", lambda: False)
    monkeypatch.setattr(cpu, "status", lambda: {"available": False, "reason": "no library"})
    monkeypatch.delenv(backends.VARIABLE, raising=False)
    backends.forget()
    ops._cpu_mix.cache_clear()
    try:
        assert backends.select("cpu")[:2] == (fallback, "fallback")
        assert "no library" in gac_kernels.backend_status()["cpu"]
        x = values(3000)
        assert torch.equal(gac_kernels.moments(x), fallback.moments(x))
    finally:
        monkeypatch.undo()
        backends.forget()
        ops._cpu_mix.cache_clear()

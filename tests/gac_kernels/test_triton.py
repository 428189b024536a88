"""The Triton kernels against the float64 reference: on the GPU, or on CPU tensors in Triton's interpreter.

Error bounds (u = 2**-24, or 2**-53 where float64 is involved; see ``kernels.py`` for who adds what):

- Sums of squares and products. In ``moments`` and the pair kernels a strand (one of 1,024 lanes) adds at most
  65,536 / 1,024 = 64 terms, in ``sketch`` at most 256 rows; a term is rounded when it is formed and at each addition.
  From there on everything is float64. A sum therefore errs by at most (n + 1) u times the sum of magnitudes, n = 64 or
  256, doubled for higher orders, and squares below float32's range may vanish: 2**-149 for each element.
- Float64 sums in later stages pass fewer than 200 roundings: lanes (10), chunks (1,024 strands, 10), tensors.
- A bucket of n elements errs by min(n, 256) u times its sum of magnitudes, and is rounded once to ``out``'s dtype.
- A weighted element errs by 7 u: the square root 2 u (PTX: ``sqrt.approx``), eps no more, their sum u, the division 4 u
  (``div.full``); in the interpreter and in float64 by less. What is subnormal may be off by the smallest number.
- ``mix_``: weight, product and sum are each rounded once in the compute type, then the result to ``a``'s dtype.
"""

import copy
import dataclasses
import itertools
import math
import warnings

import pytest
import torch
import triton.language as tl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gac_kernels import cpu, reference
from gac_kernels import triton as operations
from gac_kernels.layout import SketchLayout
from gac_kernels.strides import overlaps_itself
from gac_kernels.triton import accumulating, config, grouping, kernels, launch, readable, sketching, tables
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
    DTYPES,
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
    second_moments,
    sketch_cases,
    strided_tensors,
    tensor_cases,
    values,
    weighted,
    weighted_cases,
)
from tests.gac_kernels.scaling import DRAWN, check_doubling, check_scaled, check_scaled_errors, check_scaled_nonfinite

INTERPRETED = launch.interpreted()
DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = [] if INTERPRETED else [pytest.mark.gpu]

U32, U64 = 2.0**-24, 2.0**-53
STRAND, ROWS, LATER, WEIGHT = 64, 256, 200, 7
PROPERTY = settings(
    max_examples=5 if INTERPRETED else 60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.fixture(autouse=True)
def _quiet_interpreter():
    with warnings.catch_warnings():  # numpy reports the overflow that the tests provoke
        warnings.simplefilter("ignore", RuntimeWarning)
        yield


def some(cases, names: str):
    """On a GPU all cases; in the interpreter, which is thousands of times slower, those named."""
    if not INTERPRETED:
        return cases
    wanted = names.split()
    by_name = {}
    for case in cases:
        by_name.setdefault(str(case[0] if isinstance(case, tuple) else case), []).append(case)
    return [case for name in wanted for case in by_name[name]]


def unit(*tensors: torch.Tensor) -> float:
    return U64 if any(t.dtype == torch.float64 for t in tensors) else U32


def sum_bound(magnitude: float, tensors, terms: int) -> float:
    u = max((unit(t) for t in tensors), default=U32)
    vanished = 0.0 if u == U64 else 2.0**-149 * sum(t.numel() for t in tensors)
    return 2 * ((terms + 1) * u + LATER * U64) * magnitude + vanished


def assert_moments(got, tensors, terms, units=()):
    """``units``: of each tensor, where the terms of its sum were rounded more coarsely than its dtype tells."""
    expected = reference.moments(tensors, per_tensor=True).to(got.device)  # of an empty list they are on the CPU
    assert got.dtype == torch.float64
    assert got.shape == expected.shape
    assert torch.equal(got[:, 1], expected[:, 1])
    for k, (row, want, tensor) in enumerate(zip(got[:, 0].tolist(), expected[:, 0].tolist(), tensors, strict=True)):
        if math.isfinite(want):
            coarser = (
                2 * (WEIGHT + terms + 1) * units[k] * want + tensor.numel() * SMALLEST[torch.float32] if units else 0
            )
            assert abs(row - want) <= sum_bound(want, [tensor], terms) + coarser
        else:
            assert not math.isfinite(row)


MOMENT_CASES = some(
    tensor_cases(),
    "empty_list sizes_float32 sizes_bfloat16 sizes_float16 sizes_float64 misaligned_bfloat16 misaligned_float64 "
    "strided_bfloat16 beyond_a_chunk_float32 beyond_a_chunk_bfloat16 zero_dim zero_size mixed_dtypes "
    "parameters around_1e+25_float32 around_1e+25_bfloat16 around_1e-25_float32 around_1e-25_float64 subnormal",
)
NONFINITE = some(
    nonfinite_cases(),
    "nan_1_float32 inf_33_bfloat16 -inf_1025_float16 nan_1025_float64 inf_1025_float32 nan_1025_bfloat16 "
    "-inf_70001_bfloat16",
)


@pytest.mark.parametrize("case", MOMENT_CASES + NONFINITE, ids=str)
def test_moments(case):
    tensors = case.make(DEVICE)
    got = operations.moments(tensors, per_tensor=True)
    assert_moments(got, tensors, STRAND)
    total = operations.moments(tensors)
    want = got.sum(0)
    assert total.shape == (2,)
    if bool(torch.isfinite(want[0])):
        torch.testing.assert_close(total, want, rtol=LATER * U64, atol=0)
    else:
        assert total[1] == want[1]
        assert not bool(torch.isfinite(total[0]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_edges_of_vectors_steps_and_chunks(dtype, monkeypatch):
    step = config.for_device(torch.device(DEVICE)).unroll * launch.WIDTH
    monkeypatch.setattr(config, "CHUNK", 2 * step)
    sizes = [n + d for n in (launch.WIDTH, step, 2 * step, 4 * step) for d in (-1, 0, 1)]
    tensors = [values(n, dtype=dtype, device=DEVICE, seed=n) for n in sizes]
    tensors += [misaligned(n, dtype, DEVICE, n) for n in (step + 1, 2 * step + 3)]
    assert_moments(operations.moments(tensors, per_tensor=True), tensors, STRAND)
    check_pair(tensors[2:9], [t.flip(0) for t in tensors[2:9]])


def check_pair(a, b):
    got = operations.pair_moments(a, b, per_tensor=True)
    expected = reference.pair_moments(a, b, per_tensor=True)
    assert got.shape == expected.shape
    for k, (x, y) in enumerate(zip(a, b, strict=True)):
        products = (x.detach().double() * y.detach().double()).abs().sum().item()
        for column, magnitude in enumerate((expected[k, 0].item(), expected[k, 1].item(), products)):
            if math.isfinite(expected[k, column]):
                assert abs(got[k, column] - expected[k, column]) <= sum_bound(magnitude, [x, y], STRAND)
            else:
                assert not math.isfinite(got[k, column])
    total = operations.pair_moments(a, b)
    assert total.shape == (3,)
    if bool(torch.isfinite(got).all()):
        scale = got.abs().sum(0).max()
        assert ((total - got.sum(0)).abs() <= LATER * U64 * scale).all()


def check_mix(a, b, mu, moments):
    weight = float(mu)
    olds = [x.detach().clone() for x in a]
    expected = reference.pair_moments(olds, b)
    got = operations.mix_(a, b, mu, moments=moments)
    if not moments:
        assert got is None
    elif bool(torch.isfinite(got).all()):  # squares beyond float32's range are infinite here, as documented
        scale = expected[:2].sum().item()
        for column in range(3):
            assert abs(got[column] - expected[column]) <= sum_bound(scale, olds + list(b), STRAND)
    else:
        assert expected[:2].max() > 2.0**120
    for x, old, y in zip(a, olds, b, strict=True):
        u = unit(x, y)
        left, right = weight * old.double(), (1 - weight) * y.detach().double()
        exact = left + right
        compute = 3.1 * u * (left.abs() + right.abs())
        bound = compute + UNIT_ROUNDOFF[x.dtype] * (exact.abs() + compute) + SMALLEST[x.dtype] + SMALLEST[torch.float32]
        assert ((x.detach().double() - exact).abs() <= bound).all()


PAIRS = some(
    pair_cases(),
    "empty_list misaligned_bfloat16 strided_float16 beyond_a_chunk_bfloat16 zero_dim zero_size mixed_dtypes parameters "
    "around_1e+25_float32",
)


@pytest.mark.parametrize(("first", "second"), PAIRS, ids=lambda c: c.name)
def test_pair_moments(first, second):
    check_pair(first.make(DEVICE), second.make(DEVICE))


@pytest.mark.parametrize("moments", [False, True])
@pytest.mark.parametrize(("first", "second"), PAIRS, ids=lambda c: c.name)
def test_mix(first, second, moments):
    # The case's views share memory: give each its own, with the same strides.
    a = [t.clone() if overlaps_itself(t) else copy.deepcopy(t) for t in first.make(DEVICE)]
    mu = torch.tensor(0.3, device=DEVICE, dtype=torch.float64 if moments else torch.float32)
    check_mix(a, second.make(DEVICE), mu, moments)


def test_mix_takes_numbers_and_writes_through_views():
    base = values(9, 50, device=DEVICE)
    other = values(9, 50, device=DEVICE, seed=1)
    untouched = base.clone()
    check_mix([base[:, 5:30], base[:, 40:41]], [other[:, 5:30], other[:, 40:41]], 0.75, False)
    assert torch.equal(base[:, :5], untouched[:, :5])
    assert torch.equal(base[:, 30:40], untouched[:, 30:40])
    transposed = values(20, 30, device=DEVICE).t()
    check_mix([transposed], [values(30, 20, device=DEVICE, seed=1)], 1 / 3, False)


def test_mix_rounds_to_nearest_even():
    step = 2.0**-7  # the gap between bfloat16 numbers in [1, 2)
    a = torch.tensor([1.0, 1.0 + step, 1.0 + step], dtype=torch.bfloat16, device=DEVICE)
    b = torch.tensor([1.0 + step, 1.0 + 2 * step, 1.0], dtype=torch.bfloat16, device=DEVICE)
    operations.mix_(a, b, 0.5)
    assert a.tolist() == [1.0, 1.0 + 2 * step, 1.0]
    a = torch.tensor([math.nan, math.inf, 1.0], dtype=torch.bfloat16, device=DEVICE)
    operations.mix_(a, torch.ones_like(a), 0.5)
    assert math.isnan(a[0])
    assert a[1:].tolist() == [math.inf, 1.0]


def check_sketch(case: SketchCase):
    tensors = case.make(DEVICE)
    options = dict(case.options)
    if "scale" in options and not options.get("accumulate"):
        options["scale"] = torch.tensor(options["scale"], device=DEVICE)
    call = {"layout": case.layout, "regions": case.regions, "starts": case.starts, **options}
    taken, units, weight = tensors, (), 0.0
    if case.second:
        seconds = call["second_moments"] = case.second(tensors)
        taken = weighted(tensors, seconds, options.get("eps", 1e-8))
        units = [unit(x, v) for x, v in zip(tensors, seconds, strict=True)]
        weight = WEIGHT * max(units)
    start = values(case.size, seed=123).to(DEVICE)
    for out_dtype in (torch.float32, torch.float64):
        before = start.to(out_dtype) if case.regions or options.get("accumulate") else None
        before = torch.full((case.size,), math.nan, dtype=out_dtype, device=DEVICE) if before is None else before
        out, want = before.clone(), before.double()
        got = operations.sketch(tensors, out, per_tensor=True, **call)
        assert_moments(got, taken, ROWS, units)
        reference.sketch(tensors, want, **call)
        mass, count = (x.to(DEVICE) for x in bucket_mass(case, taken))
        factor = abs(float(options.get("scale", 1.0)))
        # One strand adds at most 256 rows; beyond float32 input there is none whose partial sums are rounded so.
        u = max(units) if units else U64 if tensors and all(t.dtype == torch.float64 for t in tensors) else U32
        rounded = (count.clamp(max=ROWS) * u + LATER * U64 + weight) * factor * mass
        if units:
            rounded += factor * count * SMALLEST[torch.float32]
        bound = 1.01 * rounded + UNIT_ROUNDOFF[out_dtype] * want.abs() + SMALLEST[out_dtype]
        assert ((out.double() - want).abs() <= bound).all()
        if INTERPRETED and out_dtype == torch.float32 and not options:
            total = operations.sketch(tensors, out, **call)
            assert total.shape == (2,)
            if bool(torch.isfinite(got).all()):
                torch.testing.assert_close(total, got.sum(0), rtol=LATER * U64, atol=0)
            break


@pytest.mark.parametrize(
    "case",
    some(
        sketch_cases(),
        "empty_list_rows1 misaligned_bfloat16_rows3 misaligned_float64_flat zero_dim_rows1 "
        "zero_size_rows3 mixed_dtypes_rows3 mixed_dtypes_flat pieces_backwards same_place_twice some_regions "
        "far_start accumulate scaled scaled_accumulate subnormal_flat parameters_rows3",
    ),
    ids=str,
)
def test_sketch(case):
    check_sketch(case)


@pytest.mark.parametrize(
    "case",
    some(
        weighted_cases(),
        "float32_by_float32 bfloat16_by_float32 bfloat16_by_bfloat16 float16_by_float64 float64_by_bfloat16 "
        "float64_by_float64 aligned_by_shifted_bfloat16 shifted_by_aligned_float32 shifted_by_shifted_bfloat16 "
        "other_shapes second_moments_around_0 second_moments_around_1e-44 second_moments_around_1e+30 "
        "subnormal_by_subnormal_without_eps weighted_pieces weighted_scaled weighted_accumulate",
    ),
    ids=str,
)
def test_weighted_sketch(case):
    check_sketch(case)


def pieces(numel, cuts, dtype=torch.float32, by=0):
    edges = [0, *cuts, numel]
    whole = misaligned(numel, dtype, "cpu", 5, by) if by else values(numel, dtype=dtype, seed=5)
    return lambda device: [whole[a:b].to(device) for a, b in itertools.pairwise(edges)]


@pytest.mark.parametrize(
    ("lanes", "rows", "numel"), [(32, 3, 700), (96, 7, 3001), (1024, 65, 40_001), (2048, 2, 9001), (3072, 1, 7000)]
)
def test_sketch_of_any_lanes(lanes, rows, numel):
    layout = SketchLayout((numel,), rows, seed=9, lanes=lanes)
    check_sketch(SketchCase("lanes", pieces(numel, ()), layout, layout.size))


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float64) if INTERPRETED else DTYPES, ids=str)
def test_sketch_edges_of_rows_steps_chunks_and_slabs(dtype, monkeypatch):
    monkeypatch.setattr("gac_kernels.layout.SKETCH_CHUNK_ROWS", (8, 8))
    step = 8 * 1024  # a chunk; in the interpreter four steps
    numel = 3 * step + 1
    layout = SketchLayout((numel, 1024), 17, seed=4)  # a slab of two chunks and a row
    cuts = (step - 1, step, step + 1, 2 * step - 1024, 17 * 1024, 17 * 1024 + 1)
    case = SketchCase("edges", pieces(numel, cuts, dtype), layout, layout.size, (0,) * 7, (0, *cuts))
    check_sketch(case)
    shifted = SketchCase("shifted", pieces(numel, (), dtype, by=1), layout, layout.size, (0,), (0,))
    check_sketch(shifted)
    if dtype != torch.float64:
        check_sketch(dataclasses.replace(case, second=lambda tensors: second_moments(tensors, (torch.float32,))))


def test_sketch_where_the_sign_index_passes_32_bits():
    """A chunk that crosses element 2**37, where the low half of the word index wraps."""
    layout = SketchLayout((2**37 + 10_000,), 2**28, seed=11)
    tensors = lambda device: [values(5000, device=device)]
    check_sketch(SketchCase("wrap", tensors, layout, layout.size, (0,), (2**37 - 3 * 1024 + 5,)))


def test_sketch_of_strided_tensors():
    kinds = strided_tensors(DEVICE, torch.float16)
    tensors = [kinds[k][:9] for k in ("columns", "step_two", "expanded_columns", "narrow_rows")] + [
        kinds["columns"].t()
    ]
    layout = SketchLayout(tuple(t.numel() for t in tensors), 2)
    check_sketch(SketchCase("strided", lambda device: tensors, layout, layout.size))


def test_results_can_be_added_up(launches):
    check_added_moments(operations, DEVICE)
    launches.clear()
    check_wrong_into(operations, DEVICE)
    assert launches == []


def test_sketch_with_nonfinite_elements():
    for value in (math.nan, math.inf):
        x = poisoned(values(3000, device=DEVICE), [0, 1024, 2999], value)
        layout = SketchLayout((3000,), 2)
        out, want = torch.zeros(layout.size, device=DEVICE), torch.zeros(layout.size, device=DEVICE)
        got = operations.sketch(x, out, layout=layout, per_tensor=True)
        reference.sketch(x, want, layout=layout)
        assert got[0, 1] == 3
        assert torch.equal(torch.isfinite(out), torch.isfinite(want))


def test_weighted_sketch_with_nonfinite_elements():
    check_weighted_nonfinite(operations, DEVICE, *(((1024,),) if INTERPRETED else ()))
    check_weighted_overflow(operations, DEVICE)
    check_second_moments_of_zero(operations, DEVICE)


def test_sketch_equals_the_cpu_library():
    if not cpu.available():
        pytest.skip("no CPU library")
    tensors = [values(5000, dtype=torch.bfloat16), values(70, seed=1)]
    layout = SketchLayout.per_tensor([5000, 70], size=2100, seed=3)
    out, want = torch.empty(layout.size, device=DEVICE), torch.empty(layout.size)
    got = operations.sketch([t.to(DEVICE) for t in tensors], out, layout=layout)
    expected = cpu.sketch(tensors, want, layout=layout)
    torch.testing.assert_close(got.cpu(), expected, rtol=2 * ROWS * U32, atol=0)
    torch.testing.assert_close(out.cpu(), want, rtol=0, atol=4 * U32 * 4 * 5)  # 3 rows of magnitudes below 5
    seconds = [t.square().float() + 0.01 for t in reversed([tensors[0][:70], values(5000, seed=2)])]
    got = operations.sketch(
        [t.to(DEVICE) for t in tensors], out, layout=layout, second_moments=[v.to(DEVICE) for v in seconds]
    )
    expected = cpu.sketch(tensors, want, layout=layout, second_moments=seconds)
    torch.testing.assert_close(got.cpu(), expected, rtol=2 * (ROWS + 2 * WEIGHT) * U32, atol=0)
    torch.testing.assert_close(out.cpu(), want, rtol=0, atol=(4 + 2 * WEIGHT) * U32 * 4 * 50)  # weights below 10


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.bfloat16, torch.int64])
def test_token_moments(dtype, mask_dtype):
    rows, length = 3, launch.WIDTH + 5
    mask = (values(rows, length, seed=1) > 0).to(mask_dtype)
    logprobs = -values(rows, length, seed=2).abs().to(dtype)
    advantages = values(rows, length, seed=3, dtype=dtype)
    logprobs[mask == 0] = math.nan  # values under a zero mask are never used
    advantages[1] = math.inf  # nor the advantages of a demonstration
    expert = torch.tensor([False, True, False])
    check_tokens(logprobs, advantages, mask, expert)
    if mask_dtype == torch.bool:
        check_tokens(logprobs[:, :7], advantages[:, 0], mask[:, :7], expert)
        check_tokens(logprobs.t().contiguous().t(), advantages, mask.t().contiguous().t(), expert)


def check_tokens(*inputs):
    inputs = [x.to(DEVICE) for x in inputs]
    got, expected = operations.token_moments(*inputs), reference.token_moments(*inputs)
    # A term errs by a few units in the last place of p = exp(logprob) <= 1, a sum by n roundings of its magnitudes.
    logprobs, advantages, mask, expert = inputs
    n = mask.shape[1]
    used = (mask != 0) & ~expert[:, None]
    peak = torch.where(used, advantages.double().reshape(len(mask), -1).expand(mask.shape), 0.0).abs().amax()
    largest = torch.where(mask != 0, logprobs.double(), 0.0).abs().amax().clamp(min=1.0)
    bound = (n + 16) * U64 * n * max(largest, peak * peak, 1.0)
    assert got.shape == expected.shape
    assert ((got - expected).abs() <= bound).all()
    assert torch.equal(got[:, 0], expected[:, 0])


def test_token_moments_of_nothing():
    shapes = [(0, 5), (4, 0)]
    for rows, length in shapes:
        empty = torch.zeros(rows, length, device=DEVICE)
        got = operations.token_moments(empty, empty, empty, torch.zeros(rows, dtype=torch.bool, device=DEVICE))
        assert torch.equal(got, torch.zeros(rows, 7, dtype=torch.float64, device=DEVICE))


@pytest.mark.parametrize("numel", [0, 1, 1023, 1024, 1025, 3000])
@pytest.mark.parametrize("given_previous", [True, False])
def test_absorb(numel, given_previous):
    current, total = values(numel, device=DEVICE), values(numel, device=DEVICE, seed=2)
    previous = values(numel, device=DEVICE, seed=1) if given_previous else None
    scale = torch.tensor(1.7, device=DEVICE) if given_previous else -0.3
    expected_total, expected_previous = total.clone(), None if previous is None else previous.clone()
    expected = reference.absorb_(current, expected_previous, expected_total, scale)
    got = operations.absorb_(current, previous, total, scale)
    torch.testing.assert_close(got, expected, rtol=LATER * U64, atol=0)
    # Both round once; contraction to fused multiply-add can tip a tie.
    torch.testing.assert_close(total, expected_total, rtol=2 * U32, atol=2 * U32 * U32)
    if given_previous:
        assert torch.equal(previous, current)


ACCUMULATED = Errors(weight=WEIGHT, sums=LATER * U64)


@pytest.mark.parametrize(
    "case",
    some(
        accumulate_cases(),
        "empty_list misaligned_bfloat16 strided_float16 zero_size mixed_dtypes parameters "
        "around_1e+25_float32 subnormal after_1_bfloat16 after_4_float32 after_4_float64 pieces pieces_weighted "
        "bfloat16_by_float32 float16_by_float64 float64_by_float64 aligned_by_shifted_bfloat16 other_shapes "
        "second_moments_around_0 second_moments_around_1e-44 subnormal_by_subnormal_without_eps",
    ),
    ids=str,
)
def test_accumulate(case):
    check_accumulate(operations, case, DEVICE, ACCUMULATED)


def test_accumulate_beside_the_usual(launches):
    cases = some(nonfinite_cases(), "nan_1_float32 inf_33_bfloat16 -inf_1025_float16 nan_1025_float64")
    check_accumulated_nonfinite(operations, DEVICE, cases)
    check_contributions_of_a_running_sum(operations, DEVICE)
    launches.clear()
    check_accumulate_errors(operations, DEVICE)
    assert launches == []


def test_absorb_sketch(launches):
    few = ["mixed dtypes, some regions, narrow lanes", "weighted", "nothing", "empty tensors"]
    check_absorb_sketch(operations, DEVICE, few if INTERPRETED else None)
    launches.clear()
    check_absorb_sketch_errors(operations, DEVICE)
    assert launches == ["sketch_kernel", "sketch_absorb_kernel"]


def test_offsets_beyond_32_bits():
    """Chunks whose offset exceeds 2**32: the address handed over lies that far before the memory there is."""
    far = 2**33 + 7 * 1024
    x, y = values(3000, device=DEVICE), values(3000, device=DEVICE, seed=1)
    device = x.device
    chunk = torch.tensor([[0, far, 3000, 0]], device=device)
    addresses = [torch.tensor([t.data_ptr() - far * 4], device=device) for t in (x, y)]
    partials = torch.full((3, 1), math.nan, dtype=torch.float64, device=device)
    common = {"ACC": tl.float32, "WIDTH": launch.WIDTH, "BITWISE_BF16": INTERPRETED}
    launch.launch(
        kernels.moments_kernel,
        (1,),
        device,
        addresses[0],
        None,
        chunk,
        0,
        partials,
        1,
        ELEMENT=tl.float32,
        SECOND=None,
        SCALED=False,
        UNROLL=2,
        **common,
    )
    assert abs(partials[0, 0] - reference.moments(x)[0]) <= sum_bound(partials[0, 0].item(), [x], STRAND)
    options = {"A": tl.float32, "B": tl.float32, "UNROLL": 2, "MIX": False, "MOMENTS": True}
    launch.launch(
        kernels.pair_kernel, (1,), device, *addresses, chunk, 0, partials, 1, None, 1.0, 0.0, **options, **common
    )
    expected = reference.pair_moments(x, y)
    scale = expected.abs().max().item()
    assert ((partials[:, 0] - expected).abs() <= sum_bound(scale, [x, y], STRAND)).all()


def test_the_same_bits_every_time():
    tensors = [values(n, dtype=d, device=DEVICE, seed=n) for n in (1, 1500, 3001) for d in DTYPES[:2]]
    others = [t.flip(0) for t in tensors]
    layout = SketchLayout.per_tensor([t.numel() for t in tensors], size=4000)

    def everything():
        out = torch.full((layout.size,), math.nan, device=DEVICE)
        moments = operations.sketch(tensors, out, layout=layout, per_tensor=True)
        seconds, weighted_out = [t.square() for t in others], torch.empty_like(out)
        weighted = operations.sketch(tensors, weighted_out, layout=layout, second_moments=seconds)
        pairs = operations.pair_moments(tensors, others)
        total = torch.ones(sum(t.numel() for t in tensors), device=DEVICE)
        accumulated = operations.accumulate_(tensors, total, previous=total.clone(), scale=0.1)
        return [operations.moments(tensors), moments, out, weighted, weighted_out, pairs, accumulated, total]

    assert all(torch.equal(a, b) for a, b in zip(everything(), everything(), strict=True))


def test_three_hundred_tensors_at_once():
    tensors = [values(1 + 37 * k % 700, dtype=DTYPES[k % 2], device=DEVICE, seed=k % 7) for k in range(300)]
    got, expected = operations.moments(tensors), reference.moments(tensors)
    assert got[1] == 0
    assert abs(got[0] - expected[0]) <= sum_bound(expected[0].item(), tensors, STRAND)


@pytest.fixture
def launches(monkeypatch):
    """Names of the kernels started."""
    names = []
    real = launch.launch

    def counted(kernel, grid, *args, **constants):
        names.append(kernel.fn.__name__ if hasattr(kernel, "fn") else kernel.__name__)
        real(kernel, grid, *args, **constants)

    monkeypatch.setattr(launch, "launch", counted)
    return names


def test_launches_do_not_grow_with_the_list(launches):
    tensors = [values(40, device=DEVICE, seed=k) for k in range(12)]
    out = torch.zeros(500, device=DEVICE)
    operations.moments(tensors)
    operations.sketch(tensors, out)
    operations.pair_moments(tensors, tensors)
    operations.sketch(tensors, out, second_moments=tensors)
    assert launches == [
        *("moments_kernel", "reduce_kernel", "sketch_kernel", "sketch_finish_kernel", "pair_kernel", "reduce_kernel"),
        *("sketch_kernel", "sketch_finish_kernel"),
    ]
    launches.clear()
    operations.mix_(tensors, tensors, 0.5)
    operations.absorb_(out, None, out.clone(), 1.0)
    assert launches == ["pair_kernel", "absorb_kernel"]
    launches.clear()
    total = torch.zeros(480, device=DEVICE)
    operations.accumulate_(tensors, total, previous=total.clone())
    assert launches == ["accumulate_kernel", "reduce_kernel"]
    launches.clear()
    operations.moments(tensors[:2] + [t.double() for t in tensors[:2]])
    assert launches == ["moments_kernel", "moments_kernel", "reduce_kernel"]  # one for each dtype


def test_tables_are_reused_when_addresses_repeat():
    tensors = [values(100 + k, device=DEVICE) for k in range(3)]
    operations.moments(tensors)
    before = len(tables.device_tables)
    operations.moments(tensors)
    assert len(tables.device_tables) == before
    moved = [t.clone() for t in tensors]
    operations.moments(moved)
    assert len(tables.device_tables) == before + 1


def test_the_table_cache_is_bounded():
    cache = tables.DeviceTables(capacity=2)
    device = torch.device(DEVICE, 0) if DEVICE == "cuda" else torch.device(DEVICE)
    build = lambda k: lambda: torch.tensor([k])
    assert [cache.get(k, device, build(k)).item() for k in (1, 2, 1, 3, 1)] == [1, 2, 1, 3, 1]
    assert len(cache) == 2
    assert cache.get(1, device, build(99)).item() == 1  # used last, so still there
    cache.clear()
    assert len(cache) == 0


def test_plans_are_bounded_and_the_used_ones_stay(monkeypatch):
    plans = grouping.Plans()
    monkeypatch.setattr(plans, "MOST", 2)
    made = []
    make = lambda k: lambda: made.append(k) or k
    assert [plans.get((k,), make(k)) for k in (1, 2, 1, 3, 1, 2)] == [1, 2, 1, 3, 1, 2]
    assert made == [1, 2, 3, 2]
    plans.clear()
    assert plans.get((1,), make(9)) == 9


def test_calls_that_differ_in_what_a_plan_depends_on_have_their_own():
    """One list after the other with other dtypes, options and sums, and again: each as if it were alone."""
    tensors = [values(n, device=DEVICE, seed=n) for n in (300, 40)]
    layout, lossless = SketchLayout((300, 40), 2), SketchLayout((300, 40), 1)
    seconds, previous = [t.square() for t in tensors], values(340, device=DEVICE)
    calls = [
        lambda x, into: operations.sketch(x, torch.zeros(layout.size, device=DEVICE), layout=layout, into=into),
        lambda x, into: operations.sketch(
            x, torch.zeros(layout.size, device=DEVICE, dtype=torch.float64), layout=layout, per_tensor=True
        ),
        lambda x, into: operations.sketch(
            x, torch.zeros(layout.size, device=DEVICE), layout=layout, accumulate=True, second_moments=seconds
        ),
        lambda x, into: operations.accumulate_(x, torch.zeros(340, device=DEVICE), layout=lossless, into=into),
        lambda x, into: operations.accumulate_(x, torch.zeros(340, device=DEVICE), previous=previous.clone()),
        lambda x, into: operations.accumulate_(x, torch.zeros(340, device=DEVICE), second_moments=seconds),
    ]
    lists = [tensors, [t.bfloat16() for t in tensors], [tensors[0], tensors[1].double()]]
    found = []
    for _ in range(2):
        for call, listed in itertools.product(calls, lists):
            found.append(call(listed, torch.zeros(2, dtype=torch.float64, device=DEVICE)))
    again = found[len(found) // 2 :]
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=False))
    sketching.plans.clear()
    accumulating.plans.clear()
    alone = [call(listed, torch.zeros(2, dtype=torch.float64, device=DEVICE)) for call in calls for listed in lists]
    assert all(torch.equal(a, b) for a, b in zip(alone, again, strict=True))


def test_graph_capture_takes_tables_of_other_streams_and_refuses_new_ones(monkeypatch):
    cache = tables.DeviceTables(capacity=1)
    device = torch.device(DEVICE, 0) if DEVICE == "cuda" else torch.device(DEVICE)
    table = cache.get("key", device, lambda: torch.tensor([1]))
    monkeypatch.setattr(tables, "current_stream", lambda device: 12345)
    monkeypatch.setattr(tables, "is_capturing", lambda device: True)
    assert cache.get("key", device, lambda: torch.tensor([2])) is table
    with pytest.raises(RuntimeError, match="once before the capture"):
        cache.get("other key", device, lambda: torch.tensor([2]))


def test_a_float_is_split_without_loss():
    for value in (0.1, 1 / 3, 1e-30, 12345.678901, -2.5, 0.0, 1e39, math.inf):
        high, low = launch.split(value)
        assert high + low == value or abs(high + low - value) <= 2.0**-48 * abs(value)
    assert math.isnan(launch.split(math.nan)[0])


EIGHT_BITS = (torch.float8_e4m3fn, torch.float8_e5m2)


@pytest.mark.parametrize("dtype", EIGHT_BITS, ids=str)
def test_every_eight_bit_float_is_read_rightly(dtype):
    codes = torch.arange(256, dtype=torch.uint8).view(dtype).to(DEVICE)
    total = torch.zeros(256, device=DEVICE)
    moments = operations.accumulate_(codes, total)
    want = codes.float()
    torch.testing.assert_close(total, want, rtol=0, atol=0, equal_nan=True)
    assert moments[1] == (~torch.isfinite(want)).sum()
    finite = codes.view(torch.uint8)[torch.isfinite(want)].view(dtype)
    assert_moments(operations.moments(finite, per_tensor=True), [finite.float()], STRAND)


@pytest.mark.parametrize("dtype", EIGHT_BITS, ids=str)
def test_eight_bit_floats_need_no_copy(dtype, launches, monkeypatch):
    """Beside other dtypes, misaligned, with holes and as second moments: what is read is what a widened copy holds."""
    sizes = (9001, 5, 2048, 4000)
    tensors = [values(n + 1, seed=n).to(dtype).to(DEVICE)[n % 2 :][:n] for n in sizes]
    tensors.append(values(50, 70, seed=3).to(DEVICE).to(dtype)[:, 3:60])
    tensors.append(values(300, device=DEVICE, seed=4))
    wide = [t.float() for t in tensors]
    layout = SketchLayout(tuple(t.numel() for t in tensors), 3)
    with monkeypatch.context() as patch:
        patch.setattr(readable, "supported", lambda tensor: pytest.fail("a widened copy"))
        outs = torch.zeros(2, layout.size, device=DEVICE)
        moments = operations.sketch(tensors, outs[0], layout=layout, per_tensor=True)
        total = torch.zeros(sum(t.numel() for t in tensors), device=DEVICE)
        sums = operations.accumulate_(tensors, total, scale=0.5, per_tensor=True)
    assert_moments(moments, wide, ROWS)
    operations.sketch(wide, outs[1], layout=layout)
    bound = 4 * 3 * U32 * max(float(t.abs().max()) for t in wide)  # three rows in each bucket
    assert ((outs[0] - outs[1]).abs() <= bound).all()
    assert torch.equal(total, 0.5 * torch.cat([t.reshape(-1) for t in wide]))
    assert_moments(sums, wide, STRAND)
    seconds = [t.float().abs().to(dtype) for t in tensors]
    got = operations.accumulate_(wide, total, second_moments=seconds)
    expected = operations.accumulate_(wide, total, second_moments=[v.float() for v in seconds])
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)


def test_scales_of_blocks(launches):
    check_scaled(operations, DEVICE, 2 * (ROWS + 1) * U32, few=INTERPRETED)
    check_scaled_nonfinite(operations, DEVICE, few=INTERPRETED)
    launches.clear()
    check_scaled_errors(operations, DEVICE)
    assert launches == []


@PROPERTY
@given(**DRAWN)
def test_one_more_in_every_scale_doubles(numel, rows, dtype):
    check_doubling(operations, DEVICE, numel, rows, dtype)


def test_eight_bit_floats_are_mixed_in_copies():
    x = values(300, device=DEVICE).to(torch.float8_e4m3fn)
    check_target = x.clone()
    operations.mix_(check_target, x, 0.25)
    assert torch.equal(check_target.float(), x.float())


def test_errors_name_the_argument():
    x = values(10, device=DEVICE)
    with pytest.raises(TypeError, match=r"tensors\[1\]"):
        operations.moments([x, x.int()])
    with pytest.raises(ValueError, match="overlaps itself"):
        operations.mix_(x[:1].expand(5), x[:5], 0.5)
    with pytest.raises(ValueError, match="too few"):
        operations.sketch(x, torch.zeros(3, device=DEVICE))
    with pytest.raises(TypeError, match="total"):
        operations.absorb_(x, None, x.double(), 1.0)
    with pytest.raises(ValueError, match="second_moments has 2 tensors"):
        operations.sketch(x, torch.zeros(10, device=DEVICE), second_moments=[x, x])


# ------------------------------------------------------------------------------------------------------- properties


def random_tensor(draw_seed: int, numel: int, dtype=torch.float32) -> torch.Tensor:
    return values(numel, dtype=dtype, seed=draw_seed).to(DEVICE)


@PROPERTY
@given(numel=st.integers(1, 4000), rows=st.integers(1, 5), c=st.floats(-3, 3), seed=st.integers(0, 99))
def test_the_sketch_is_linear(numel, rows, c, seed):
    x, y = random_tensor(seed, numel, torch.float64), random_tensor(seed + 100, numel, torch.float64)
    layout = SketchLayout((numel,), rows, seed)
    sx, sy, sz = (torch.empty(layout.size, dtype=torch.float64, device=DEVICE) for _ in range(3))
    operations.sketch(x, sx, layout=layout)
    operations.sketch(y, sy, layout=layout)
    operations.sketch(x + c * y, sz, layout=layout)
    # rows terms of magnitude below 6 (1 + |c|), each with a few float64 roundings
    assert ((sz - (sx + c * sy)).abs() <= 10 * rows * U64 * 6 * (1 + abs(c)) * rows).all()
    operations.sketch(x, sy, layout=layout, scale=c, accumulate=True)
    accumulated = torch.empty_like(sy)
    operations.sketch([y, x], accumulated.zero_(), layout=layout, regions=[0, 0], starts=[0, 0])
    assert ((sy - (accumulated - sx + c * sx)).abs() <= 20 * rows * U64 * 6 * (1 + abs(c)) * rows).all()


@PROPERTY
@given(numel=st.integers(1, 4000), rows=st.integers(1, 5), c=st.floats(-3, 3), seed=st.integers(0, 99))
def test_the_weighted_sketch_is_linear(numel, rows, c, seed):
    x, y, v = (random_tensor(seed + k, numel, torch.float64) for k in range(3))
    layout = SketchLayout((numel,), rows, seed)
    outs = torch.empty(3, layout.size, dtype=torch.float64, device=DEVICE)
    for out, tensor in zip(outs, (x, y, x + c * y), strict=True):
        operations.sketch(tensor, out, layout=layout, second_moments=v.square(), eps=0.1)
    # as without weights, of terms up to 10 times as large with a few roundings more
    assert ((outs[2] - (outs[0] + c * outs[1])).abs() <= 20 * rows * U64 * 60 * (1 + abs(c)) * rows).all()


@PROPERTY
@given(numel=st.integers(1, 5000), cut=st.integers(0, 5000), c=st.floats(-3, 3), seed=st.integers(0, 99))
def test_accumulate_equals_the_cpu_formula(numel, cut, c, seed):
    x, start = random_tensor(seed, numel), random_tensor(seed + 100, numel)
    pieces, cut = [x[: min(cut, numel)], x[min(cut, numel) :]], min(cut, numel)
    total = start.clone()
    options = {"layout": SketchLayout((numel,), 1), "regions": [0, 0], "starts": [0, cut]}
    got = operations.accumulate_(pieces, total, scale=c, **options)
    want = (start.double() + c * x.double()).float()
    torch.testing.assert_close(total, want, rtol=2 * U32, atol=2.0**-40)  # of a sum that cancels, 48 bits of the scale
    torch.testing.assert_close(got[0], x.double().square().sum(), rtol=LATER * U64, atol=0)


@PROPERTY
@given(data=st.data(), numel=st.integers(1, 5000), seed=st.integers(0, 99))
def test_how_the_list_is_cut_changes_nothing(data, numel, seed):
    cuts = sorted(data.draw(st.lists(st.integers(0, numel), max_size=4)))
    edges = [0, *cuts, numel]
    x = random_tensor(seed, numel)
    parts = [x[a:b] for a, b in itertools.pairwise(edges)]
    size = max(min(numel, 1024), numel // 3)
    whole, cut = torch.empty(size, device=DEVICE), torch.empty(size, device=DEVICE)
    operations.sketch(x, whole, seed=seed)
    operations.sketch(parts, cut, seed=seed)
    bound = 2 * 5 * U32 * 6 * 5  # five rows at most, of numbers below 6
    assert ((whole - cut).abs() <= bound).all()
    layout = SketchLayout((7, numel), 3, seed)
    whole, cut = torch.zeros(layout.size, device=DEVICE), torch.zeros(layout.size, device=DEVICE)
    operations.sketch(x, whole, layout=layout, regions=[1])
    order = data.draw(st.permutations(range(len(parts))))
    operations.sketch(
        [parts[k] for k in order], cut, layout=layout, regions=[1] * len(parts), starts=[edges[k] for k in order]
    )
    assert ((whole - cut).abs() <= bound).all()


@PROPERTY
@given(numel=st.integers(1, 3000), seed=st.integers(0, 99), dtype=st.sampled_from(DTYPES), mu=st.floats(0, 1))
def test_cauchy_schwarz_and_mix_against_pair_moments(numel, seed, dtype, mu):
    a, b = random_tensor(seed, numel, dtype), random_tensor(seed + 100, numel, dtype)
    aa, bb, ab = operations.pair_moments(a, b).tolist()
    slack = sum_bound(1.0, [a, b], STRAND)
    assert abs(ab) <= math.sqrt(aa * bb) * (1 + 4 * slack)
    mixed = a.clone()
    got = operations.mix_(mixed, b, mu, moments=True)
    torch.testing.assert_close(got.tolist(), [aa, bb, ab], rtol=0, atol=2 * slack * (aa + bb))
    # |mu a + (1 - mu) b|^2 expands to the pair moments; rounding the mix moves its norm by u |mix|.
    squares = operations.moments(mixed)[0].item()
    expanded = mu**2 * aa + (1 - mu) ** 2 * bb + 2 * mu * (1 - mu) * ab
    u = UNIT_ROUNDOFF[dtype] + 4 * unit(a)
    underflow = math.sqrt(numel) * SMALLEST[dtype]
    norm = mu * math.sqrt(aa) + (1 - mu) * math.sqrt(bb)
    assert abs(squares - expanded) <= 3 * (u * norm + underflow) * norm + 8 * slack * (aa + bb) + underflow**2


def test_strided_tensors_need_no_copy_where_memory_is_dense():
    kinds = strided_tensors(DEVICE)
    for dense in (kinds["permuted"], kinds["channels_last"], kinds["columns"].contiguous().t()):
        assert readable.any_order(dense).data_ptr() == dense.data_ptr()
    assert readable.any_order(kinds["columns"]).is_contiguous()

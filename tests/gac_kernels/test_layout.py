"""The sketch's linear map: sizes, offsets, signs, and that the sketch estimates inner products."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gac_kernels import SketchLayout, reference
from gac_kernels.layout import LANES, SKETCH_WAVE, sign_word, sketch_chunk_rows
from tests.gac_kernels.cases import values


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    numels=st.lists(st.integers(0, 20_000), min_size=1, max_size=5),
    rows=st.integers(1, 40),
    lanes=st.sampled_from([32, 96, 1024]),
)
def test_regions_hold_their_elements_and_nothing_more(numels, rows, lanes):
    layout = SketchLayout(tuple(numels), rows, lanes=lanes)
    ends = [*layout.bucket_offsets[1:], layout.size]
    for numel, begin, end, index in zip(numels, layout.bucket_offsets, ends, layout.index_offsets, strict=True):
        buckets = {j // (lanes * rows) * lanes + j % lanes for j in range(numel)}
        assert end - begin == layout.region_size(numel) == len(buckets)
        assert not buckets or max(buckets) == len(buckets) - 1
        assert min(numel, lanes) <= end - begin <= numel
        assert index % lanes == 0
    assert layout.lossless == (rows == 1)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(numel=st.integers(0, 10**12), size=st.integers(1, 10**7))
def test_flat_layouts_fit(numel, size):
    if size < min(numel, LANES):
        with pytest.raises(ValueError, match="too few"):
            SketchLayout.flat(numel, size)
        return
    layout = SketchLayout.flat(numel, size)
    assert min(numel, LANES) <= layout.size <= size
    assert layout.lossless == (numel <= size or layout.rows_per_slab == 1)


def test_per_tensor_layouts_come_near_the_wish():
    numels = [4_000_000, 2048, 3, 0, 1_000_001]
    layout = SketchLayout.per_tensor(numels, size=5000)
    assert abs(layout.size - 5000) <= LANES * len(numels)
    assert SketchLayout.per_tensor(numels).lossless
    assert SketchLayout.per_tensor(numels).size == sum(numels)


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1, 2**40 + 3])
def test_signs_are_the_bits_of_the_sign_words(seed):
    layout = SketchLayout((5000, 2**37 + 100), 3, seed)
    for region, start in ((0, 0), (0, 33), (1, 2**37 - 70)):
        got = reference.signs(layout, region, start, 140)
        index = [layout.index_offsets[region] + start + j for j in range(140)]
        expected = [1 - 2 * (sign_word(seed, i // 32) >> (i % 32) & 1) for i in index]
        assert got.tolist() == expected


def test_signs_are_balanced_and_uncorrelated():
    """For fair independent signs a mean of n products has standard deviation 1/sqrt(n); 5 bound them all."""
    n = 1 << 18
    family = [reference.signs(SketchLayout((2 * n,), 1, seed), 0, 0, n) for seed in range(8)]
    family += [reference.signs(SketchLayout((2 * n,), 1, 0), 0, shift, n) for shift in (1, 31, 32)]
    limit = 5 / math.sqrt(n)
    for k, a in enumerate(family):
        assert abs(a.mean()) < limit
        for b in family[:k]:
            assert abs((a * b).mean()) < limit


def test_inner_products_of_sketches_are_unbiased():
    """Over seeds, with the standard error of the mean; 5 of them."""
    x, y = values(3000), values(3000, seed=1) + 0.3 * values(3000)
    estimates = []
    for seed in range(300):
        layout = SketchLayout((3000,), 3, seed)
        sx, sy = torch.empty(layout.size, dtype=torch.float64), torch.empty(layout.size, dtype=torch.float64)
        reference.sketch(x, sx, layout=layout)
        reference.sketch(y, sy, layout=layout)
        estimates.append(sx @ sy)
    estimates = torch.stack(estimates)
    exact = x.double() @ y.double()
    assert abs(estimates.mean() - exact) < 5 * estimates.std() / math.sqrt(len(estimates))
    assert estimates.std() < 2 * x.double().norm() * y.double().norm() / math.sqrt(1024)


def test_a_lossless_sketch_keeps_inner_products():
    x, y = values(5000, dtype=torch.float64), values(5000, seed=1, dtype=torch.float64)
    layout = SketchLayout.per_tensor([5000])
    sx, sy = torch.empty(5000, dtype=torch.float64), torch.empty(5000, dtype=torch.float64)
    reference.sketch(x, sx, layout=layout)
    reference.sketch(y, sy, layout=layout)
    assert torch.equal(sx.abs(), x.abs())
    torch.testing.assert_close(sx @ sy, x @ y, rtol=1e-12, atol=1e-10)  # the same products in the same order


def test_equal_layouts_are_equal_keys():
    a, b = SketchLayout((5, 6), 2), SketchLayout((5, 6), 2)
    assert a == b
    assert hash(a) == hash(b)
    assert a != SketchLayout((5, 6), 2, seed=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((5,), 0), "rows_per_slab must be at least 1"),
        (((5,), 1, 0, 40), "multiple of 32"),
        (((-1,), 1), "must not be negative"),
    ],
)
def test_errors_say_what_is_wrong(arguments, message):
    with pytest.raises(ValueError, match=message):
        SketchLayout(*arguments)


def test_the_last_wave_of_programs_is_full_to_two_thirds():
    """A wave is what an H100 runs at once; lists are single tensors of slabs as a ledger would make them."""
    for elements in (1 << 24, 1 << 26, 134_000_000, 1 << 28, 1 << 29, 1_236_000_000, 2_000_000_000):
        rows, slab = -(-elements // LANES), max(1, elements // max(65_536, elements // 4096))
        chunk = sketch_chunk_rows(rows, LANES, slab)
        assert 16 <= chunk <= 256
        slabs, rest = divmod(rows, slab)
        waves = (slabs * -(-slab // chunk) + -(-rest // chunk)) / SKETCH_WAVE
        assert waves % 1 > 0.65, (elements, waves)


def test_short_lists_have_short_chunks():
    assert sketch_chunk_rows(4096, LANES, 64) == 16  # 4 M elements: 256 programs instead of 64
    assert sketch_chunk_rows(1, LANES) == 16
    assert [sketch_chunk_rows(rows, LANES) for rows in (10**7, 10**9)] == [256, 256]
    assert sketch_chunk_rows(10**9, 1 << 27) == 2  # offsets within a chunk fit 32 bits
    for rows in (1000, 131_389, 1_206_850):
        for slab in (1, 3, 300, 5000):
            assert 1 <= sketch_chunk_rows(rows, LANES, slab) <= 256  # float32 sums of at most so many terms

"""The sums of a step by the CPU library against float64 torch, and totals that an earlier step left.

What follows from the sums is held against the law in ``tests/gac/fused/test_host.py``.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gac_kernels import SketchLayout, cpu, step_vector
from gac_kernels.cpu import library
from gac_kernels.cpu.ending import StepSums, serves

pytestmark = pytest.mark.skipif(not serves(), reason="the CPU library does not serve")

EPS = torch.finfo(torch.float64).eps
SIZES = (0, 1, 7, 1000, 16_384, 16_385, 70_001)
KINDS = {"plain": 1.0, "subnormal": 1e-41, "huge": 3e38}


def draw(size: int, kind: str, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    if kind == "huge":  # its square is beyond float32, and the sum is not beyond float64
        return torch.rand(size, generator=generator) * 3e38
    return torch.randn(size, generator=generator) * KINDS[kind]


def rows_of(count: int, cells: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.rand(count, 2 + cells, generator=generator, dtype=torch.float64)
    rows[:, 1] = torch.arange(count, dtype=torch.float64)
    return rows


def expected(s, r, rows, cells, told):
    """In float64, with the bound of a sum of ``n`` terms of one size: ``n`` roundings of their absolute sum."""
    s, r = s.double(), r.double()
    norms = torch.stack([s.square().sum(), r.square().sum(), (s * r).sum()])
    bounds = torch.stack([norms[0], norms[1], (s * r).abs().sum()]) * EPS * (2 + len(s))
    sums, error = torch.zeros(13, dtype=torch.float64), torch.zeros(13, dtype=torch.float64)
    for k, (branch, tokens, square) in enumerate(told):
        power = rows[k, 0] * square if cells is None else rows[k, 2 : 2 + cells].sum()
        sums[2 + branch] += tokens
        if tokens > 0:
            sums[branch] += power / tokens
            sums[4 + branch] += 1
    sums[6] = rows[: min(len(told) + 1, len(rows)), 1].sum()
    sums[8:11], error[8:11] = norms, bounds
    error[:7] = sums[:7].abs() * EPS * (10 + (cells or 0) + len(told))
    return sums, error


@pytest.mark.parametrize("isa", ["", "portable"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES)
def test_sums(size, kind, isa):
    library.require().select(isa)
    try:
        for cells, told in ((5, [(0, 1, 1), (1, 3.0, 1), (1, 0.0, 1)]), (None, [(1, 1, 0.25), (0, 2.0, 4.0)]), (0, [])):
            s, r, rows = draw(size, kind, 1), draw(size, kind, 2), rows_of(4, cells or 0)
            wanted, error = expected(s, r, rows, cells, told)
            kept, totals = rows.clone(), (s.clone(), r.clone())
            numbers = [x for one in told for x in one]
            call = StepSums((s, r), rows, cells)
            found = torch.tensor(call(numbers, clear=False), dtype=torch.float64)
            assert ((found - wanted).abs() <= error).all(), (found, wanted)
            assert torch.equal(rows, kept)
            assert call(numbers, clear=True).tolist() == found.tolist()
            assert not rows[: len(told) + 1].any(), "those of contributions and one more"
            assert torch.equal(rows[len(told) + 1 :], kept[len(told) + 1 :])
            assert torch.equal(s, totals[0])
            assert torch.equal(r, totals[1])
            norms = cpu.pair_moments(s, r)
            assert found[8:11].tolist() == norms.tolist(), "the bits of pair_moments"
    finally:
        library.require().select("")


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_reaches_the_norms(bad):
    s, r = draw(40_000, "plain", 1), draw(40_000, "plain", 2)
    s[33_000] = bad
    found = StepSums((s, r), rows_of(1, 0), None)([0, 1, 1], clear=False)
    assert not math.isfinite(found[8])
    assert math.isfinite(found[9])
    assert not math.isfinite(found[10])


@settings(max_examples=40, deadline=None)
@given(
    size=st.integers(0, 40_000),
    cells=st.one_of(st.none(), st.integers(0, 700)),
    told=st.lists(
        st.tuples(st.integers(0, 1), st.one_of(st.just(1.0), st.integers(0, 9).map(float)), st.floats(1e-3, 1e3)),
        max_size=9,
    ),
    seed=st.integers(0, 99),
)
def test_any_sizes(size, cells, told, seed):
    s, r, rows = draw(size, "plain", seed), draw(size, "plain", seed + 100), rows_of(9, cells or 0, seed)
    wanted, error = expected(s, r, rows, cells, told)
    numbers = [x for one in told for x in one]
    found = StepSums((s, r), rows, cells)(numbers, clear=True)
    assert ((torch.tensor(found, dtype=torch.float64) - wanted).abs() <= error).all()


def test_threads_change_nothing():
    s, r = draw(300_000, "plain", 1), draw(300_000, "plain", 2)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(StepSums((s, r), rows_of(2, 3), 3)([0, 1, 1], clear=False).tolist())
    finally:
        torch.set_num_threads(before)
    assert found[0] == found[1]


def test_more_contributions_than_rows_are_refused():
    with pytest.raises(ValueError, match="told is of 3 contributions, there are 2 rows"):
        StepSums((torch.zeros(1), torch.zeros(1)), rows_of(2, 0), None)([0, 1, 1] * 3, clear=True)


def test_places_are_those_of_the_vectors():
    """What the library calls each place is what everybody else does."""
    told = {name: list(map(int, library.INTERFACE[name].split())) for name in library.INTERFACE if " of a " in name}
    assert told["sums of a step"] == [0, 2, 4, 6, 7, 8, 11, step_vector.SUMS_SIZE]
    state = list(map(int, library.INTERFACE["state after a step"].split()))
    assert state == [*step_vector.OFFSETS.values(), step_vector.SIZE]
    row = list(map(int, library.INTERFACE["raw and skipped in its row"].split()))
    assert row == [step_vector.ROW.index("raw"), step_vector.ROW.index("skipped")]
    options = list(map(int, library.INTERFACE["options of the law"].split()))
    assert options == [*range(step_vector.OPTIONS.index("rate_0") + 1), len(step_vector.OPTIONS)]
    assert step_vector.ROW.index("mu") == 0


# -- totals of an earlier step ----------------------------------------------------------------------------------------

NUMELS = (3000, 1, 0, 20_000)
DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.float16)


def lists(dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, generator=generator).to(dtype) for n in NUMELS]


def vectors(layout, count, value):
    return [torch.full((layout.size,), value) for _ in range(count)]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fresh", [1, 2, 3])
def test_fresh_vectors_count_as_zero(fresh, dtype, weighted):
    """Bit for bit what zeros give, wherever tensors go; elsewhere nothing is touched."""
    exact = SketchLayout.per_tensor(NUMELS)
    sketched = SketchLayout.per_tensor(NUMELS, size=2048)
    some = [0, 2, 3]
    x = [lists(dtype)[k] for k in some]
    options = {"second_moments": [lists(torch.float32, 1)[k].abs() for k in some]} if weighted else {}
    for layout, absorbs in ((exact, False), (sketched, True)):
        results = []
        for value in (0.0, math.nan):
            total, previous = vectors(layout, 2, 1.5)
            for vector, bit in ((total, 1), (previous, 2)):
                if fresh & bit:
                    vector.fill_(value)
            told = {"layout": layout, "regions": some, "fresh": fresh if value != 0 else 0, **options}
            if absorbs:
                sums = cpu.absorb_sketch_.direct(x, previous, total, 0.5, **told)
            else:
                sums = cpu.accumulate_.direct(x, total, previous=previous, scale=0.5, **told)
            untouched = slice(layout.bucket_offsets[1], layout.bucket_offsets[1] + 1)
            for vector, bit in ((total, 1), (previous, 2)):
                assert bool(vector[untouched].isnan()) == (math.isnan(value) and bool(fresh & bit))
                vector[untouched] = 0.0
            results.append((sums, total, previous))
        for found, wanted in zip(*results, strict=True):
            assert torch.equal(found, wanted)


def test_fresh_totals_need_whole_regions():
    layout = SketchLayout.per_tensor([10, 5])
    with pytest.raises(
        ValueError, match=r"fresh totals need tensors that fill their regions, got \(7, 5\) for \(10, 5\)"
    ):
        cpu.accumulate_.direct([torch.ones(7), torch.ones(5)], torch.zeros(layout.size), layout=layout, fresh=1)

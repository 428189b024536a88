"""The call whose addresses are bound once, against :func:`gac_kernels.accumulate_`."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gac_kernels import SketchLayout, accumulate_, cpu
from gac_kernels.cpu import builtins
from gac_kernels.cpu.accumulating import Accumulating

pytestmark = pytest.mark.skipif(
    not cpu.available() or builtins._exchange() is None, reason="no CPU library, or a torch that it asks nothing"
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
numels_of = st.lists(st.integers(0, 3000), min_size=1, max_size=6)


def drawn(numels, dtypes, seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, generator=generator).to(d) for n, d in zip(numels, dtypes, strict=True)]


@given(st.data(), numels_of, st.booleans(), st.integers(0, 3), st.booleans(), st.integers(0, 2**20))
def test_bit_for_bit(data, numels, running, fresh, each, seed):
    """Whole lists, some regions in any order, dtypes alike or not, numbers of an earlier step or none, twice."""
    layout = SketchLayout.per_tensor(numels)
    regions = data.draw(st.permutations(range(len(numels))))[: data.draw(st.integers(1, len(numels)))]
    own = [numels[k] for k in regions]
    dtypes = [data.draw(st.sampled_from(DTYPES))] * len(own)
    if data.draw(st.booleans()):
        dtypes = [data.draw(st.sampled_from(DTYPES)) for _ in own]
    fresh &= 3 if running else 1
    start = torch.randn(layout.size, generator=torch.Generator().manual_seed(seed))
    found = []
    for bound in (True, False):
        total, previous = start.clone(), start.flip(0).contiguous() if running else None
        sums = (
            torch.tensor([[1.0, 2.0]] * len(own), dtype=torch.float64) if each else torch.ones(2, dtype=torch.float64)
        )
        add = Accumulating(total, previous, layout)
        for k, bits in enumerate((fresh, 0)):
            tensors = drawn(own, dtypes, seed + k)
            if bound:
                assert add(tensors, regions, scale=0.7, into=sums.data_ptr(), fresh=bits, per_tensor=each)
            else:
                options = {"layout": layout, "regions": regions, "previous": previous, "scale": 0.7, "into": sums}
                options["per_tensor"] = each
                (cpu.accumulate_ if bits else accumulate_)(
                    tensors, total, **options, **({"fresh": bits} if bits else {})
                )
        found.append((total, previous, sums))
    for one, other in zip(*found, strict=True):
        assert (one is None and other is None) or torch.equal(one, other)


def test_what_is_not_finite_is_counted():
    total, sums = torch.zeros(8), torch.zeros(2, dtype=torch.float64)
    add = Accumulating(total, None, SketchLayout.per_tensor([5, 3]))
    x = [torch.tensor([1.0, float("nan"), 2.0, float("inf"), 3.0]), torch.ones(3)]
    assert add(x, [0, 1], scale=1.0, into=sums.data_ptr())
    assert sums[1] == 2


class Special(torch.Tensor):
    pass


@pytest.mark.parametrize(
    "tensors",
    [
        [torch.ones(5), torch.ones(4)],  # another size
        [torch.ones(5)],  # another number of tensors
        [torch.ones(10)[::2], torch.ones(3)],
        [torch.ones(5).as_subclass(Special), torch.ones(3)],
        [torch.ones(5, dtype=torch.int64), torch.ones(3)],
        [torch.ones(5).to_sparse(), torch.ones(3)],
        [torch.ones(5, device="meta"), torch.ones(3, device="meta")],
        [None, torch.ones(3)],
        (torch.ones(5), torch.ones(3)),  # no list
        [],
    ],
)
def test_what_is_not_plain_is_left_to_the_careful_way(tensors):
    total, sums = torch.ones(8), torch.ones(2, dtype=torch.float64)
    add = Accumulating(total, None, SketchLayout.per_tensor([5, 3]))
    assert not add(tensors, [0, 1], scale=1.0, into=sums.data_ptr(), fresh=1)
    assert torch.equal(total, torch.ones(8))
    assert torch.equal(sums, torch.ones(2, dtype=torch.float64))


def test_many_orders_are_told_apart():
    """More than are kept, in lists that come and go."""
    layout = SketchLayout.per_tensor([2] * 40)
    total, sums = torch.zeros(80), torch.zeros(2, dtype=torch.float64)
    add = Accumulating(total, None, layout)
    for _ in range(2):
        for k in range(40):
            assert add([torch.full((2,), k + 1.0)], [k], scale=1.0, into=sums.data_ptr())
    assert torch.equal(total, torch.arange(1.0, 41.0).mul(2).repeat_interleave(2))

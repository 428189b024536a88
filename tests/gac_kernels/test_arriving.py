"""Hooks of the C++ library that add gradients as they arrive, against :func:`gac_kernels.accumulate_`."""

import gc
import sys
import weakref
from array import array

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gac_kernels import SketchLayout, accumulate_, cpu
from gac_kernels.cpu import arriving
from gac_kernels.cpu.arriving import ArrivingSums

pytestmark = pytest.mark.skipif(not arriving.serves(), reason="no CPU library, or a torch that it asks nothing")

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Hooked:
    """Parameters of these sizes with their hooks, and what they are added to."""

    def __init__(self, numels, *, start=None):
        self.layout = SketchLayout.per_tensor(numels)
        size = self.layout.size
        self.totals = [torch.zeros(size) if start is None else start.clone() for _ in range(2)]
        self.accumulated, self.came = [], [[] for _ in numels]
        self.sums = ArrivingSums(self.accumulated, self.totals, self.layout)
        self.hooks = [self.sums.hooks(k, came) for k, came in enumerate(self.came)]

    def arrive(self, k, gradient, parameter=None):
        for hook, told in zip(self.hooks[k], (gradient, parameter), strict=True):
            assert hook(told) is None

    def moments(self):
        into = torch.zeros(2, dtype=torch.float64)
        self.sums.sums(into)
        return into


def drawn(numel, dtype, seed):
    return torch.randn(numel, generator=torch.Generator().manual_seed(seed)).to(dtype)


@settings(deadline=None)
@given(st.data(), st.lists(st.integers(0, 60_000), min_size=1, max_size=6), st.booleans(), st.integers(0, 2**20))
def test_bit_for_bit(data, numels, fresh, seed):
    """Any order, some parameters, dtypes of their own, a stretch of an earlier step or none, two passes."""
    layout = SketchLayout.per_tensor(numels)
    start = torch.randn(layout.size, generator=torch.Generator().manual_seed(seed))
    hooked, total = Hooked(numels, start=start), start.clone()
    flags = array("B", [1] * len(numels)) if fresh else None
    written = set()
    for number in range(2):
        regions = data.draw(st.permutations(range(len(numels))))[: data.draw(st.integers(1, len(numels)))]
        gradients = [drawn(numels[k], data.draw(st.sampled_from(DTYPES)), seed + 10 * number + k) for k in regions]
        hooked.sums.begin(1, scale=0.7, fresh=flags)
        for k, gradient in zip(regions, gradients, strict=True):
            hooked.arrive(k, gradient)
        added, seconds = hooked.sums.end()
        assert added == len(regions)
        assert seconds > 0
        for k in set(regions) - written if fresh else ():
            total[layout.bucket_offsets[k] :][: numels[k]] = 0
        written |= set(regions)
        into = torch.zeros(2, dtype=torch.float64)
        accumulate_(gradients, total, layout=layout, regions=regions, scale=0.7, into=into)
        assert torch.equal(hooked.totals[1], total)
        assert torch.equal(hooked.moments(), into)
        each, theirs = hooked.sums.each(added)
        assert theirs.tolist() == regions
        apart = accumulate_(gradients, torch.zeros(layout.size), layout=layout, regions=regions, per_tensor=True)
        assert torch.equal(each, apart)
    assert torch.equal(hooked.totals[0], start)
    assert not fresh or flags.tolist() == [int(k not in written) for k in range(len(numels))]


def test_what_is_not_finite_is_counted():
    hooked = Hooked([4, 2])
    hooked.sums.begin(0, scale=1.0)
    hooked.arrive(0, torch.tensor([1.0, float("nan"), float("inf"), 2.0]))
    hooked.arrive(1, torch.ones(2))
    assert hooked.sums.end()[0] == 2
    assert hooked.moments()[1] == 2


def test_outside_of_a_pass_everything_goes_on_lists():
    hooked, parameter, gradient = Hooked([3]), torch.nn.Parameter(torch.ones(3)), torch.ones(3)
    for _ in range(2):
        hooked.arrive(0, gradient, parameter)
        assert len(hooked.accumulated) == len(hooked.came[0]) == 1
        assert hooked.accumulated.pop() is parameter
        assert hooked.came[0].pop() is gradient
        hooked.sums.begin(0, scale=1.0)
        assert hooked.sums.end() == (0, 0.0)
    assert not hooked.totals[0].any()


class Special(torch.Tensor):
    pass


@pytest.mark.parametrize(
    "gradient",
    [
        torch.ones(4),  # another size
        torch.ones(10)[::2],
        torch.ones(5).as_subclass(Special),
        torch.ones(5, dtype=torch.int64),
        torch.ones(5).to_sparse(),
        torch.ones(5, device="meta"),
    ],
)
def test_what_is_not_plain_goes_on_lists(gradient):
    hooked, parameter = Hooked([5, 3]), torch.nn.Parameter(torch.ones(5))
    hooked.sums.begin(0, scale=1.0)
    hooked.arrive(1, torch.ones(3))
    hooked.arrive(0, gradient, parameter)
    assert hooked.sums.end()[0] == 1
    assert hooked.accumulated == [parameter]
    assert hooked.came[0][0] is gradient
    assert not hooked.totals[0][:5].any()


def test_gradients_that_are_only_asked_for_are_forgotten():
    hooked, gradient = Hooked([3, 2]), torch.ones(3)
    count = sys.getrefcount(gradient)
    hooked.sums.begin(0, scale=1.0)
    hooked.hooks[0][0](gradient)
    hooked.arrive(1, torch.ones(2))
    assert hooked.sums.end()[0] == 1
    assert sys.getrefcount(gradient) == count
    hooked.sums.begin(0, scale=1.0)
    hooked.arrive(0, gradient)
    assert hooked.sums.end()[0] == 1
    assert sys.getrefcount(gradient) == count
    assert hooked.totals[0].tolist() == [1.0] * 5


@pytest.mark.parametrize("order", ["gga", "gag", "gaga", "a"])
def test_gradients_that_cannot_be_told_apart(order):
    """Two that came before one was accumulated, one after, a second time, and one that came before the pass."""
    hooked, gradient = Hooked([3]), torch.ones(3)
    hooked.sums.begin(0, scale=1.0)
    for call in order:
        hooked.hooks[0]["ga".index(call)](gradient)
    assert hooked.sums.end()[0] == -1
    hooked.sums.begin(0, scale=1.0)
    hooked.arrive(0, gradient)
    assert hooked.sums.end()[0] == 1


def test_a_gradient_lives_no_longer_than_without_hooks():
    """In a backward pass of torch: it is held until it was accumulated, and hooks outlive what made them."""
    model = torch.nn.Linear(4, 3)
    parameters = list(model.parameters())
    hooked = Hooked([p.numel() for p in parameters])
    alive, total = [], hooked.totals[0]
    for hooks, parameter in zip(hooked.hooks, parameters, strict=True):
        parameter.register_hook(lambda gradient: alive.append(weakref.ref(gradient)))
        parameter.register_hook(hooks[0])
        parameter.register_post_accumulate_grad_hook(hooks[1])
    hooked.sums.begin(0, scale=2.0)
    model(torch.ones(2, 4)).square().sum().backward()
    assert hooked.sums.end()[0] == 2
    gc.collect()
    assert [ref() for ref in alive] == [None, None]
    expected = [2 * p.grad.flatten() for p in parameters]
    assert torch.equal(total, torch.cat(expected))
    accumulated = hooked.accumulated
    del hooked, hooks
    gc.collect()
    model(torch.ones(2, 4)).square().sum().backward()  # on lists
    assert len(accumulated) == 2


def test_large_gradients_are_added_by_several_threads(monkeypatch):
    numel = 3 * cpu.quick.QUICK
    gradient, hooked = drawn(numel, torch.float32, 0), Hooked([numel])
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    hooked.sums.begin(0, scale=1.0)
    hooked.arrive(0, gradient)
    assert hooked.sums.end()[0] == 1
    assert torch.equal(hooked.totals[0], gradient)
    expected = accumulate_([gradient], torch.zeros(numel), layout=hooked.layout)
    assert torch.equal(hooked.moments(), expected)

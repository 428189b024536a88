"""The oracle itself, against formulas written out another way, and the arguments it refuses."""

import math

import pytest
import torch

from gac_kernels import SketchLayout, reference
from gac_kernels.arguments import check_scalar
from gac_kernels.strides import overlaps_itself
from tests.gac_kernels.accumulation import (
    check_absorb_sketch,
    check_absorb_sketch_errors,
    check_accumulate_errors,
    check_accumulated_nonfinite,
    check_contributions_of_a_running_sum,
)
from tests.gac_kernels.cases import (
    check_added_moments,
    check_second_moments_of_zero,
    check_weighted_nonfinite,
    check_wrong_into,
    strided_tensors,
    values,
)
from tests.gac_kernels.scaling import check_scaled, check_scaled_errors, check_scaled_nonfinite


def test_moments_and_pair_moments_in_exact_integers():
    a, b = [torch.arange(5.0), torch.tensor([[3.0], [4.0]])], [torch.ones(5), torch.tensor([[2.0], [-1.0]])]
    assert reference.moments(a, per_tensor=True).tolist() == [[30.0, 0.0], [25.0, 0.0]]
    assert reference.moments([]).tolist() == [0.0, 0.0]
    assert reference.pair_moments(a, b).tolist() == [55.0, 10.0, 12.0]
    assert reference.pair_moments([], []).tolist() == [0.0, 0.0, 0.0]
    bad = torch.tensor([1.0, math.nan, math.inf, -math.inf])
    assert reference.moments(bad)[1] == 3


def test_mix_returns_the_moments_before_the_update():
    a, b = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])
    assert reference.mix_(a, b, 0.25, moments=True).tolist() == [5.0, 25.0, 11.0]
    assert a.tolist() == [2.5, 3.5]


def test_results_can_be_added_up():
    check_added_moments(reference, "cpu")
    check_wrong_into(reference, "cpu")


def test_sketch_writes_only_the_regions_named():
    layout = SketchLayout((10, 20, 30), 1)
    out = torch.full((60,), 7.0)
    reference.sketch([values(5)], out, layout=layout, regions=[1], starts=[3])
    assert (out[:10] == 7).all()
    assert (out[30:] == 7).all()
    assert (out[10:13] == 0).all()
    assert (out[18:30] == 0).all()
    assert torch.equal(out[13:18].abs(), values(5).abs())


def test_flat_sketches_zero_what_is_left_over():
    out = torch.full((1500,), 7.0)
    reference.sketch(values(1100), out)
    assert (out[1100:] == 0).all()
    assert (out[:1100] != 0).all()


def test_weighted_sketch_by_hand():
    x, v = torch.tensor([3.0, -4.0, 5.0, 1.0]), torch.tensor([[4.0, 0.0], [0.25, 1.0]], dtype=torch.bfloat16)
    out = torch.zeros(4)
    moments = reference.sketch(x, out, second_moments=v, eps=0.5)
    want = torch.tensor([1.2, 0.0, 5.0, 2.0 / 3.0], dtype=torch.float64)
    torch.testing.assert_close(out.abs().double(), want, rtol=2.0**-23, atol=0)
    torch.testing.assert_close(moments, torch.tensor([want.square().sum(), 0.0]).double(), rtol=2.0**-22, atol=0)
    plain = torch.zeros(4)
    reference.sketch(x, plain)
    assert torch.equal(plain.sign() * (want != 0), out.sign())  # the same map
    assert reference.sketch([x, x[:0]], torch.zeros(4), second_moments=[v, v[:0]]).shape == (2,)
    assert reference.sketch(x, out, second_moments=torch.tensor([1.0, -1.0, math.nan, 0.0]), eps=0.0)[1] == 2
    check_second_moments_of_zero(reference, "cpu")
    check_weighted_nonfinite(reference, "cpu", (31,))


def test_token_moments_by_hand():
    half, quarter = math.log(0.5), math.log(0.25)
    logprobs = torch.tensor([[half, quarter, math.nan], [half, half, half]], dtype=torch.float64)
    advantages = torch.tensor([[2.0, -1.0, math.inf], [5.0, 5.0, 5.0]])
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    got = reference.token_moments(logprobs, advantages, mask, torch.tensor([False, True]))
    phi = (0.25, 0.1875)
    first = [2, half + quarter, 1, 5, sum(phi), phi[0] ** 2 + phi[1] ** 2, 2 * phi[0] - phi[1]]
    second = [1, half, 0, 0, 0.25, 0.0625, 0]
    torch.testing.assert_close(got, torch.tensor([first, second], dtype=torch.float64), rtol=1e-14, atol=1e-14)


def test_absorb_takes_the_difference_and_remembers():
    running, previous, total = torch.zeros(1500), torch.zeros(1500), torch.zeros(1500)
    parts = [values(1500, seed=s) for s in range(3)]
    for part in parts:
        running += part
        squares = reference.absorb_(running, previous, total, torch.tensor(2.0))
        delta = 2 * part.double()
        expected = torch.stack([delta[:1024].square().sum(), delta[1024:].square().sum()])
        # The running sum is rounded twice on the way: 2 * 2**-24 of numbers below 12, times 2 * |delta| < 24.
        torch.testing.assert_close(squares, expected, rtol=0, atol=1024 * 24 * 4 * 12 * 2.0**-24)
        assert torch.equal(previous, running)
    torch.testing.assert_close(total, 2 * running, rtol=0, atol=6 * 24 * 2.0**-24)
    assert reference.absorb_(running, None, total, 1.0).shape == (2,)
    assert reference.absorb_(running[:0], None, total[:0], 1.0).shape == (0,)


def test_accumulate_by_hand():
    total, previous = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([1.0, 0.0, 0.0, 7.0])
    layout = SketchLayout((1, 3), 1)
    x = torch.tensor([2.0, 4.0], dtype=torch.bfloat16)
    got = reference.accumulate_(x, total, layout=layout, regions=[1], starts=[1], scale=0.5)
    assert (total.tolist(), got.tolist()) == ([1.0, 2.0, 4.0, 6.0], [20.0, 0.0])
    got = reference.accumulate_(
        [x, x[:1]], total, layout=layout, regions=[1, 0], starts=[1, 0], previous=previous, per_tensor=True
    )
    assert (total.tolist(), previous.tolist()) == ([2.0, 2.0, 6.0, 3.0], [2.0, 0.0, 2.0, 4.0])
    assert got.tolist() == [[13.0, 0.0], [1.0, 0.0]]
    v = torch.tensor([4.0, 0.0])
    got = reference.accumulate_(x, total[:2], second_moments=v, eps=0.0)
    assert (total[:2].tolist(), got.tolist()) == ([3.0, 2.0], [1.0, 0.0])
    check_accumulated_nonfinite(reference, "cpu")
    check_contributions_of_a_running_sum(reference, "cpu")
    check_accumulate_errors(reference, "cpu")


def test_absorb_sketch_is_sketch_and_absorb():
    names = ["torch.float64", "weighted", "nothing", "empty tensors", "an empty tensor after its neighbour"]
    check_absorb_sketch(reference, "cpu", names)
    check_absorb_sketch_errors(reference, "cpu")


def test_overlap_is_found():
    kinds = strided_tensors("cpu")
    overlapping = {name for name, tensor in kinds.items() if overlaps_itself(tensor)}
    assert overlapping == {"expanded_scalar", "expanded_rows", "expanded_columns", "overlapping_windows"}


X = values(10)
LAYOUT = SketchLayout((10,), 1)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: reference.moments([X, 3]), TypeError, r"tensors\[1\] must be a tensor, got int"),
        (lambda: reference.moments(5), TypeError, "tensors must be a tensor or a list"),
        (lambda: reference.moments(X.int()), TypeError, "must be floating point, got torch.int32"),
        (lambda: reference.moments(X.to_sparse()), TypeError, "to_dense"),
        (lambda: reference.moments([X, X.to("meta")]), ValueError, "call once for each device"),
        (lambda: reference.pair_moments([X], []), ValueError, "they must pair up"),
        (lambda: reference.pair_moments(X, X[:3]), ValueError, "they must be equal"),
        (lambda: reference.mix_(X, X, True), TypeError, "mu must be a number"),
        (lambda: reference.mix_(X, X, torch.ones(2)), ValueError, "mu must be a 0-dim"),
        (lambda: reference.mix_(X[:1].expand(3), X[:3], 0.5), ValueError, "overlaps itself"),
        (lambda: reference.sketch(X, torch.zeros(2, 5)), ValueError, "out must be a contiguous 1-D tensor"),
        (lambda: reference.sketch(X, torch.zeros(10).half()), TypeError, "out must be float32 or float64"),
        (lambda: reference.sketch(X, torch.zeros(9), layout=LAYOUT), ValueError, "the layout needs 10"),
        (lambda: reference.sketch(X, torch.zeros(10), starts=[0]), ValueError, "need a layout"),
        (
            lambda: reference.sketch(X, torch.zeros(10), layout=LAYOUT, starts=[1]),
            ValueError,
            "covers elements 1 to 11",
        ),
        (lambda: reference.sketch(X, torch.zeros(10), layout=LAYOUT, regions=[1]), ValueError, "has 1 regions"),
        (lambda: reference.sketch(X, torch.zeros(10), layout=LAYOUT, regions=[]), ValueError, "as many regions"),
        (lambda: reference.sketch(X, torch.zeros(10), second_moments=[]), ValueError, "second_moments has 0 tensors"),
        (
            lambda: reference.sketch(X, torch.zeros(10), second_moments=X[:9]),
            ValueError,
            r"second_moments\[0\] has 9 elements, tensors\[0\] 10",
        ),
        (
            lambda: reference.sketch(X, torch.zeros(10), second_moments=X.int()),
            TypeError,
            r"second_moments\[0\] must be floating point",
        ),
        (
            lambda: reference.sketch(X, torch.zeros(10), second_moments=X.to("meta")),
            ValueError,
            r"second_moments\[0\] is on meta, tensors\[0\] on cpu",
        ),
        (lambda: reference.sketch(X, torch.zeros(10), second_moments=X, eps=-1e-8), ValueError, "eps must be 0 or"),
        (lambda: reference.sketch(X, torch.zeros(10), second_moments=X, eps=X[0]), TypeError, "eps must be a number"),
        (lambda: reference.token_moments(X, X, X, X), ValueError, r"shape \[B, T\]"),
        (lambda: reference.absorb_(X, None, X.double(), 1.0), TypeError, "total must be a float32 tensor"),
        (lambda: reference.absorb_(X, X[:5], X, 1.0), ValueError, "previous has 5 elements, current 10"),
        (lambda: reference.absorb_(X, None, X.view(2, 5), 1.0), ValueError, "total must be contiguous and 1-D"),
    ],
)
def test_errors_name_the_argument_and_what_to_do(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_scalars_may_be_numbers_or_tensors():
    assert check_scalar(2, "mu", torch.device("cpu")) == 2.0
    assert check_scalar(torch.tensor([0.5]), "mu", torch.device("cpu")).shape == ()


def test_scales_of_blocks():
    check_scaled(reference, "cpu", 64 * 2.0**-53)
    check_scaled_nonfinite(reference, "cpu")
    check_scaled_errors(reference, "cpu")

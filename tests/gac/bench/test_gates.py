"""The gates: green on the reference, red on kernels that are wrong in the ways kernels are wrong."""

import pytest
import torch

from gac.bench import gates
from gac_kernels import SketchLayout, reference

MU, SCALE = torch.tensor(0.3), torch.tensor(1.7)


def tensors(seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, generator=generator).to(dtype) for n in (3000, 1, 5000, 70)]


def token_inputs():
    logprobs = -torch.rand(4, 50)
    return logprobs, torch.randn(4, 50), torch.rand(4, 50) < 0.7, torch.tensor([True, False, False, False])


def gate(operation, function, dtype=torch.float32):
    a, b = tensors(1, dtype), tensors(2, dtype)
    if operation == "moments":
        return gates.check_moments(function, a)
    if operation == "pair_moments":
        return gates.check_pair_moments(function, a, b)
    if operation == "mix_":
        return gates.check_mix(function, a, b, MU)
    if operation == "sketch":
        layout = SketchLayout.per_tensor([t.numel() for t in a], size=3000)
        return gates.check_sketch(function, a, torch.zeros(layout.size), layout)
    if operation == "weighted_sketch":
        layout = SketchLayout.per_tensor([t.numel() for t in a], size=3000)
        return gates.check_sketch(function, a, torch.zeros(layout.size), layout, [t.float().square() for t in b])
    if operation == "absorb_":
        return gates.check_absorb(function, torch.randn(3072), torch.randn(3072), torch.randn(3072), SCALE)
    if operation == "accumulate_":
        return gates.check_accumulate(function, a, torch.cat(tensors(3)), SCALE)
    if operation == "absorb_sketch_":
        layout = SketchLayout.per_tensor([t.numel() for t in a], size=3000)
        return gates.check_absorb_sketch(function, a, *torch.randn(2, layout.size), SCALE, layout)
    return gates.check_token_moments(function, *token_inputs())


SUMMED = ("accumulate_", "absorb_sketch_")
OPERATIONS = ("moments", "pair_moments", "mix_", "sketch", "weighted_sketch", "absorb_", *SUMMED, "token_moments")


def right(operation):
    return getattr(reference, operation.removeprefix("weighted_"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_reference_is_green(operation, dtype):
    found = gate(operation, right(operation), dtype)
    assert found.ok, found
    assert found.checked == "everything"


def _tail_forgotten(operation):
    """Leaves the last element of the last tensor out."""
    right = getattr(reference, operation)

    def wrong(x, *rest, **options):
        cut = [*x[:-1], x[-1][:-1]]
        rest = [[*r[:-1], r[-1][:-1]] if isinstance(r, list) else r for r in rest]
        return right(cut, *rest, **options)

    return wrong


@pytest.mark.parametrize("operation", ["moments", "pair_moments", "mix_", "sketch"])
def test_a_forgotten_element_is_red(operation):
    assert not gate(operation, _tail_forgotten(operation)).ok


def test_wrong_signs_are_red():
    def wrong(x, out, *, layout, **options):
        other = SketchLayout(layout.numels, layout.rows_per_slab, layout.seed + 1)
        return reference.sketch(x, out, layout=other, **options)

    assert not gate("sketch", wrong).ok


def test_weights_forgotten_are_red():
    wrong = lambda x, out, *, second_moments, **options: reference.sketch(x, out, **options)
    assert not gate("weighted_sketch", wrong).ok


def test_buckets_left_unwritten_are_red():
    def wrong(x, out, *, layout, **options):
        whole = torch.zeros_like(out)
        moments = reference.sketch(x, whole, layout=layout, **options)
        out[:-1] = whole[:-1]
        return moments

    assert not gate("sketch", wrong).ok


def test_swapped_weights_are_red():
    assert not gate("mix_", lambda a, b, mu: reference.mix_(a, b, 1 - mu)).ok


def test_a_previous_that_stays_is_red():
    wrong = lambda current, previous, total, scale: reference.absorb_(current, previous.clone(), total, scale)
    assert not gate("absorb_", wrong).ok


@pytest.mark.parametrize("operation", SUMMED)
def test_a_scale_ignored_is_red(operation):
    def wrong(x, *rest, **options):
        if operation == "accumulate_":
            return reference.accumulate_(x, *rest, **options | {"scale": 1.0})
        return reference.absorb_sketch_(x, *rest[:2], 1.0, **options)

    assert not gate(operation, wrong).ok


def test_an_element_that_is_not_added_is_red():
    def wrong(x, total, **options):
        kept = total[-1].clone()
        moments = reference.accumulate_(x, total, **options)
        total[-1] = kept
        return moments

    assert not gate("accumulate_", wrong).ok


def test_a_previous_that_is_not_replaced_is_red():
    def wrong(x, previous, *rest, **options):
        return reference.absorb_sketch_(x, previous.clone(), *rest, **options)

    assert not gate("absorb_sketch_", wrong).ok


def test_wrong_cells_are_red():
    def wrong(*arguments, **options):
        sums = reference.absorb_sketch_(*arguments, **options)
        sums[2:4] = sums[2:4].flip(0)
        return sums

    assert not gate("absorb_sketch_", wrong).ok


def test_a_mask_ignored_is_red():
    wrong = lambda logp, a, mask, e: reference.token_moments(logp, a, torch.ones_like(mask), e)
    assert not gate("token_moments", wrong).ok


@pytest.mark.parametrize("operation", ["moments", "pair_moments", "token_moments"])
def test_nan_is_red(operation):
    wrong = lambda *args, **options: getattr(reference, operation)(*args, **options) * float("nan")
    found = gate(operation, wrong)
    assert not found.ok
    assert found.error == float("inf")


def test_long_lists_are_sampled(monkeypatch):
    monkeypatch.setattr(gates, "_SAMPLE", 4000)
    assert gates.sample([3000, 1, 5000, 70]) == [1, 3, 0]
    found = gates.check_moments(reference.moments, tensors(1))
    assert found.ok
    assert found.checked == "3 of 4 tensors, and the total"


def test_pieces_add_up(monkeypatch):
    monkeypatch.setattr(gates, "_PIECE", 700)
    assert all(gate(operation, right(operation)).ok for operation in OPERATIONS)

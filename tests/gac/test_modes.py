"""What the end of a step makes can be saved by backward passes, whatever mode the caller is in; weights stay."""

import random

import pytest
import torch

from gac.modes import Lasting
from gac.weights import HostWeights, Weights, new_slots


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_tensors_that_last(inference, grad):
    made, factor = [], torch.ones(3, requires_grad=True)

    def fail():
        with Lasting():
            made.append(torch.ones(3))
            assert not made[0].is_inference()
            assert not (factor * 2).requires_grad
            raise KeyError("stop")

    with torch.inference_mode(inference), torch.set_grad_enabled(grad):
        outside = torch.is_inference_mode_enabled(), torch.is_grad_enabled()
        with pytest.raises(KeyError, match="stop"):
            fail()
        assert (torch.is_inference_mode_enabled(), torch.is_grad_enabled()) == outside
    (made[0] * factor).sum().backward()
    assert torch.equal(factor.grad, made[0])


def test_weights_of_many_steps_are_those_of_torch_and_stay():
    draw, kept = random.Random(0), []
    for mu in [0.0, 1.0, 1.0 - 2.0**-25, *(draw.random() for _ in range(60))]:
        weights, expected = HostWeights(mu), Weights(torch.tensor(mu, dtype=torch.float64))
        kept.append((weights, expected))
        assert weights.present_on_host == tuple(expected.present.tolist())
        assert torch.equal(weights.present, expected.present)
    for weights, expected in kept:
        assert torch.equal(weights.mu, expected.mu)
        assert weights.of == expected.of
        assert weights.undone == expected.undone
    addresses = [x.data_ptr() for weights, _ in kept for x in (*weights.of.values(), *weights.undone.values())]
    assert len(set(addresses)) == 4 * len(kept)
    (slot,) = new_slots(1)
    assert [x.data_ptr() for x in slot.tensors] == [slot.address + 4 * k for k in range(4)]


def test_a_weight_is_a_leaf_that_a_loss_may_be_multiplied_by():
    x = torch.tensor(2.0, requires_grad=True)
    weights = HostWeights(0.25)
    losses = [weight * x for weight in weights.of.values()]
    HostWeights(0.5)  # the next one writes elsewhere
    sum(losses).backward()
    assert x.grad == 1.0

"""Inputs that several layers share are projected once; what is measured is what it would be without."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import gac
import gac.sequences.shared
from gac.sequences.layers import find_layers
from gac.sequences.shared import Projections, share_signs


class Attention(nn.Module):
    """Three layers of one input, with or without biases, and one of another input of the same size."""

    def __init__(self, bias: bool):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(24, size, bias=bias) for size in (24, 16, 16))
        self.o = nn.Linear(24, 24, bias=bias)

    def forward(self, x):
        return self.o(torch.tanh(self.q(x)) * torch.cat([self.k(x), self.v(x)[..., :8]], -1))


def net(bias: bool = True) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 24), Attention(bias), nn.Linear(24, 3))


def a_step(model):
    with gac.patch(model, estimator="sequence", sketch_size=8, interval=1) as mixer:
        generator = torch.Generator().manual_seed(1)
        for branch in (mixer.sft, mixer.rl):
            with branch():
                mixer.backward(model(torch.randn(5, 4, 8, generator=generator)).square().mean())
        mixer.step()
        return mixer.statistics


@pytest.fixture
def projected(monkeypatch):
    """Inputs that were projected for several layers."""
    found = []
    real = gac.sequences.shared.signs_of
    monkeypatch.setattr(gac.sequences.shared, "signs_of", lambda *a: (found.append(a[0]), real(*a))[1])
    return found


@pytest.mark.parametrize("bias", [True, False])
def test_one_projection_for_each_input(bias, projected, monkeypatch):
    """Statistics are those of projecting for every layer, and the check against the gradients finds nothing."""
    shared = a_step(net(bias))
    assert len(projected) == 2 * 2  # the input of q, k, v and that of o, in two passes
    real = Projections.of
    monkeypatch.setattr(Projections, "of", lambda self, *args, **options: real(Projections(), *args, **options))
    apart = a_step(net(bias))
    assert len(projected) == 4 + 2 * 4
    for name in ("sigma_s2", "sigma_r2", "distance2", "dot"):
        torch.testing.assert_close(getattr(shared, name), getattr(apart, name), rtol=1e-5, atol=0)


def test_shared_signs_do_not_bias():
    """Over 200 draws of signs the means are within 4 standard errors of the exact gradients'."""
    model, names = net(), ("norm_s2", "norm_r2", "dot")
    generator = torch.Generator().manual_seed(1)
    batches = [torch.randn(5, 4, 8, generator=generator) for _ in range(2)]
    found = {}
    for estimator, steps in (("exact", 1), ("sequence", 200)):
        rows = []
        with gac.patch(model, estimator=estimator, sketch_size=8, interval=1, report_interval=None) as mixer:
            for _ in range(steps):
                model.zero_grad()
                for branch, batch in zip((mixer.sft, mixer.rl), batches, strict=True):
                    with branch():
                        mixer.backward(model(batch).square().mean())
                mixer.step()
                rows.append([float(getattr(mixer.statistics, name)) for name in names])
        found[estimator] = torch.tensor(rows, dtype=torch.float64)
    draws = found["sequence"]
    assert ((draws.mean(0) - found["exact"][0]).abs() < 4 * draws.std(0) / len(draws) ** 0.5).all()


def test_who_shares():
    model = nn.ModuleDict({"a": Attention(True), "b": Attention(True)})
    layers = find_layers(model, list(model.named_parameters()), 8)
    share_signs(layers.seen)
    groups: dict[int, set[str]] = {}
    for layer in layers.seen:
        groups.setdefault(layer.weight.inputs, set()).add(layer.name)
    assert sorted(map(sorted, groups.values())) == [[f"{module}.{layer}" for layer in "koqv"] for module in "ab"]
    whole = find_layers(model, list(model.named_parameters()), 64)  # no side is projected: each is taken as it is
    share_signs(whole.seen)
    assert not any(slot.shares for slot in whole.slots)


def test_another_input_at_the_same_place_is_another():
    """Memory that was freed and given out again, and an input that was written to."""
    model = net()
    layers = find_layers(model, list(model.named_parameters()), 8)
    share_signs(layers.seen)
    slot = next(slot for slot in layers.slots if slot.shares)
    keys, projections = torch.tensor([1, 3, 5, 7]), Projections()
    of = lambda x: projections.of(x, slot, keys, ones=True, wide=torch.float32)
    memory = torch.randn(4096)
    x = memory[:240].view(10, 24)
    first = of(x)
    assert of(memory[:240].view(10, 24)) is first
    x.add_(1.0)
    assert of(x) is not first
    gone = torch.randn(10, 24)
    second = of(gone)
    del gone
    again = torch.randn(10, 24)
    projections._known = (again.data_ptr(), *projections._known[1:])  # as if it had been given the same place
    assert of(again) is not second

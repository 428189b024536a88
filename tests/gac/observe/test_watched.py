"""Which parameters can be watched: the others are refused by name when the model is patched, not in backward."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import gac

EIGHT_BITS = [d for n in dir(torch) if n.startswith("float8_") and isinstance(d := getattr(torch, n), torch.dtype)]


class Model(nn.Module):
    def __init__(self, odd: nn.Parameter):
        super().__init__()
        self.layer = nn.Linear(4, 2)
        self.inner = nn.Module()
        self.inner.odd = odd


class Packed(nn.Parameter):
    """A parameter whose integers train, as packages for quantised training subclass them: torch itself has none."""

    @staticmethod
    def __new__(cls, data):
        return nn.Parameter.__new__(cls, data, requires_grad=False)

    requires_grad = True


def refused(model: nn.Module, *words: str) -> None:
    with pytest.raises(TypeError) as caught:
        gac.patch(model)
    message = str(caught.value)
    for word in ("'inner.odd'", "requires_grad_(False)", *words):
        assert word in message, message
    assert not model.layer.weight._backward_hooks, "nothing was patched"
    with gac.patch(model.layer):  # and nothing is taken for patched
        pass


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128, torch.complex32])
def test_complex_parameters_are_refused(dtype):
    refused(Model(nn.Parameter(torch.zeros(3, dtype=dtype))), "complex", str(dtype), "view_as_real")


@pytest.mark.parametrize("dtype", EIGHT_BITS)
def test_parameters_of_8_bits_are_refused(dtype):
    refused(Model(nn.Parameter(torch.empty(4, dtype=dtype))), "8 bits", str(dtype), "bfloat16")


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32, torch.int64, torch.bool])
def test_trainable_integers_are_refused(dtype):
    refused(Model(Packed(torch.zeros(3, dtype=dtype))), "integers or quantised", str(dtype), "adapters")


def quantised() -> torch.Tensor:
    return torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)


def test_trainable_quantised_parameters_are_refused():
    refused(Model(Packed(quantised())), "integers or quantised", "torch.qint8", "dequantize")


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float8_e4m3fn, torch.uint8, torch.bool])
def test_frozen_ones_are_nobodys_business(dtype):
    model = Model(nn.Parameter(torch.zeros(3, dtype=dtype), requires_grad=False))
    with gac.patch(model) as mixer:
        with mixer.sft():
            mixer.backward(model.layer(torch.ones(1, 4)).sum())
        mixer.step()
        assert float(mixer.statistics.n_s) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_real_floating_point_is_watched(dtype):
    model = Model(nn.Parameter(torch.ones(3, dtype=dtype)))
    with gac.patch(model, estimator="exact", law="fixed", mu=0.5) as mixer:
        with mixer.sft():
            mixer.backward((2 * model.inner.odd).sum())
        mixer.step()
        assert float(mixer.statistics.norm_s2) == 12.0


def test_float4_is_refused_too():
    dtype = getattr(torch, "float4_e2m1fn_x2", None)
    if dtype is None:
        pytest.skip("this torch has no such dtype")
    refused(Model(nn.Parameter(torch.empty(4, dtype=dtype))), str(dtype))

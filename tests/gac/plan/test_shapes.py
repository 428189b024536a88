"""Parameter lists of Llama-shaped models."""

import math

import pytest
import torch

from gac.plan.shapes import MODELS


@pytest.mark.parametrize(
    ("name", "parameters", "tensors"),
    [("0.1B", 134_515_008, 272), ("1B", 1_235_814_400, 146), ("8B", 8_030_261_248, 291)],
)
def test_totals_are_those_of_the_published_models(name, parameters, tensors):
    shape = MODELS[name]
    assert (shape.numel(), len(shape.shapes())) == (parameters, tensors)


@pytest.mark.parametrize("name", ["10M", "1B"])
def test_shapes_are_those_that_transformers_builds(name):
    model = MODELS[name].model(dtype=torch.bfloat16, device="meta", max_length=64)
    assert [tuple(p.shape) for p in model.parameters()] == MODELS[name].shapes()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_fewer_layers_where_room_is_short():
    shape = MODELS["8B"]
    assert shape.fitting(10**10) is shape
    cut = shape.fitting(4 * 10**9)
    assert 0 < cut.layers < 32
    assert cut.numel() <= 4 * 10**9 < cut.numel() + (shape.numel() - shape.fitting(8 * 10**9).numel())
    assert cut.numel() == sum(math.prod(s) for s in cut.shapes())
    assert shape.fitting(10**6) is None

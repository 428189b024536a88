"""Parameter lists."""

from __future__ import annotations

import pytest
import torch

from gac.plan import Parameters
from gac.plan.shapes import MODELS
from tests.gac.models import tiny_model


def test_a_number_takes_the_nearest_list():
    found = Parameters.of("70e9")
    assert found.total == 70_000_000_000
    assert len(found.numels) == len(MODELS["70B"].shapes())
    assert not found.exact
    exact = Parameters.of("70B")
    assert (exact.total, exact.exact) == (70_553_706_496, True)
    assert Parameters.of("405B").total == 405_853_388_800
    assert Parameters.of("1").total == 1


def test_a_configuration_gives_its_own_list(tmp_path):
    model = tiny_model("llama", tied=False)
    model.config.save_pretrained(tmp_path)
    assert Parameters.of(str(tmp_path)).numels == tuple(p.numel() for p in model.parameters())
    (tmp_path / "config.json").write_text('{"model_type": "nonsense"}')
    with pytest.raises(ValueError, match="no configuration of a causal language model"):
        Parameters.of(str(tmp_path))


@pytest.mark.parametrize("ranks", [3, 8, 64])
def test_shards_are_torch_chunks(ranks):
    shapes = [(100, 30), (7,), (64, 2, 5)]
    first = [torch.empty(shape).chunk(ranks)[0].numel() for shape in shapes]
    assert list(Parameters.of_shapes("m", shapes).shard(ranks).numels) == first

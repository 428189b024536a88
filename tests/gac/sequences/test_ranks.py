"""Two gloo ranks with rows of their own find what float64 gradients of all rows say, and the same mu."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace

import pytest
import torch

from gac.sequences.layers import find_layers
from tests.gac.distributed.processes import on_ranks
from tests.gac.sequences import ranks
from tests.gac.sequences.truth import assert_close, row_gradients
from tests.gac.truth import statistics

WORLD = 2


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    names = [*ranks.ENGINES, *ranks.EXPERTS, *ranks.REFUSED]
    folder = tmp_path_factory.mktemp("ranks")
    return on_ranks(WORLD, folder, ranks.run, names, preload=ranks.__name__, seconds=200)


@pytest.fixture(scope="module")
def wanted():
    return wanted_of("")


def wanted_of(name):
    """Losses are halved for two batches, and gradients averaged over two ranks."""
    model = ranks.model_of(name)
    sft, rl = [], []
    for rank in range(WORLD):
        for batch in ranks.batches_of(rank):
            for gradient, is_expert in zip(row_gradients(model, batch), batch.is_expert, strict=True):
                (sft if is_expert else rl).append(gradient / 2 / WORLD)
    return statistics(sft, rl)


@pytest.mark.parametrize("engine", ranks.ENGINES)
def test_ranks_agree_with_the_truth(found, wanted, engine):
    first, second = (rank[engine] for rank in found)
    assert first["share"] == 1
    assert first["mu"] == second["mu"]
    for name, value in first["statistics"].items():
        other = second["statistics"][name]
        assert value == other or (value != value and other != other), name
    assert_close(SimpleNamespace(**first["statistics"]), wanted, rel=0.02 if "bfloat16" in engine else 2e-4)


@pytest.mark.parametrize("engine", ranks.EXPERTS)
def test_ranks_agree_with_the_truth_of_experts(found, engine):
    for rank in found:
        assert rank[engine]["share"] == 1
        assert_close(SimpleNamespace(**rank[engine]["statistics"]), wanted_of(engine))


def test_tensor_parallel_layers_are_refused(found):
    for rank in found:
        assert "tensor parallelism" in rank["tensor parallel"]["error"]
        assert 'estimator="sketch"' in rank["tensor parallel"]["error"]


STAGES = (1, 2, 3)


@pytest.fixture(scope="module")
def zero(tmp_path_factory):
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed: `make deepspeed` runs this")
    return on_ranks(WORLD, tmp_path_factory.mktemp("zero"), ranks.zero, STAGES, preload=ranks.__name__, seconds=200)


@pytest.mark.parametrize("stage", STAGES)
def test_deepspeed_agrees_with_the_truth(zero, wanted, stage):
    first, second = (rank[stage] for rank in zero)
    assert first["share"] == 1
    assert first["mu"] == second["mu"]
    assert_close(SimpleNamespace(**first["statistics"]), wanted)


def test_shapes_of_layers_are_those_before_deepspeed_parted_them():
    """Without DeepSpeed: marked and emptied as ZeRO-3 does."""
    model = ranks.model_of()
    expected = find_layers(model, list(model.named_parameters()), 32)
    for parameter in model.parameters():
        parameter.ds_id, parameter.ds_numel, parameter.ds_shape = 1, parameter.numel(), parameter.shape
        parameter.data = torch.empty(0)
    found = find_layers(model, list(model.named_parameters()), 32)
    assert [(slot.name, slot.dims) for slot in found.slots] == [(slot.name, slot.dims) for slot in expected.slots]
    assert (found.share, found.elements) == (1, expected.elements)


def test_sources_and_demonstrations_of_all_ranks(tmp_path):
    """Two ranks tell what one tells that has all rows; their states too, and of the first rank's alone the sources."""
    found = on_ranks(WORLD, tmp_path, ranks.sources, preload=ranks.__name__, seconds=100)
    mixer = ranks.labelled_run(0, 1)
    wanted = ranks.of_sources(mixer, all_ranks=True)
    assert {label: row[0] for label, row in wanted["rows"].items()} == {"near": 36, "far": 44, "policy": 40}
    assert repr(found[0]["found"]) == repr(found[1]["found"]), "the same on every rank"
    for label, row in wanted["rows"].items():
        assert found[0]["found"]["rows"][label] == pytest.approx(row, rel=1e-4, nan_ok=True), label
    index, *numbers = found[0]["found"]["alignment"]
    assert index == wanted["alignment"][0]
    for got, want in zip(numbers, wanted["alignment"][1:], strict=True):
        assert got == pytest.approx(want, rel=1e-4, abs=1e-5)
    assert sum(rank["own"] for rank in found) == sum(numbers[2])
    assert 0 < found[0]["own"] < sum(numbers[2]), "each rank has seen a part"
    for rank in found:
        assert repr(rank["restored"]) == repr(rank["found"])  # numbers of policy are NaN
        assert repr(rank["first"]["rows"]) == repr(rank["found"]["rows"])
        assert sum(rank["first"]["alignment"][3]) == found[0]["own"], "the first rank's, once"


def test_fsdp1_without_parameters_of_layers_is_refused(found):
    for rank in found:
        assert "use_orig_params=True" in rank["fsdp1, flat"]["error"]

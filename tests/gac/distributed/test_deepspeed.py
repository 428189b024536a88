"""DeepSpeed's ZeRO. What needs DeepSpeed runs where it is installed; `make deepspeed` does."""

from __future__ import annotations

import importlib.util
import os
import sys
import types
import warnings

import pytest
import torch
from torch import nn

import gac
from tests.gac.distributed import engines
from tests.gac.distributed.processes import on_ranks
from tests.gac.models import tiny_model

CASES = {
    **{f"ZeRO-{s}, {estimator}": (s, estimator, {}) for s in (1, 2, 3) for estimator in ("exact", "sketch")},
    "ZeRO-1, offload": (1, "sketch", {"offload": True}),
    "ZeRO-2, offload": (2, "sketch", {"offload": True}),
    "ZeRO-3, offload": (3, "sketch", {"offload": True}),
    "ZeRO-2, bfloat16": (2, "exact", {"bfloat16": True}),
    "ZeRO-3, bfloat16": (3, "exact", {"bfloat16": True}),
}
"""Name: stage, estimator, options."""


# -- without DeepSpeed ------------------------------------------------------------------------------------------------


def managed_model(mark: str = "_hp_mapping") -> nn.Module:
    """A model as DeepSpeed marks it."""
    model = nn.Linear(4, 3)
    for number, parameter in enumerate(model.parameters()):
        setattr(parameter, mark, number)
    return model


def test_incoming_gradients_are_read_in_a_single_process_too():
    """``p.grad`` is gone by the time a hook after DeepSpeed's runs."""
    model, plain = managed_model(), nn.Linear(4, 3)
    plain.load_state_dict(model.state_dict())
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    found = []
    for module in (model, plain):
        with gac.patch(module, estimator="sketch") as mixer:
            for branch, sign in ((mixer.sft, 1.0), (mixer.rl, -1.0)):
                with branch():
                    for k in range(3):
                        mixer.backward(sign * module(torch.full((1, 4), 1.0 + k)).square().sum())
            mixer.step()
            found.append(mixer.statistics.stacked())
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-6 * float(found[1].nan_to_num().abs().max()), equal_nan=True)


def test_empty_parameters_have_gradients_of_their_whole_shape():
    model = managed_model("ds_id")
    for parameter in model.parameters():
        parameter.ds_numel = parameter.numel()
        parameter.data = torch.empty(0)
    with gac.patch(model, estimator="exact") as mixer:
        assert [ledger.layout.size for ledger in mixer._observer.ledgers] == [15]


def test_patched_before_deepspeed():
    model = nn.Linear(4, 3)
    mixer = gac.patch(model)
    for parameter in model.parameters():
        parameter._hp_mapping = None
    with pytest.raises(RuntimeError, match=r"deepspeed\.initialize first"), mixer.sft():
        pass


def test_options_that_do_not_apply():
    model = managed_model()
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(ValueError, match="ends the accumulation"):
        gac.patch(model, optimizer=optimizer)
    with pytest.raises(ValueError, match="flat pieces"):
        gac.patch(model, metric="optimizer")


@pytest.mark.parametrize(
    ("version", "stage", "offload", "micro_batches", "warns"),
    [
        ("0.18.9", 2, True, 1, True),
        ("0.18.9", 2, True, 2, False),
        ("0.18.9", 2, True, 4, True),
        ("0.18.9+abc", 1, True, 1, True),
        ("0.18.9", 1, True, 4, False),
        ("0.18.9", 3, True, 1, False),
        ("0.18.9", 2, False, 4, False),
        ("0.19.0", 2, True, 4, False),
        ("0.19.8", 1, True, 1, False),
        ("1.0.0", 1, True, 1, False),
    ],
)
def test_releases_that_lose_gradients_are_named(version, stage, offload, micro_batches, warns, monkeypatch):
    class Engine(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = managed_model()

        def zero_optimization_stage(self):
            return stage

        def zero_cpu_offload(self):
            return offload

        def gradient_accumulation_steps(self):
            return micro_batches

    package = types.SimpleNamespace(__version__=version, DeepSpeedEngine=Engine)
    monkeypatch.setitem(sys.modules, "deepspeed", package)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        gac.patch(Engine()).unpatch()
    told = [str(w.message) for w in caught if "drops gradients" in str(w.message)]
    assert bool(told) is warns
    if warns:
        assert version in told[0]
        assert "deepspeed>=0.19.0" in told[0]


# -- with DeepSpeed ---------------------------------------------------------------------------------------------------


def train(rank: int, world: int, names: list[str]) -> dict:
    return {name: train_one(rank, world, *CASES[name]) for name in names}


def train_one(rank, world, stage, estimator, options):
    """The steps of every other engine, through DeepSpeed's; mu, statistics and the parameters at the end."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # or a compiler is needed
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 2 * engines.MICRO_BATCHES,
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": 5000,  # several buckets, and most parameters partitioned
            "stage3_param_persistence_threshold": 100,
        },
        "gradient_clipping": 0.0,  # 1.0 is the default
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    if options.get("offload"):
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    if options.get("bfloat16"):
        config["bf16"] = {"enabled": True}
    model = tiny_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    with gac.patch(engine, estimator=estimator) as mixer:

        def backward(loss):
            engine.backward(mixer.weight * loss, scale_wrt_gas=False)
            engine.step()

        found = engines.train(mixer, engine, [rank], world, backward=backward)
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        found["parameters"] = [p.detach().float().clone() for p in engine.module.parameters()]
    engine.destroy()
    return found


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[int, list[dict]]:
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed: `make deepspeed` runs this")
    options = {"preload": "tests.gac.distributed.test_deepspeed", "seconds": 240}
    single = [name for name in CASES if "bfloat16" not in name]
    return {
        2: on_ranks(2, tmp_path_factory.mktemp("two"), train, list(CASES), **options),
        1: on_ranks(1, tmp_path_factory.mktemp("one"), train, single, **options),
    }


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("world", "case"), [(2, name) for name in CASES] + [(1, name) for name in CASES if "bfloat16" not in name]
)
def test_equal_to_one_process_without_deepspeed(results, world, case):
    _, estimator, options = CASES[case]
    ranks = [found[case] for found in results[world]]
    assert all(rank["mu"] == ranks[0]["mu"] for rank in ranks)
    for rank in ranks:
        for one, other in zip(rank["parameters"], ranks[0]["parameters"], strict=True):
            assert torch.equal(one, other)
    model = tiny_model()
    expected = engines.alone(world, together=False, model=model, estimator=estimator)
    rel = 0.02 if options.get("bfloat16") else 1e-5  # three digits of bfloat16 gradients
    assert ranks[0]["mu"] == pytest.approx(expected["mu"], rel=rel)
    for ours, theirs in zip(ranks[0]["statistics"], expected["statistics"], strict=True):
        for name, value in theirs.items():
            assert ours[name] == pytest.approx(value, rel=rel, abs=rel * theirs["distance2"]), name
    for one, other in zip(ranks[0]["parameters"], model.parameters(), strict=True):
        torch.testing.assert_close(one, other.detach(), rtol=rel, atol=rel * float(other.detach().abs().max()))

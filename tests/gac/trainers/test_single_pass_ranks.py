"""Two ranks with one pass for both branches, under every engine: the same training and the same numbers."""

import importlib.util

import pytest

from tests.gac.trainers.ranks import launch

pytestmark = pytest.mark.timeout(300)

OPTIONS = {
    "max_steps": 3,
    "gradient_accumulation_steps": 2,
    "estimator": "sequence",
    "gac_interval": 1,
    "gac_sequences": {"sketch_size": 64},
}


def zero(stage):
    """DeepSpeed's configuration; the optimizer is the trainer's."""
    return {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


ENGINES = {"ddp": {}, "fsdp1": {"sharded": 1}, "fsdp2": {"sharded": 2}}
STAGES = {f"zero{stage}": {"deepspeed": zero(stage)} for stage in (2, 3)}


def on_two(folder, engines, seconds):
    return launch(str(folder), {2: {name: OPTIONS | options for name, options in engines.items()}}, seconds=seconds)[2]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return on_two(tmp_path_factory.mktemp("ranks"), ENGINES, 100)


@pytest.fixture(scope="module")
def partitioned(tmp_path_factory):
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed: `make deepspeed` runs this")
    return on_two(tmp_path_factory.mktemp("zero"), STAGES, 250)


def numbers(rank, engine):
    return {name: value for name, value in rank[engine]["numbers"].items() if name != "overhead"}


def logged(ranks, engine):
    return [entry for entry in ranks[0][engine]["history"] if "gac/mu" in entry]


@pytest.mark.parametrize("engine", ENGINES)
def test_every_rank_says_the_same(found, engine):
    first, second = found
    assert numbers(first, engine) == numbers(second, engine)
    assert first[engine]["steps"] == 3


@pytest.mark.parametrize("engine", [name for name in ENGINES if name != "ddp"])
def test_shards_train_as_replicas_do(found, engine):
    assert_same_training(logged(found, "ddp"), logged(found, engine))


@pytest.mark.parametrize("engine", STAGES)
def test_deepspeed_trains_as_replicas_do(found, partitioned, engine):
    assert numbers(partitioned[0], engine) == numbers(partitioned[1], engine)
    assert_same_training(logged(found, "ddp"), logged(partitioned, engine))


def assert_same_training(*steps):
    """Losses of later steps follow from the updates of earlier ones."""
    assert len(steps[0]) == 3
    for replicas, shards in zip(*steps, strict=True):
        assert (shards["gac/n_s"], shards["gac/n_r"]) == (16, 4)
        for name in ("loss", "gac/sft_loss", "gac/mu", "gac/sigma_s2", "gac/sigma_r2", "gac/delta_g2"):
            assert shards[name] == pytest.approx(replicas[name], rel=1e-4, abs=1e-5), name

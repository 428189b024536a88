"""What the ranks of the tests do: one step over their rows under an engine."""

from __future__ import annotations

import torch
import torch.distributed as dist

import gac
from tests.gac.models import tiny_model
from tests.gac.sequences.test_experts import model_of as experts_model
from tests.gac.sequences.truth import losses, mixed

ENGINES = (
    "ddp",
    "fsdp1",
    "fsdp1, hybrid",
    "fsdp1, bfloat16 buffers",
    "fsdp2",
    "fsdp2, bfloat16 buffers",
    "plain replicas",
)
EXPERTS = ("fsdp1, experts", "fsdp2, experts")
REFUSED = ("tensor parallel", "fsdp1, flat")


def model_of(name: str = "") -> torch.nn.Module:
    return experts_model("qwen3") if "experts" in name else tiny_model("qwen2", width=16)


def batches_of(rank: int) -> list:
    """Two batches of a step, of other rows on every rank."""
    return [mixed(4, 8, seed=10 + rank), mixed(6, 5, seed=20 + rank)]


def run(rank: int, world: int, names: list[str]) -> dict[str, dict]:
    """What each engine finds on this rank."""
    return {name: _one(name, rank) for name in names}


def _one(name: str, rank: int) -> dict:
    model = model_of(name)
    wrapped = model
    if name == "fsdp1, flat":
        return _error(fsdp1(model, name, use_orig_params=False))
    if name == "ddp":
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
    elif name.startswith("fsdp1"):
        wrapped = model = fsdp1(model, name)
    elif name.startswith("fsdp2"):
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16 if "bfloat16" in name else None)
        for layer in model.model.layers:
            fully_shard(layer, mp_policy=policy)
        fully_shard(model, mp_policy=policy)
    elif name == "tensor parallel":
        return _refused(model)
    return _step(model, wrapped, rank, name)


def _step(model: torch.nn.Module, wrapped: torch.nn.Module, rank: int, name: str, backward=torch.Tensor.backward):
    """Statistics of a step, and mu."""
    mixer = gac.patch(model, estimator="sequence", sketch_size=64, law="gac")
    batches = batches_of(rank)
    for number, batch in enumerate(batches):
        if name == "ddp":
            wrapped.require_backward_grad_sync = number == len(batches) - 1
        with mixer.batch(is_expert=batch.is_expert):
            parts = {key: loss / len(batches) for key, loss in losses(wrapped, batch).items()}
            backward(mixer.mixed_loss(**parts))
    mixer.step()
    found = {n: float(getattr(mixer.statistics, n)) for n in mixer.statistics.names()}
    return {"statistics": found, "mu": float(mixer.mu), "share": mixer.coverage.share}


def zero(rank: int, world: int, stages: tuple[int, ...]) -> dict[int, dict]:
    """What is found under each of DeepSpeed's stages."""
    import os

    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # or a compiler is needed
    return {stage: _zero(deepspeed, rank, stage) for stage in stages}


def _zero(deepspeed, rank: int, stage: int) -> dict:
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 2,
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": 500,
            "stage3_param_persistence_threshold": 100,
        },
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)

    def backward(loss: torch.Tensor) -> None:
        engine.backward(loss, scale_wrt_gas=False)
        engine.step()

    found = _step(engine, engine, rank, "zero", backward)
    engine.destroy()
    return found


def fsdp1(model: torch.nn.Module, name: str, **options) -> torch.nn.Module:
    """The model in FSDP1, each layer a unit of its own; the head and the embedding, which are tied, in the root's."""
    from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, ShardingStrategy
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    half = MixedPrecision(torch.bfloat16) if "bfloat16" in name else None
    if "hybrid" in name:
        from torch.distributed.device_mesh import init_device_mesh

        mesh = init_device_mesh("cpu", (dist.get_world_size(), 1), mesh_dim_names=("replicas", "shards"))
        options |= {"sharding_strategy": ShardingStrategy.HYBRID_SHARD, "device_mesh": mesh}
    policy = ModuleWrapPolicy({type(model.model.layers[0])})
    options = {"use_orig_params": True, "device_id": torch.device("cpu")} | options
    return FullyShardedDataParallel(model, auto_wrap_policy=policy, mixed_precision=half, **options)


def _refused(model: torch.nn.Module) -> dict:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    parallelize_module(model, mesh, {"model.layers.*.mlp.up_proj": ColwiseParallel()})
    return _error(model)


def _error(model: torch.nn.Module) -> dict:
    try:
        gac.patch(model, estimator="sequence")
    except ValueError as error:
        return {"error": str(error)}
    return {"error": ""}

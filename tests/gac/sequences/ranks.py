"""What the ranks of the tests do: one step over their rows under an engine."""

from __future__ import annotations

import torch
import torch.distributed as dist

import gac
from tests.gac.models import tiny_model
from tests.gac.sequences.truth import losses, mixed

ENGINES = ("ddp", "fsdp2", "fsdp2, bfloat16 buffers", "plain replicas")
REFUSED = ("tensor parallel",)


def model_of() -> torch.nn.Module:
    return tiny_model("qwen2", width=16)


def batches_of(rank: int) -> list:
    """Two batches of a step, of other rows on every rank."""
    return [mixed(4, 8, seed=10 + rank), mixed(6, 5, seed=20 + rank)]


def run(rank: int, world: int, names: list[str]) -> dict[str, dict]:
    """What each engine finds on this rank."""
    return {name: _one(name, rank) for name in names}


def _one(name: str, rank: int) -> dict:
    model = model_of()
    wrapped = model
    if name == "ddp":
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
    elif name.startswith("fsdp2"):
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16 if "bfloat16" in name else None)
        for layer in model.model.layers:
            fully_shard(layer, mp_policy=policy)
        fully_shard(model, mp_policy=policy)
    elif name == "tensor parallel":
        return _refused(model)
    mixer = gac.patch(model, estimator="sequence", sketch_size=64, law="gac")
    batches = batches_of(rank)
    for number, batch in enumerate(batches):
        if name == "ddp":
            wrapped.require_backward_grad_sync = number == len(batches) - 1
        with mixer.batch(is_expert=batch.is_expert):
            parts = {key: loss / len(batches) for key, loss in losses(wrapped, batch).items()}
            mixer.mixed_loss(**parts).backward()
    mixer.step()
    found = {n: float(getattr(mixer.statistics, n)) for n in mixer.statistics.names()}
    return {"statistics": found, "mu": float(mixer.mu), "share": mixer.coverage.share}


def _refused(model: torch.nn.Module) -> dict:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    parallelize_module(model, mesh, {"model.layers.*.mlp.up_proj": ColwiseParallel()})
    try:
        gac.patch(model, estimator="sequence")
    except ValueError as error:
        return {"error": str(error)}
    return {"error": ""}

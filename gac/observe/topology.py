"""How the parameters of a model lie over the ranks, and what each rank's gradient therefore stands for."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from gac.observe.deepspeed import is_managed, whole_numel


@dataclass(frozen=True)
class Topology:
    """Where contributions come from.

    Attributes:
        ranks: processes that take part in a step's statistics.
        groups: process groups to reduce over, one after the other; None is the default group. Empty for one rank.
        sharded: False for plain parameters, of which every rank holds a replica and to which it makes contributions
            of its own (one process, DDP); True for DTensors (FSDP2, tensor parallelism), where a backward pass of all
            ranks together is one contribution and every rank holds a piece of it.
        copies: for each parameter, how many ranks hold the same piece; its squares count ``1 / copies`` on each.
        managed: whether the engine takes gradients out of ``p.grad`` while a backward pass runs (DeepSpeed).
    """

    ranks: int
    groups: tuple[dist.ProcessGroup | None, ...]
    sharded: bool
    copies: tuple[int, ...]
    managed: bool = False


def local_part(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor."""
    return tensor.to_local() if is_dtensor(tensor) else tensor


def local_numel(parameter: nn.Parameter) -> int:
    """Elements that this rank sees of a parameter's gradient."""
    return local_part(parameter).numel() if is_dtensor(parameter) else whole_numel(parameter)


def local_gradient(gradient: Tensor, parameter: nn.Parameter) -> Tensor:
    """What this rank holds of a gradient, laid out as its parameter is."""
    if not is_dtensor(gradient):
        return gradient
    if gradient.placements != parameter.placements:  # partial sums, where an operation left them
        gradient = gradient.redistribute(placements=parameter.placements)
    return gradient.to_local()


def is_dtensor(tensor: Tensor) -> bool:
    """Without importing torch.distributed.tensor, which takes a second: where it is not loaded, no DTensor exists."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def topology_of(
    model: nn.Module,
    parameters: Sequence[tuple[str, nn.Parameter]],
    process_group: dist.ProcessGroup | None,
    *,
    of_layers: bool = False,
) -> Topology:
    """Reads the topology off the parameters.

    Args:
        of_layers: whether layers are watched instead of parameters: whatever FSDP1 does with these is then the same.

    Raises:
        ValueError: FSDP1 where parameters are watched, Megatron's tensor or pipeline parallelism, parameters on
            unrelated device meshes, parameters that FSDP2 leaves out, or a process group beside DTensors.
    """
    if of_layers and (wrapped := fsdp1_modules(model)):
        return _of_fsdp1(wrapped, len(parameters), process_group)
    _refuse_fsdp1(model)
    _refuse_megatron_pieces(parameters)
    sharded = [(name, p) for name, p in parameters if is_dtensor(p)]
    if not sharded:
        ranks = dist.get_world_size(process_group) if dist.is_available() and dist.is_initialized() else 1
        groups, managed = (process_group,) if ranks > 1 else (), is_managed(p for _, p in parameters)
        return Topology(ranks, groups, False, (1,) * len(parameters), managed)
    if process_group is not None:
        raise ValueError(
            "process_group= belongs to replicas (DDP); this model has DTensor parameters, whose device mesh says which "
            "ranks take part: leave it out"
        )
    largest = max(sharded, key=lambda item: item[1].device_mesh.size())
    mesh = largest[1].device_mesh
    for name, parameter in sharded:
        if not _is_part(parameter.device_mesh, mesh):
            raise ValueError(
                f"parameters {largest[0]!r} and {name!r} lie on device meshes of which neither is a part of the other "
                f"({mesh} and {parameter.device_mesh}): take both from one mesh with named dimensions"
            )
    if len(sharded) < len(parameters) and fsdp2_modules(model):
        name = next(name for name, p in parameters if not is_dtensor(p))
        raise ValueError(
            f"parameter {name!r} is left out by fully_shard while others are sharded: its gradient is not reduced, so "
            "the two cannot be measured together. Call fully_shard on the root module too, without ignored_params"
        )
    whole = mesh.size() == dist.get_world_size()
    groups = (None,) if whole else tuple(mesh.get_group(dim) for dim in range(mesh.ndim))
    return Topology(mesh.size(), groups, True, tuple(_copies(p, mesh) for _, p in parameters))


def _is_part(mesh: Any, whole: Any) -> bool:
    """Whether a mesh is some of the dimensions of another, or all."""
    return mesh == whole or set(mesh.mesh_dim_names or ("",)) < set(whole.mesh_dim_names or ())


def _copies(parameter: nn.Parameter, mesh: Any) -> int:
    """Ranks of ``mesh`` that hold the same piece: tensor parallelism leaves norms and the like whole on every rank."""
    if not is_dtensor(parameter):
        return mesh.size()
    own = parameter.device_mesh
    # a strided shard, as FSDP2 over tensor parallelism makes it, does not call itself a shard
    return mesh.size() // math.prod(own.size(d) for d, p in enumerate(parameter.placements) if not p.is_replicate())


def fsdp2_modules(model: nn.Module) -> list[nn.Module]:
    """The modules that ``fully_shard`` was called on."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return [] if fsdp is None else [m for m in model.modules() if isinstance(m, fsdp.FSDPModule)]


def has_unreduced_gradients(modules: Sequence[nn.Module]) -> bool:
    """Whether FSDP2 keeps gradients of passes with gradient sync off; False where torch does not tell."""
    for module in modules:
        group = getattr(module._get_fsdp_state(), "_fsdp_param_group", None)
        for parameter in getattr(group, "fsdp_params", ()):
            unsharded = getattr(parameter, "_unsharded_param", None)
            if getattr(parameter, "unsharded_accumulated_grad", None) is not None or (
                unsharded is not None and unsharded.grad is not None
            ):
                return True
    return False


def _refuse_megatron_pieces(parameters: Sequence[tuple[str, nn.Parameter]]) -> None:
    """Megatron-Core marks its parameters (``tensor_model_parallel``) and knows whether ranks hold pieces of them."""
    state = sys.modules.get("megatron.core.parallel_state")
    if state is None or not any(hasattr(p, "tensor_model_parallel") for _, p in parameters):
        return
    if not state.model_parallel_is_initialized():
        return
    tensor, pipeline = state.get_tensor_model_parallel_world_size(), state.get_pipeline_model_parallel_world_size()
    if tensor > 1 or pipeline > 1:
        raise ValueError(
            f"this is a Megatron model over {tensor} tensor-parallel and {pipeline} pipeline-parallel ranks, which "
            "hold different pieces of it in plain tensors: taken for replicas, they would arrive at different mu. "
            "Use data parallelism alone, or parallelize_module and FSDP2, whose DTensors say what they hold"
        )


def fsdp1_modules(model: nn.Module) -> list[nn.Module]:
    """The modules that are wrapped in ``FullyShardedDataParallel``, the outermost first."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return [] if fsdp is None else [m for m in model.modules() if isinstance(m, fsdp.FullyShardedDataParallel)]


def _of_fsdp1(wrapped: Sequence[nn.Module], count: int, process_group: dist.ProcessGroup | None) -> Topology:
    """Ranks with rows of their own: those over which the model is sharded, with hybrid sharding all of them."""
    own: Any = wrapped[0]
    if process_group is None and not hasattr(own, "_inter_node_pg"):
        process_group = own.process_group
    ranks = dist.get_world_size(process_group)
    return Topology(ranks, (process_group,) if ranks > 1 else (), True, (1,) * count)


def _refuse_fsdp1(model: nn.Module) -> None:
    if fsdp1_modules(model):
        raise ValueError(
            "the model is wrapped in FullyShardedDataParallel (FSDP1), which flattens parameters and frees their "
            'gradients: use torch.distributed.fsdp.fully_shard (FSDP2), or estimator="sequence"'
        )

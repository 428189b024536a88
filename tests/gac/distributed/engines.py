"""The engines under test: how each prepares a model, and a training loop that every one of them runs.

The same loop runs in one process over the data of all ranks, which is what the ranks together must agree with.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import gac
from tests.gac.models import rl_loss, sft_loss, tiny_model, tokens

DEVICE = "cpu"
"""Where models and batches are; ``test_gpu.py`` sets it in its processes."""

STEPS, MICRO_BATCHES = 3, 2
NUMBERS = ("sigma_s2", "sigma_r2", "delta_g2", "distance2", "norm_s2", "norm_r2", "dot", "n_s", "n_r", "nonfinite")


@dataclass(frozen=True)
class Plan:
    """What each rank contributes: micro-batches of both branches in a step, and what becomes of their losses."""

    sft: Callable[[int, int], int] = lambda rank, world: MICRO_BATCHES
    rl: Callable[[int, int], int] = lambda rank, world: MICRO_BATCHES
    loss_factor: Callable[[int, int, int], float] = lambda step, rank, micro: 1.0


UNIFORM = Plan()
UNEVEN = Plan(sft=lambda rank, world: 1 + rank, rl=lambda rank, world: MICRO_BATCHES + world - rank)
WITHOUT_DEMONSTRATIONS = Plan(sft=lambda rank, world: 0 if rank == 0 else MICRO_BATCHES)
WITHOUT_ROLLOUTS = Plan(rl=lambda rank, world: 0 if rank == world - 1 else MICRO_BATCHES)
LAST_ONE_EMPTY = Plan(loss_factor=lambda step, rank, micro: 0.0 if rank == 1 and micro == MICRO_BATCHES - 1 else 1.0)
NOT_A_NUMBER = Plan(loss_factor=lambda step, rank, micro: float("nan") if step == 1 and rank == 1 else 1.0)


def batch(step: int, number: int, rank: int, micro: int) -> torch.Tensor:
    return tokens(1, 10_000 * step + 1000 * number + 10 * rank + micro)[0].to(DEVICE)


def new_model(**options) -> nn.Module:
    return tiny_model(**options).to(DEVICE)


def train(
    mixer, model, ranks, world, *, plan=UNIFORM, steps=STEPS, together=False, quiet=None, backward=None, reduce=None
):
    """Steps over the micro-batches of ``ranks`` (the own one, or all of them in a single process).

    Args:
        together: one backward pass for the micro-batch of all ``ranks``, as sharded engines have it.
        quiet: context for the passes that do not synchronise, given (branch number, is last micro-batch).
        backward: in place of ``mixer.backward``.
        reduce: averages the gradients over ranks, where no engine does.

    Returns:
        The mu and the statistics after every step.
    """
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    backward = backward or mixer.backward
    mus, found = [], []
    for step in range(steps):
        for number, (branch, loss, count) in enumerate(((mixer.sft, sft_loss, plan.sft), (mixer.rl, rl_loss, plan.rl))):
            with branch():
                counts = {rank: count(rank, world) for rank in ranks}
                for micro in range(max(counts.values())):
                    losses = []
                    for rank in ranks:
                        if micro >= counts[rank]:
                            continue
                        factor = plan.loss_factor(step, rank, micro) / MICRO_BATCHES / len(ranks)
                        value = factor * loss(model, batch(step, number, rank, micro))
                        if together:
                            losses.append(value)
                            continue
                        last = micro == counts[rank] - 1
                        with quiet(number, last) if quiet else contextlib.nullcontext():
                            backward(value)
                    if losses:
                        backward(sum(losses))
        if reduce:
            reduce()
        if not any(p.grad is not None and not p.grad.isfinite().all() for p in model.parameters()):
            optimizer.step()
        mixer.step()
        optimizer.zero_grad()
        mus.append(float(mixer.mu))
        found.append({name: float(getattr(mixer.statistics, name)) for name in NUMBERS})
    return {"mu": mus, "statistics": found}


def weighed(mixer):
    """A pass that somebody else runs over a marked loss, divided and scaled back."""
    return lambda loss: (2.0 * (mixer.weigh(loss) / 2.0)).backward()


def alone(world: int, *, together: bool, plan: Plan = UNIFORM, model: nn.Module | None = None, **options):
    """The same in one process."""
    model = new_model() if model is None else model
    with gac.patch(model, **options) as mixer:
        return train(mixer, model, list(range(world)), world, plan=plan, together=together)


def whole_parameters(model: nn.Module) -> list[torch.Tensor]:
    return [getattr(p, "full_tensor", lambda p=p: p)().detach().clone() for p in model.parameters()]


# -- replicas ---------------------------------------------------------------------------------------------------------


def ddp(*, no_sync=False, weigh=False, **options):
    def run(rank, world, plan=UNIFORM, *, width=32, **patch_options):
        model = DistributedDataParallel(new_model(width=width), **options)
        quiet = (
            (lambda number, last: contextlib.nullcontext() if number == 1 and last else model.no_sync())
            if no_sync
            else None
        )
        with gac.patch(model, **patch_options) as mixer:
            backward = weighed(mixer) if weigh else None
            found = train(mixer, model, [rank], world, plan=plan, quiet=quiet, backward=backward)
            return found | {"parameters": whole_parameters(model)}

    return run


def by_hand(rank, world, plan=UNIFORM, **patch_options):
    """No engine: gradients averaged by hand, so that ranks may have any number of passes."""
    model = new_model()

    def reduce():
        for parameter in model.parameters():
            dist.all_reduce(parameter.grad)
            parameter.grad /= world

    with gac.patch(model, **patch_options) as mixer:
        found = train(mixer, model, [rank], world, plan=plan, reduce=reduce)
        return found | {"parameters": whole_parameters(model)}


def main_grad(rank, world, plan=UNIFORM, **patch_options):
    """Gradients in buffers of the trainer's own, reduced before the optimizer's step."""
    model = new_model()
    for parameter in model.parameters():
        parameter.main_grad = torch.zeros_like(parameter)
        parameter.register_post_accumulate_grad_hook(_into_main_grad)

    def backward(loss):
        (loss * mixer.weight).backward()
        mixer.observe("main_grad")

    def reduce():
        for parameter in model.parameters():
            dist.all_reduce(parameter.main_grad)
            parameter.grad = parameter.main_grad / world
            parameter.main_grad.zero_()

    with gac.patch(model, hooks=False, **patch_options) as mixer:
        found = train(mixer, model, [rank], world, plan=plan, backward=backward, reduce=reduce)
        return found | {"parameters": whole_parameters(model)}


def _into_main_grad(parameter):
    parameter.main_grad += parameter.grad
    parameter.grad = None


def scaled(rank, world, **patch_options):
    """float16-style loss scaling under DDP; the scale changes between steps."""
    model = DistributedDataParallel(new_model())
    scaler = torch.amp.GradScaler(DEVICE, init_scale=1024.0, growth_interval=1, growth_factor=2.0)
    with gac.patch(model, scaler=scaler, **patch_options) as mixer:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        mus, found = [], []
        for step in range(STEPS):
            for number, (branch, loss) in enumerate(((mixer.sft, sft_loss), (mixer.rl, rl_loss))):
                with branch():
                    for micro in range(MICRO_BATCHES):
                        value = loss(model, batch(step, number, rank, micro)) / MICRO_BATCHES
                        mixer.backward(scaler.scale(value))
            scaler.step(optimizer)
            scaler.update()
            mixer.step()
            optimizer.zero_grad()
            mus.append(float(mixer.mu))
            found.append({name: float(getattr(mixer.statistics, name)) for name in NUMBERS})
    return {"mu": mus, "statistics": found, "parameters": whole_parameters(model)}


# -- shards -----------------------------------------------------------------------------------------------------------


def shard(model: nn.Module, mesh, **options) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def fsdp(
    *,
    replicate: int = 1,
    sync_last_only: bool = False,
    dtype: torch.dtype | None = None,
    offload: bool = False,
    weigh: bool = False,
):
    def run(rank, world, plan=UNIFORM, *, width=32, **patch_options):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy

        shape = (replicate, world // replicate) if replicate > 1 else (world,)
        names = ("replicate", "shard") if replicate > 1 else ("shard",)
        options = {}
        if dtype is not None:
            options["mp_policy"] = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
        if offload:
            options["offload_policy"] = CPUOffloadPolicy(pin_memory=False)
        model = shard(new_model(width=width), init_device_mesh(DEVICE, shape, mesh_dim_names=names), **options)

        @contextlib.contextmanager
        def quiet(number, last):
            model.set_requires_gradient_sync(last)
            yield

        with gac.patch(model, **patch_options) as mixer:
            backward = weighed(mixer) if weigh else None
            quiet = quiet if sync_last_only else None
            found = train(mixer, model, [rank], world, plan=plan, quiet=quiet, backward=backward)
            return found | {"parameters": whole_parameters(model)}

    return run


def tensor_parallel(*, data_parallel: int = 1):
    def run(rank, world, plan=UNIFORM, **patch_options):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

        ways = world // data_parallel
        model = new_model(tied=False)
        if data_parallel > 1:
            mesh = init_device_mesh(DEVICE, (data_parallel, ways), mesh_dim_names=("dp", "tp"))
            tp, dp_rank = mesh["tp"], rank // ways
        else:
            tp, dp_rank = init_device_mesh(DEVICE, (world,), mesh_dim_names=("tp",)), 0
        for layer in model.model.layers:
            parallelize_module(
                layer.mlp,
                tp,
                {"gate_proj": ColwiseParallel(), "up_proj": ColwiseParallel(), "down_proj": RowwiseParallel()},
            )
        if data_parallel > 1:
            shard(model, mesh["dp"])
        with gac.patch(model, **patch_options) as mixer:
            found = train(mixer, model, [dp_rank], data_parallel, plan=plan)
            return found | {"parameters": whole_parameters(model)}

    return run


# -- accelerate -------------------------------------------------------------------------------------------------------


def accelerated(*, sharded: bool = False):
    """Around either; its ``backward`` does the pass, so the loss is weighted by hand."""

    def run(rank, world, plan=UNIFORM, **patch_options):
        from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(reset_partial_state=True)
        accelerator = Accelerator(cpu=True)
        assert accelerator.num_processes == world
        model = new_model()
        if sharded:
            # accelerate shards on accelerators alone; everything else of its way there is taken
            AcceleratorState._shared_state["distributed_type"] = DistributedType.FSDP
            AcceleratorState._shared_state["fsdp_plugin"] = FullyShardedDataParallelPlugin(fsdp_version=2)
            model, _ = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
        else:
            model = accelerator.prepare(model)
        with gac.patch(model, **patch_options) as mixer:
            backward = lambda loss: accelerator.backward(loss * mixer.weight)
            found = train(mixer, model, [rank], world, plan=plan, backward=backward)
            return found | {"parameters": whole_parameters(model)}

    return run


# -- mistakes ---------------------------------------------------------------------------------------------------------


def one_step(mixer, model, rank):
    for number, (branch, loss) in enumerate(((mixer.sft, sft_loss), (mixer.rl, rl_loss))):
        with branch():
            mixer.backward(loss(model, batch(0, number, rank, 0)))
    mixer.step()


def patched_too_early(rank, world, **options):
    from torch.distributed.device_mesh import init_device_mesh

    model = new_model()
    mixer = gac.patch(model, **options)
    one_step(mixer, shard(model, init_device_mesh(DEVICE, (world,))), rank)


def deep_copied(rank, world, **options):
    import copy

    model = new_model()
    mixer = gac.patch(model, **options)
    one_step(mixer, DistributedDataParallel(copy.deepcopy(model)), rank)


def assigned(rank, world, **options):
    model = new_model()
    mixer = gac.patch(model, **options)
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
    one_step(mixer, DistributedDataParallel(model), rank)


def lost_on_one_rank(rank, world, **options):
    model = new_model()
    mixer = gac.patch(model, **options)
    if rank == 1:
        mixer._observer.remove()
    one_step(mixer, model, rank)


def sync_off_at_the_end_of_a_branch(rank, world, **options):
    from torch.distributed.device_mesh import init_device_mesh

    model = shard(new_model(), init_device_mesh(DEVICE, (world,)))
    mixer = gac.patch(model, **options)
    model.set_requires_gradient_sync(False)
    one_step(mixer, model, rank)


MISTAKES = {
    "patched too early": (patched_too_early, "patch the model after"),
    "deep-copied": (deep_copied, "copy.deepcopy"),
    "assigned": (assigned, "assign=True"),
    "hooks lost on one rank": (lost_on_one_rank, "1 of"),
    "sync off at the end of a branch": (sync_off_at_the_end_of_a_branch, "leave sync on in the last pass"),
}
"""What users get wrong, and what the error must say; in the first step, on every rank."""

"""Everything that is run on several ranks, by name; each case gets (rank, world, folder) and returns what to check."""

from __future__ import annotations

import functools
import os
import traceback

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import gac
import gac.observe.ledger
from tests.gac.distributed import engines
from tests.gac.models import rl_loss, sft_loss, tiny_model

REPLICAS = {
    "ddp": engines.ddp(),
    "ddp, no_sync": engines.ddp(no_sync=True),
    "ddp, gradient_as_bucket_view": engines.ddp(no_sync=True, gradient_as_bucket_view=True),
    "ddp, static_graph": engines.ddp(static_graph=True),
    "ddp, find_unused_parameters": engines.ddp(find_unused_parameters=True),
    "ddp, weigh": engines.ddp(weigh=True),
    "averaged by hand": engines.by_hand,
    "main_grad": engines.main_grad,
    "accelerate": engines.accelerated(),
    "loss scaling": engines.scaled,
}
"""Engines in which every rank makes contributions of its own."""

SHARDS = {
    "fsdp2": engines.fsdp(),
    "fsdp2, cpu offload": engines.fsdp(offload=True),
    "fsdp2, weigh": engines.fsdp(weigh=True),
    "accelerate, fsdp2": engines.accelerated(sharded=True),
}
"""Engines in which the ranks share contributions."""

TWICE_ON_FOUR = {"ddp, no_sync", "averaged by hand", "main_grad", "fsdp2"}
"""Which of them run on four ranks with both estimators; the others with one."""

PLANS = {
    "uneven branches": engines.UNEVEN,
    "a rank without demonstrations": engines.WITHOUT_DEMONSTRATIONS,
    "a rank without rollouts": engines.WITHOUT_ROLLOUTS,
    "an empty last micro-batch": engines.LAST_ONE_EMPTY,
    "a rank with NaN": engines.NOT_A_NUMBER,
}

ESTIMATORS = ("exact", "sketch")

ON_FOUR = [
    (name, estimator)
    for name in (*REPLICAS, *SHARDS)
    for estimator in ESTIMATORS
    if estimator == "exact" or name in TWICE_ON_FOUR
]


def compressed(rank, world, folder):
    """The sketch where elements share buckets: replicas have one map, shards one for each rank."""
    found = {}
    size, gac.observe.ledger.SMALLEST_SKETCH = gac.observe.ledger.SMALLEST_SKETCH, BUCKETS
    try:
        for kind in ("ddp", "fsdp2"):
            run = REPLICAS["ddp, no_sync"] if kind == "ddp" else SHARDS["fsdp2"]
            found[kind] = run(rank, world, estimator="sketch", width=WIDTH)
    finally:
        gac.observe.ledger.SMALLEST_SKETCH = size
    return found


def groups_of_two(rank, world, folder):
    """Two pairs of ranks that train a model each; ``process_group`` says who belongs together."""
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    group = groups[rank // 2]
    model = tiny_model()

    def reduce():
        for parameter in model.parameters():
            dist.all_reduce(parameter.grad, group=group)
            parameter.grad /= 2

    with gac.patch(model, estimator="exact", process_group=group) as mixer:
        found = engines.train(mixer, model, [rank % 2 if rank < 2 else 10 + rank % 2], 2, reduce=reduce)
    return found | {"parameters": engines.whole_parameters(model)}


BUCKETS, WIDTH = 8192, 128
"""Of the compressed sketch, and of a model with matrices that are large enough for it."""


def twenty_steps_of_ddp(rank, world, folder):
    """Parameters after DDP with the patch, and after the same loop by hand with the same weights."""
    kept = {}
    for kind in ("patched", "by hand"):
        model = DistributedDataParallel(tiny_model())
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        mixer = gac.patch(model) if kind == "patched" else None
        weights = kept.setdefault("weights", [])
        for step in range(20):
            if mixer is not None:
                weights.append(mixer.mu.clone())
            for number, (name, loss) in enumerate((("sft", sft_loss), ("rl", rl_loss))):
                value = loss(model, engines.batch(step, number, rank, 0))
                if mixer is not None:
                    with getattr(mixer, name)():
                        mixer.backward(value)
                else:
                    ((weights[step] if number == 0 else 1.0 - weights[step]) * value).backward()
            optimizer.step()
            if mixer is not None:
                mixer.step()
            optimizer.zero_grad()
        kept[kind] = engines.whole_parameters(model)
    return kept


def communication(rank, world, folder):
    """Collectives of a step and their bytes, beside the gradient's."""
    calls: list[int] = []
    original = dist.all_reduce

    @functools.wraps(original)
    def counted(tensor, *args, **kwargs):
        calls.append(tensor.nbytes)
        return original(tensor, *args, **kwargs)

    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (world,))
    found = {}
    dist.all_reduce = counted
    try:
        for kind in ("ddp", "fsdp2"):
            model = DistributedDataParallel(tiny_model()) if kind == "ddp" else engines.shard(tiny_model(), mesh)
            with gac.patch(model, estimator="sketch", report_interval=None) as mixer:
                calls.clear()
                engines.train(mixer, model, [rank], world, steps=4)
                _ = mixer.mu
            gradient = sum(p.numel() * p.element_size() for p in model.parameters())
            found[kind] = {"calls": list(calls), "steps": 4, "gradient": gradient}
    finally:
        dist.all_reduce = original
    return found


def overlap(rank, world, folder):
    """What ``step`` returns while its collective is under way, and when it is waited for."""
    model = DistributedDataParallel(tiny_model())
    mixer = gac.patch(model)
    returned, pending = [], []
    for step in range(3):
        for number, (branch, loss) in enumerate(((mixer.sft, sft_loss), (mixer.rl, rl_loss))):
            with branch():
                mixer.backward(loss(model, engines.batch(step, number, rank, 0)))
        returned.append(mixer.step() is None)
        pending.append(mixer._told is not None)
        model.zero_grad()
    _ = mixer.mu
    return {"returned": returned, "pending": pending, "at the end": mixer._told is not None}


def save(rank, world, folder):
    """A checkpoint of 4 ranks, both ways."""
    import torch.distributed.checkpoint as dcp

    model = DistributedDataParallel(tiny_model())
    with gac.patch(model) as mixer:
        found = engines.train(mixer, model, [rank], world)
        state = mixer.state_dict()
        if rank == 0:
            torch.save(state, os.path.join(folder, "mixer.pt"))
        dcp.save({"mixer": mixer}, checkpoint_id=os.path.join(folder, "dcp"))
    return found | {"state": state}


def load(rank, world, folder):
    """Goes on from it, on fewer ranks."""
    import torch.distributed.checkpoint as dcp

    found = {}
    for way in ("torch.save", "dcp"):
        model = DistributedDataParallel(tiny_model()) if world > 1 else tiny_model()
        with gac.patch(model) as mixer:
            if way == "torch.save":
                mixer.load_state_dict(torch.load(os.path.join(folder, "mixer.pt"), weights_only=True))
            else:
                dcp.load({"mixer": mixer}, checkpoint_id=os.path.join(folder, "dcp"))
            found[way] = {"mu": float(mixer.mu), "steps": mixer.controller.steps, "state": mixer.state_dict()}
            found[way] |= {"next": engines.train(mixer, model, [rank], world, steps=1)["mu"]}
    return found


CASES = {
    f"{name}, {estimator}": functools.partial(
        lambda rank, world, folder, run, estimator: run(rank, world, estimator=estimator), run=run, estimator=estimator
    )
    for name, run in (REPLICAS | SHARDS).items()
    for estimator in ESTIMATORS
}
CASES |= {
    f"{name}, {estimator}": functools.partial(
        lambda rank, world, folder, plan, estimator: engines.by_hand(rank, world, plan=plan, estimator=estimator),
        plan=plan,
        estimator=estimator,
    )
    for name, plan in PLANS.items()
    for estimator in ESTIMATORS
}
CASES |= {
    name: functools.partial(lambda rank, world, folder, run: run(rank, world, estimator="exact"), run=run)
    for name, run in {
        "fsdp2, bfloat16": engines.fsdp(dtype=torch.bfloat16),
        "fsdp2, sync in the last pass": engines.fsdp(sync_last_only=True),
        "hsdp": engines.fsdp(replicate=2),
        "tensor parallel": engines.tensor_parallel(),
        "tensor parallel and fsdp2": engines.tensor_parallel(data_parallel=2),
    }.items()
}
CASES |= {
    name: functools.partial(lambda rank, world, folder, run: run(rank, world), run=run)
    for name, (run, _) in engines.MISTAKES.items()
}
CASES |= {
    "compressed": compressed,
    "groups of two": groups_of_two,
    "twenty steps": twenty_steps_of_ddp,
    "communication": communication,
    "overlap": overlap,
    "save": save,
    "load": load,
}


def run(rank: int, world: int, folder: str, names: list[str]) -> dict[str, dict]:
    """What each case found; a case that raises leaves its error."""
    found = {}
    for name in names:
        try:
            found[name] = CASES[name](rank, world, folder)
        except Exception:
            found[name] = {"error": traceback.format_exc()}
    return found

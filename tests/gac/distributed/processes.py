"""Runs a function on several processes, with an end for those that hang."""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import forkserver
from pathlib import Path

import torch
import torch.distributed as dist

IMPORTED_LATE = (
    "torch._dynamo",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "torch.nn.parallel",
    "accelerate.utils",
    "transformers.modeling_utils",
    "gac",
)
"""What engines import when they are first used: seconds on every rank, unless they are forked from one that has it."""


def on_ranks(
    world: int, folder: Path, function: Callable, *arguments, preload: str, seconds: float, backend: str = "gloo"
) -> list:
    """What ``function(rank, world, *arguments)`` returns on each rank.

    Args:
        folder: for the meeting point and the results; a fresh one for each call.
        preload: module that is imported once for all ranks.
        backend: of the default process group.
        seconds: after which a rank that has not ended fails the test.
    """
    context = multiprocessing.get_context("forkserver")
    if not set(IMPORTED_LATE) <= set(forkserver._forkserver._preload_modules):
        forkserver._forkserver._stop()  # somebody else's, where every rank would import torch anew
    context.set_forkserver_preload([*IMPORTED_LATE, preload])  # the first call of a process decides for all
    ranks = [
        context.Process(target=_work, args=(rank, world, str(folder), backend, function, arguments))
        for rank in range(world)
    ]
    for process in ranks:
        process.start()
    try:
        for process in ranks:
            process.join(seconds)
            assert process.exitcode is not None, f"no end after {seconds} s on {world} ranks: a deadlock?"
    finally:
        for process in ranks:
            process.kill()
    found = [torch.load(folder / f"{rank}.pt", map_location="cpu", weights_only=False) for rank in range(world)]
    assert all(process.exitcode == 0 for process in ranks), [process.exitcode for process in ranks]
    errors = [result["error"] for result in found if "error" in result]
    assert not errors, "\n".join(errors)
    return [result["value"] for result in found]


def _work(rank: int, world: int, folder: str, backend: str, function: Callable, arguments: tuple) -> None:
    torch.set_num_threads(1)
    # accelerate reads the launcher's variables; it takes the group as it finds it
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    dist.init_process_group(
        backend, init_method=f"file://{folder}/store", rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )
    try:
        found = {"value": function(rank, world, *arguments)}
    except Exception:
        found = {"error": traceback.format_exc()}
    torch.save(found, os.path.join(folder, f"{rank}.pt"))
    if dist.is_initialized():
        dist.destroy_process_group()

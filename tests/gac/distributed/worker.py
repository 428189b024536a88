"""One rank: runs the cases given and leaves what it found in a file. A case that raises leaves its error."""

from __future__ import annotations

import os
import traceback
from datetime import timedelta

import torch
import torch.distributed as dist

from tests.gac.distributed import cases


def work(rank: int, world: int, folder: str, names: list[str]) -> None:
    torch.set_num_threads(1)
    # accelerate reads the launcher's variables; it takes the group as it finds it
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store{world}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=60),
    )
    found = {}
    for name in names:
        try:
            found[name] = cases.CASES[name](rank, world, folder)
        except Exception:
            found[name] = {"error": traceback.format_exc()}
    torch.save(found, os.path.join(folder, f"{world}-{rank}.pt"))
    dist.destroy_process_group()

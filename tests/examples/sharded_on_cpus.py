"""Runs a script of accelerate as it stands, then with FSDP2, which accelerate has for accelerators alone.

    accelerate launch --config_file fsdp2.yaml tests/examples/sharded_on_cpus.py MEETING_POINT train.py --steps 2

MEETING_POINT is a file that is not there yet: the launcher's own, whose keys the first group has used, is not for two.
"""

import os
import runpy
import sys
from typing import Any

import accelerate
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, PartialState
from torch.distributed.fsdp import FSDPModule

import gac


class Sharded(accelerate.Accelerator):
    """Takes the way to FSDP2 with the plugin that accelerate makes of its configuration, where it would take DDP's."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        plugin = accelerate.FullyShardedDataParallelPlugin()  # of the variables that the launcher has set
        for state in (PartialState, AcceleratorState):
            state._shared_state["distributed_type"] = accelerate.DistributedType.FSDP
        AcceleratorState._shared_state["fsdp_plugin"] = plugin

    def prepare(self, *args: Any) -> Any:
        model, optimizer = super().prepare(*args)
        units = sorted(type(module).__name__ for module in model.modules() if isinstance(module, FSDPModule))
        print(f"units of FSDP2: {' '.join(units)}\n", end="", flush=True)
        return model, optimizer

    def backward(self, loss: torch.Tensor, **options: Any) -> None:
        assert loss is weighed.pop(), "a backward pass of another loss than the one that the mixer has weighed"
        super().backward(loss, **options)


def weigh(mixer: gac.Mixer, loss: torch.Tensor, **options: Any) -> torch.Tensor:
    """`gac.Mixer.weigh`, which keeps what it returns."""
    weighed.append(original(mixer, loss, **options))
    return weighed[-1]


weighed: list[torch.Tensor] = []
original, gac.Mixer.weigh = gac.Mixer.weigh, weigh

_, meeting_point, script, *_ = sys.argv
del sys.argv[:2]
runpy.run_path(script, run_name="__main__")
rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
dist.init_process_group("gloo", init_method=f"file://{meeting_point}", rank=rank, world_size=world)
AcceleratorState._reset_state(reset_partial_state=True)
accelerate.Accelerator = Sharded
runpy.run_path(script, run_name="__main__")

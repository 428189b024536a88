"""Runs of the hybrid trainer on several gloo processes, forked from one that has imported everything."""

import gc
import multiprocessing
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import DistributedType, FullyShardedDataParallelPlugin
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState
from accelerate.utils.launch import prepare_multi_gpu_env
from datasets import Dataset
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from gac.tasks.characters import build_character_tokenizer
from gac.trainers import HybridGRPOConfig, HybridGRPOTrainer
from tests.gac.trainers.conftest import DEMONSTRATIONS, PROMPTS, TINY_RUN, last_digit_reward, tiny_model


class Kept(TrainerCallback):
    """What one rank saw: weighted gradients before each optimizer step, the mixer's numbers after it."""

    def __init__(self):
        self.gradients, self.metrics, self.prompts, self.demonstrations = [], [], [], []
        self.trainer = None

    def reward(self, prompts, completions, **_):
        self.prompts.append(prompts)
        return last_digit_reward(completions)

    def attach(self, trainer):
        self.trainer = trainer
        if trainer._sampler is None:  # demonstrations are those of the prompts
            return
        take = trainer._sampler.take

        def kept(position, count):
            self.demonstrations.append(take(position, count))
            return self.demonstrations[-1]

        trainer._sampler.take = kept

    def on_train_begin(self, args, state, control, **kwargs):
        self.loaded = self.trainer.mixer.state_dict()

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        named = model.named_parameters()
        whole = lambda g: g.full_tensor() if isinstance(g, DTensor) else g.clone()
        self.gradients.append({name.removeprefix("module."): whole(p.grad) for name, p in named if p.grad is not None})

    def on_step_end(self, args, state, control, **kwargs):
        self.metrics.append(self.trainer.mixer.metrics())

    def found(self) -> dict:
        trainer = self.trainer
        numbers = trainer.mixer.metrics(wait=True)
        return {
            "world": trainer.accelerator.num_processes,
            "gradients": self.gradients,
            "prompts": self.prompts,
            "demonstrations": self.demonstrations,
            "metrics": self.metrics,
            "history": trainer.state.log_history,
            "numbers": {k: v.hex() for k, v in numbers.items() if k != "seconds" and isinstance(v, float)},
            "loaded": self.loaded,
            "sources": trainer.source_trust and trainer.source_trust.known(),
            "steps": trainer.state.global_step,
            "micro_steps": trainer._step,
            "units": [name for name, module in trainer.model_wrapped.named_modules() if isinstance(module, FSDPModule)],
        }


def launched_with(configuration: str) -> dict[str, str]:
    """What ``accelerate launch --config_file`` puts into the environment of its processes about FSDP."""
    arguments = launch_command_parser().parse_args(["--config_file", configuration, "train.py"])
    arguments, *_ = _validate_launch_command(arguments)
    return {name: value for name, value in prepare_multi_gpu_env(arguments).items() if "FSDP" in name}


def shard(trainer, version: int | str) -> None:
    """accelerate shards on accelerators alone; everything else of its way there is taken.

    Args:
        version: of FSDP; or the path of accelerate's configuration file.
    """
    if isinstance(version, str):
        environment = launched_with(version)
        os.environ |= environment
        plugin = FullyShardedDataParallelPlugin()
        plugin.set_auto_wrap_policy(trainer.model)
        for name in environment:
            del os.environ[name]
    else:
        plugin = FullyShardedDataParallelPlugin(fsdp_version=version, use_orig_params=True if version == 1 else None)
    AcceleratorState._shared_state["distributed_type"] = DistributedType.FSDP
    if version == 1:  # it holds the device, "cpu:0", against those of parameters
        AcceleratorState._shared_state["device"] = trainer.accelerator.state.device = torch.device("cpu")
    AcceleratorState._shared_state["fsdp_plugin"] = plugin
    trainer.is_fsdp_enabled = True
    trainer._dist = type(trainer._dist)(trainer.accelerator)  # TRL's own, which looks at these once


def train(
    folder: str,
    *,
    resume: str | None = None,
    prompts=PROMPTS,
    demonstrations=DEMONSTRATIONS,
    sharded=False,
    peft_config=None,
    **options,
) -> dict:
    """One rank's part of a run, or a whole one; returns what it saw, or the error that it met."""
    if "deepspeed" in options:
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # or a compiler is needed
    kept = Kept()
    defaults = TINY_RUN | {"output_dir": folder, "gradient_accumulation_steps": 1, "law": "gac"}
    trainer = HybridGRPOTrainer(
        tiny_model(seed=0 if resume is None else 9),
        kept.reward,
        HybridGRPOConfig(**{**defaults, **options}),
        Dataset.from_list(prompts),
        demonstrations,
        processing_class=build_character_tokenizer(),
        callbacks=[kept],
        peft_config=peft_config,
    )
    kept.attach(trainer)
    if sharded:
        shard(trainer, version=2 if sharded is True else sharded)
    trainer.train(resume_from_checkpoint=resume)
    return kept.found()


def work(rank: int, world: int, folder: str, runs: dict) -> None:
    """A rank's life: every run in turn."""
    results = {}
    for name, options in runs.items():
        try:
            results[name] = train(os.path.join(folder, f"{name}-{world}"), **options)
        except ValueError as error:
            results[name] = {"error": str(error)}
    torch.save(results, os.path.join(folder, f"{world}-{rank}.pt"))


def on_forks(world: int, function: Callable, *arguments, seconds: float, method: str = "fork") -> None:
    """``function(rank, world, *arguments)`` on ``world`` processes, which find one another by the usual variables.

    They share what this process has imported; the garbage collector leaves it alone, as in ``tests/conftest.py``.
    A deadlock ends after ``seconds``; this process ends with an error where a rank does.
    """
    gc.collect()
    gc.freeze()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context(method)
    ranks = [context.Process(target=_as_rank, args=(rank, world, port, function, arguments)) for rank in range(world)]
    for process in ranks:
        process.start()
    until = time.monotonic() + seconds
    for process in ranks:
        process.join(max(0.0, until - time.monotonic()))
    codes = [process.exitcode for process in ranks]
    for process in ranks:
        process.kill()
    if any(codes) or None in codes:
        sys.exit(f"ranks of {world} ended with {codes}; None: not within {seconds} s, a deadlock?")


def _as_rank(rank: int, world: int, port: int, function: Callable, arguments: tuple) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world), "RANK": str(rank)}
    os.environ |= {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(world)}
    function(rank, world, *arguments)


def run_here(command: list[str]) -> None:
    """Runs a command of the tests that forks ranks; raises AssertionError with its output where it fails."""
    # FSDP2 shards onto a device where there is one, whatever the trainer's is, and forked processes cannot use it
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    root = Path(__file__).parents[3]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]


def launch(folder: str, runs: dict[int, dict], *, seconds: float = 100) -> dict[int, list[dict]]:
    """Results by number of ranks, then by rank, of the runs for each number, one number after the other.

    One process of its own imports everything and forks all of them: nothing of the tests is shared.
    """
    torch.save(runs, os.path.join(folder, "runs.pt"))
    command = [sys.executable, "-m", "tests.gac.trainers.ranks", folder, str(seconds)]
    run_here(command)
    load = lambda world, rank: torch.load(os.path.join(folder, f"{world}-{rank}.pt"), weights_only=False)
    return {world: [load(world, rank) for rank in range(world)] for world in runs}


if __name__ == "__main__":
    for ranks, todo in torch.load(os.path.join(sys.argv[1], "runs.pt")).items():
        # DeepSpeed hangs in processes that are forked
        start = "spawn" if any("deepspeed" in options for options in todo.values()) else "fork"
        on_forks(ranks, work, sys.argv[1], todo, seconds=float(sys.argv[2]), method=start)

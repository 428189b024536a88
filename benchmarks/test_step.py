"""Whole optimizer steps with and without GAC under pytest-benchmark: ``pytest benchmarks/test_step.py``."""

from __future__ import annotations

import pytest
import torch

from gac.bench.step import ARMS, StepOptions, Trainer
from gac.plan.shapes import MODELS


@pytest.fixture(scope="module")
def trainer(device: torch.device) -> Trainer:
    """A 10 M-parameter model on a CPU, 0.1B in bf16 on a GPU."""
    gpu = device.type == "cuda"
    dtype = torch.bfloat16 if gpu else torch.float32
    return Trainer(StepOptions(MODELS["0.1B" if gpu else "10M"], device, dtype, tokens=8192 if gpu else 1024))


@pytest.mark.parametrize("arm", ARMS)
def test_step(benchmark, trainer: Trainer, arm: str) -> None:
    """One optimizer step of an arm."""
    benchmark.group = f"step of {trainer.options.shape.name}, {trainer.options.tokens} tokens"
    if arm == "plain":
        benchmark.pedantic(_waiting(trainer, trainer.plain), rounds=5, warmup_rounds=1)
        return
    with trainer.patch(interval=1 if arm == "measured" else 1_000_000) as mixer:
        trainer.mixed(mixer)
        benchmark.pedantic(_waiting(trainer, lambda: trainer.mixed(mixer)), rounds=5, warmup_rounds=1)


def _waiting(trainer: Trainer, step):
    def run() -> None:
        step()
        trainer.synchronize()

    return run

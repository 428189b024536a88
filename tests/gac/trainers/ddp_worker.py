"""The two ranks of the data-parallel test, forked. Argument: the folder to write to."""

import os
import sys

import torch
from datasets import Dataset
from transformers import TrainerCallback

from gac.tasks.characters import build_character_tokenizer
from gac.trainers import HybridGRPOConfig, HybridGRPOTrainer
from tests.gac.trainers.conftest import DEMONSTRATIONS, PROMPTS, last_digit_reward, tiny_model, with_demonstrations
from tests.gac.trainers.ranks import on_forks


class Gradients(TrainerCallback):
    """Keeps the gradients with which the optimizer steps."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append({name.removeprefix("module."): p.grad.clone() for name, p in model.named_parameters()})


def train(folder: str, *, prompts_demonstrate: bool = False, **options) -> dict:
    """Trains a few steps of two micro-batches; returns what this rank saw."""
    kept = Gradients()
    trainer = HybridGRPOTrainer(
        tiny_model(),
        unsolved_with_an_even_number if prompts_demonstrate else last_digit_reward,
        HybridGRPOConfig(
            output_dir=os.path.join(folder, "out"),
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to=[],
            disable_tqdm=True,
            save_strategy="no",
            logging_steps=1,
            max_steps=4 if prompts_demonstrate else 2,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            num_generations=4,
            max_completion_length=3,
            max_grad_norm=0.0,
            sft_seed=5,
            **options,
        ),
        Dataset.from_list(with_demonstrations() if prompts_demonstrate else PROMPTS),
        None if prompts_demonstrate else DEMONSTRATIONS,
        processing_class=build_character_tokenizer(),
        callbacks=[kept],
    )
    queues = []
    if options.get("law") == "relift":
        enqueue = trainer._rule.enqueue
        trainer._rule.enqueue = lambda rows: (enqueue(rows), queues.append(list(trainer._rule.queue)))
    trainer.train()
    metrics = trainer.mixer.metrics(wait=True)
    return {
        "world": trainer.accelerator.num_processes,
        "gradients": kept.steps,
        "queues": queues,
        "mu": trainer.mixer.mu,
        "statistics": {k: metrics[k] for k in ("sigma_s2", "sigma_r2", "delta_g2", "cosine", "n_s", "n_r", "mu_raw")},
        "weights": trainer.model.state_dict(),
    }


def unsolved_with_an_even_number(prompts, **_):
    """Prompts that begin with an even digit are never solved, others by every second rollout."""
    return [float(int(prompt[0]) % 2 and i % 2) for i, prompt in enumerate(prompts)]


def work(rank: int, world: int, folder: str) -> None:
    """Trains with the supervised branch alone, with the default law, and with rules that differ by prompt."""
    result = {"sft": train(folder, mu=1.0), "gac": train(folder, law="gac", observe_tokens=True)}
    for law, law_options in (("hpt", {}), ("luffy", {}), ("relift", {"queue": 3})):
        result[law] = train(folder, law=law, law_options=law_options, prompts_demonstrate=True)
    torch.save(result, os.path.join(folder, f"rank{rank}.pt"))


if __name__ == "__main__":
    on_forks(2, work, sys.argv[1], seconds=200)

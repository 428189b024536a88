"""One rank of the data-parallel test. Argument: the folder to write to."""

import os
import sys

import torch
from datasets import Dataset
from transformers import TrainerCallback

from gac.tasks.characters import build_character_tokenizer
from gac.trainers import HybridGRPOConfig, HybridGRPOTrainer
from tests.gac.trainers.conftest import DEMONSTRATIONS, PROMPTS, last_digit_reward, tiny_model


class Gradients(TrainerCallback):
    """Keeps the gradients with which the optimizer steps."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append({name.removeprefix("module."): p.grad.clone() for name, p in model.named_parameters()})


def train(folder: str, **options) -> dict:
    """Trains two steps of two micro-batches; returns what this rank saw."""
    kept = Gradients()
    trainer = HybridGRPOTrainer(
        tiny_model(),
        last_digit_reward,
        HybridGRPOConfig(
            output_dir=os.path.join(folder, "out"),
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to=[],
            disable_tqdm=True,
            save_strategy="no",
            logging_steps=1,
            max_steps=2,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            num_generations=4,
            max_completion_length=3,
            max_grad_norm=0.0,
            sft_seed=5,
            **options,
        ),
        Dataset.from_list(PROMPTS),
        DEMONSTRATIONS,
        processing_class=build_character_tokenizer(),
        callbacks=[kept],
    )
    trainer.train()
    metrics = trainer.mixer.metrics(wait=True)
    return {
        "world": trainer.accelerator.num_processes,
        "gradients": kept.steps,
        "mu": trainer.mixer.mu,
        "statistics": {k: metrics[k] for k in ("sigma_s2", "sigma_r2", "delta_g2", "cosine", "n_s", "n_r", "mu_raw")},
        "weights": trainer.model.state_dict(),
    }


def main() -> None:
    """Trains once with the supervised branch alone, once with the default law."""
    folder, rank = sys.argv[1], os.environ["RANK"]
    torch.set_num_threads(1)
    result = {"sft": train(folder, mu=1.0), "gac": train(folder, law="gac")}
    torch.save(result, os.path.join(folder, f"rank{rank}.pt"))


if __name__ == "__main__":
    main()

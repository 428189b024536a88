"""Hybrid GRPO on several processes: a tiny model learns to add digits from demonstrations and from rewards.

    torchrun --nproc-per-node 2 examples/hybrid_grpo_torchrun.py

Runs on CPUs in half a minute; on GPUs drop ``use_cpu``. Every rank prints its mu, which is the same on all of them.
"""

import torch
from datasets import Dataset
from transformers import TrainerCallback

from gac.tasks.characters import build_character_tokenizer
from gac.tasks.models import build_small_model
from gac.trainers import HybridGRPOConfig, HybridGRPOTrainer


class PrintMu(TrainerCallback):
    """One line from every rank in every step."""

    def on_step_end(self, args, state, control, **kwargs):
        line = f"rank {args.process_index} of {args.world_size}: step {state.global_step}, mu {trainer.mixer.mu:.9f}"
        print(line + "\n", end="", flush=True)  # in one piece, or lines of two ranks mix


def reward(completions, answer, **_):
    """1 for the right sum; a little for digits, which an untrained model rarely writes."""
    digits = (sum(map(str.isdigit, text)) for text in completions)
    return [float(text == a) + 0.1 * n for text, a, n in zip(completions, answer, digits, strict=True)]


sums = [(a, b) for a in range(10) for b in range(10)]
prompts = Dataset.from_list([{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a, b in sums])
demonstrations = Dataset.from_list([{"prompt": f"{a}+{b}=", "completion": str(a + b)} for a, b in sums[::3]])

torch.set_num_threads(1)
tokenizer = build_character_tokenizer()
trainer = HybridGRPOTrainer(
    build_small_model(tokenizer, hidden_size=32, layers=1, seed=0),
    reward,
    HybridGRPOConfig(
        output_dir="runs/torchrun",
        law="gac",
        use_cpu=True,
        bf16=False,
        max_steps=4,
        learning_rate=1e-3,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        num_generations=4,
        max_completion_length=3,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    ),
    prompts,
    demonstrations,
    processing_class=tokenizer,
    callbacks=[PrintMu()],
)
trainer.train()
trainer.accelerator.wait_for_everyone()  # gloo's threads let go of tensors late, which aborts a process that ends
torch.distributed.destroy_process_group()

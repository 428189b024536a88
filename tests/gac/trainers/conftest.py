"""Small runs of the hybrid trainer. What needs TRL and datasets is imported late: a GPU machine may lack them."""

import pytest
import torch

from gac.tasks.characters import build_character_tokenizer
from gac.tasks.models import build_small_model

PROMPTS = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(6) for b in range(6)]
DEMONSTRATIONS = [
    {"prompt": f"{a}+{b}=", "completion": str(a + b), "answer": str(a + b)} for a in range(5) for b in range(4, 14)
]

SOLVED = "2"
"""What `first_digit_reward` calls correct."""


def first_digit_reward(completions, **_):
    """1 for completions that begin with `SOLVED`: rare from an untrained model, so that most prompts are unsolved."""
    return [float(text.startswith(SOLVED)) for text in completions]


def with_demonstrations(prompts=PROMPTS):
    """The prompts with their answers as demonstrations; every fourth has none."""
    return [row | {"demonstration": row["answer"] if i % 4 else None} for i, row in enumerate(prompts)]


def last_digit_reward(completions, **_):
    """Half of all completions earn something, so that advantages are never all zero."""
    return [float(sum(map(ord, text)) % 2) for text in completions]


def tiny_model(seed=0, **sizes):
    return build_small_model(build_character_tokenizer(), hidden_size=16, layers=1, heads=2, seed=seed, **sizes)


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


TINY_RUN = {
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "report_to": [],
    "disable_tqdm": True,
    "save_strategy": "no",
    "logging_steps": 1,
    "lr_scheduler_type": "constant",
    "learning_rate": 1e-2,
    "per_device_train_batch_size": 4,
    "num_generations": 4,
    "max_completion_length": 3,
    "max_grad_norm": 0.0,
}
"""Options of a `HybridGRPOConfig` for a small run on the CPU."""


@pytest.fixture
def config(tmp_path):
    """Builds a `HybridGRPOConfig` for tiny CPU runs."""

    def build(**options):
        from gac.trainers import HybridGRPOConfig

        cls = options.pop("cls", HybridGRPOConfig)
        defaults = TINY_RUN | {"output_dir": str(tmp_path / "out"), "max_steps": 2, "gradient_accumulation_steps": 2}
        return cls(**{**defaults, **options})

    return build


@pytest.fixture
def trainer(config):
    """Builds a `HybridGRPOTrainer` on a tiny model."""

    def build(model=None, sft_dataset=DEMONSTRATIONS, reward=last_digit_reward, prompts=PROMPTS, **options):
        from datasets import Dataset

        from gac.trainers import HybridGRPOTrainer

        given = ("callbacks", "eval_dataset", "peft_config", "processing_class")
        keywords = {"processing_class": build_character_tokenizer()}
        keywords |= {key: options.pop(key) for key in given if key in options}
        return HybridGRPOTrainer(
            model if model is not None else tiny_model(),
            reward,
            config(**options),
            Dataset.from_list(prompts),
            sft_dataset,
            **keywords,
        )

    return build

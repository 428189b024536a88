"""The hybrid trainer without weight on demonstrations beside TRL's own, with the same options."""

import tempfile

import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from gac.tasks.characters import build_character_tokenizer
from gac.trainers import HybridGRPOConfig, HybridGRPOTrainer
from gac.trainers.groups import GroupLayout, take_rows
from tests.gac.trainers.conftest import DEMONSTRATIONS, PROMPTS, TINY_RUN, last_digit_reward, tiny_model

TIMING = {
    "step_time",
    "train_runtime",
    "train_samples_per_second",
    "train_steps_per_second",
    "eval_runtime",
    "eval_samples_per_second",
    "eval_steps_per_second",
}
"""What a log says about the clock."""

OF_TRAINER = (
    "peft_config",
    "tools",
    "callbacks",
    "eval_dataset",
    "reward_funcs",
    "model",
    "processing_class",
    "prompts",
)


def whole_groups(batch):
    """In place of TRL's shuffling, which the hybrid trainer replaces: the order that keeps groups together."""
    return take_rows(batch, GroupLayout(len(batch["prompt_ids"]), TINY_RUN["num_generations"]).shuffled())


def trained(kind, folder, **options):
    """A trainer after a run of two steps.

    Args:
        kind: ``"trl"``, or what the hybrid trainer is to do: ``"mu=0"``, ``"one pass"`` (and mu = 0), ``"gac"``.
        folder: for its files. options: of the config, and of the trainer (:data:`OF_TRAINER`); ``model``,
            ``processing_class``, ``peft_config`` and ``callbacks`` may be functions that make one for each run.
    """
    for_trainer = {name: options.pop(name) for name in OF_TRAINER if name in options}
    for name in ("model", "processing_class", "peft_config", "callbacks"):
        if callable(for_trainer.get(name)):
            for_trainer[name] = for_trainer[name]()
    model = for_trainer.pop("model", None) or tiny_model()
    for_trainer.setdefault("processing_class", build_character_tokenizer())
    sft_dataset = options.pop("sft_dataset", DEMONSTRATIONS)
    options = TINY_RUN | {"max_steps": 2, "gradient_accumulation_steps": 2} | options
    options["output_dir"] = tempfile.mkdtemp(dir=folder)
    data = Dataset.from_list(for_trainer.pop("prompts", PROMPTS))
    reward = for_trainer.pop("reward_funcs", last_digit_reward)
    if kind == "trl":
        trainer = GRPOTrainer(model, reward, GRPOConfig(**options), data, **for_trainer)
    else:
        own = {"law": "gac"} if kind == "gac" else {"mu": 0.0}
        own |= {"estimator": "sequence"} if kind == "one pass" else {}
        trainer = HybridGRPOTrainer(model, reward, HybridGRPOConfig(**options, **own), data, sft_dataset, **for_trainer)
    trainer.train()
    return trainer


def history(trainer, *, without=()):
    """What was logged, but for the clock and for what TRL's trainer does not log."""
    skipped = TIMING | set(without)
    logged = lambda entry: {k: v for k, v in entry.items() if k not in skipped and not k.startswith("gac/")}
    return [logged(entry) for entry in trainer.state.log_history]


def weights(trainer):
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def same(left, right):
    """Whether two models have the same bits."""
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)

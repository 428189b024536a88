"""One training run: problems, model, warm start, hybrid phase, evaluation, files. Called by ``gac train``."""

import dataclasses
import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gac.files import sync_tree
from gac.options import OVERHEAD
from gac.runs.config import TrainConfig
from gac.runs.console import Reporter
from gac.runs.errors import UsageError, usage_errors
from gac.runs.folder import METRICS, SUMMARY, MetricsFile, peak_memory_bytes, read_json, write_json
from gac.runs.libraries import quiet_libraries

WARM_START = "warm_start"
_WARM_START_RESULT = "result.json"
_LR_RAMP = 20
_WARM_START_BATCH = 64


@dataclasses.dataclass
class Setup:
    """What the phases share."""

    config: TrainConfig
    device: str
    model: Any
    tokenizer: Any
    heldout: list[dict[str, Any]]
    demonstrations: list[dict[str, Any]]
    prompts: list[dict[str, Any]]
    max_completion_length: int

    @property
    def bf16(self) -> bool:
        """Whether forward passes run under autocast to bf16: of pretrained models on GPUs. On CPUs it is slow."""
        return self.device == "cuda" and self.config.model is not None


def prepare(config: TrainConfig) -> Setup:
    """Builds problems, model and tokenizer; the same for the same configuration."""
    quiet_libraries()
    import torch

    from gac.tasks.models import build_small_model_and_tokenizer
    from gac.tasks.pretrained import load_pretrained
    from gac.tasks.problems import as_records, build_splits, parse_task

    if config.threads:
        torch.set_num_threads(config.threads)
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    with usage_errors():
        splits = build_splits(
            [parse_task(text) for text in config.task],
            heldout=config.heldout,
            demonstrations=config.demonstrations,
            prompts=config.prompts,
            seed=config.seed,
        )
        if config.model is None:
            model, tokenizer = build_small_model_and_tokenizer(
                (p.prompt + p.answer for part in (splits.heldout, splits.demonstrations, splits.prompts) for p in part),
                seed=config.seed,
                hidden_size=config.hidden_size,
                layers=config.layers,
            )
        else:
            model, tokenizer = load_pretrained(
                config.model,
                cache=config.model_cache,
                chat_template=config.chat_template,
                lora=config.lora,
                device=device,
                seed=config.seed,
            )
    records = [as_records(part, tokenizer) for part in (splits.heldout, splits.demonstrations, splits.prompts)]
    length = config.max_completion_length or _completion_length(
        tokenizer, records, slack=1 if config.model is None else 16
    )
    return Setup(config, device, model.to(device), tokenizer, *records, length)


def run_warm_start(setup: Setup, folder: Path, reporter: Reporter) -> float:
    """Trains and evaluates the starting model, or takes it from `folder` where that is complete.

    Leaves the starting model in `setup` exactly as it is loaded from `folder`, so that a resumed run starts from the
    same bits. Returns its held-out accuracy.
    """
    from gac.tasks.warm_start import warm_start

    config, result = setup.config, folder / _WARM_START_RESULT
    identity = _identity(config)
    if result.exists():
        stored = read_json(result)
        if stored["identity"] != identity:
            raise UsageError(f"the warm start in {folder} was made with other options; choose another folder")
    else:
        steps = config.warm_start_steps
        if steps:
            reporter.begin("warm start", steps)
            every = max(1, steps // 5)
            pretrained = config.model is not None
            batch = config.sft_batch_size * config.micro_batches if pretrained else _WARM_START_BATCH
            if config.gradient_checkpointing:
                setup.model.gradient_checkpointing_enable({"use_reentrant": False})
            warm_start(
                setup.model,
                setup.tokenizer,
                setup.demonstrations,
                steps=steps,
                batch_size=min(batch, len(setup.demonstrations)),
                lr=config.warm_start_lr,
                seed=config.seed,
                rows_at_once=config.sft_batch_size if pretrained else None,
                bf16=setup.bf16,
                on_step=lambda step, loss: reporter.advance(step, milestone=step % every == 0, loss=loss),
            )
            if config.gradient_checkpointing:
                setup.model.gradient_checkpointing_disable()
            reporter.end()
        # all files appear at once: the folder is written beside its place, then renamed
        part = folder.with_name(folder.name + ".part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        if steps or config.model is None:
            setup.model.save_pretrained(part)
            setup.tokenizer.save_pretrained(part)
        write_json(part / _WARM_START_RESULT, {"identity": identity, "accuracy": evaluate(setup)})
        sync_tree(part)
        shutil.rmtree(folder, ignore_errors=True)
        part.rename(folder)
    _restore(setup, folder)
    return read_json(result)["accuracy"]


def run_hybrid(
    setup: Setup,
    out: Path,
    warm_accuracy: float,
    reporter: Reporter,
    *,
    started: float,
    trainer_class: Callable[..., Any] | None = None,
) -> dict[str, Any]:
    """The hybrid phase, from the last complete checkpoint if there is one; returns and writes the summary.

    `trainer_class` stands in for `HybridGRPOTrainer`.
    """
    from datasets import Dataset, disable_progress_bars
    from transformers import PrinterCallback
    from transformers.utils import logging as transformers_logging

    from gac.runs.callback import RunCallback
    from gac.tasks.problems import exact_match_reward
    from gac.trainers.hybrid_grpo import HybridGRPOConfig, HybridGRPOTrainer, complete_checkpoints
    from gac.trainers.prompts import COLUMN
    from gac.trainers.rules import rule_of

    disable_progress_bars()
    transformers_logging.disable_progress_bar()
    config = setup.config
    law, law_options = config.law_and_options()
    with usage_errors():
        arguments = HybridGRPOConfig(
            output_dir=str(out / "checkpoints"),
            law=law,
            law_options=law_options,
            estimator=config.estimator,
            gac_overhead=config.overhead,
            gac_interval=config.interval,
            gac_metric=config.metric,
            gac_report_interval=config.report_interval or None,
            gac_report_dir=str(out),
            sft_loss=config.sft_loss,
            sft_weights=config.sft_weights,
            beta=config.beta,
            sft_batch_size=config.sft_batch_size,
            max_steps=config.steps,
            learning_rate=config.lr,
            # without a ramp the first steps of a fresh Adam are as long as lr allows and undo the warm start
            lr_scheduler_type="constant_with_warmup",
            warmup_steps=_LR_RAMP,
            per_device_train_batch_size=config.batch_size,
            gradient_accumulation_steps=config.micro_batches,
            num_generations=config.generations,
            max_completion_length=setup.max_completion_length,
            temperature=config.temperature,
            seed=config.seed,
            use_cpu=setup.device == "cpu",
            bf16=setup.bf16,
            gradient_checkpointing=config.gradient_checkpointing,
            logging_steps=1,
            save_steps=config.save_every,
            save_total_limit=2,  # one of them is always complete
            report_to=[],
            disable_tqdm=True,
            dataloader_pin_memory=setup.device == "cuda",
        )
        # a rule's demonstrations are those of the prompts: every prompt has its answer as one
        from_prompts = rule_of(arguments.build_controller().law).from_prompts
        rows = [row | {COLUMN: row["completion"]} for row in setup.prompts] if from_prompts else setup.prompts
        trainer = (trainer_class or HybridGRPOTrainer)(
            setup.model,
            exact_match_reward,
            arguments,
            Dataset.from_list(rows),
            None if from_prompts else setup.demonstrations,
            processing_class=setup.tokenizer,
        )
    trainer.remove_callback(PrinterCallback)

    checkpoints = complete_checkpoints(arguments.output_dir)
    checkpoint = checkpoints[-1] if checkpoints else None
    done = int(checkpoint.rpartition("-")[2]) if checkpoint else 0
    if checkpoint and done < config.steps:
        trainer.check_checkpoint(checkpoint)  # before anything in the folder changes
    _remove_incomplete(Path(arguments.output_dir), checkpoints)
    metrics = MetricsFile(out / METRICS, last_step=done)
    if done:
        reporter.say(f"continuing from step {done}")
    if missing := sorted({*range(1, done + 1)} - {record["step"] for record in metrics.records}):
        reporter.say(f"{METRICS} lacks {len(missing)} steps that the checkpoint holds, the first {missing[0]}")
    reporter.begin("training", config.steps, done)
    callback = RunCallback(
        trainer,
        metrics,
        out / "tensorboard",
        reporter,
        evaluate=lambda: evaluate(setup),
        eval_every=config.eval_every,
        accuracy=_last(metrics.records, "accuracy", warm_accuracy),
    )
    trainer.add_callback(callback)
    try:
        if done < config.steps:
            trainer.train(resume_from_checkpoint=checkpoint)
        else:  # killed after the last checkpoint, before the summary
            _restore(setup, Path(checkpoint))
    finally:
        callback.close()
        reporter.end()
    setup.model.save_pretrained(out / "model")
    setup.tokenizer.save_pretrained(out / "model")
    summary = summarize(setup, metrics.records, warm_accuracy, time.perf_counter() - started)
    write_json(out / SUMMARY, summary)
    return summary


def evaluate(setup: Setup) -> float:
    """Held-out accuracy of the current model."""
    from gac.tasks.evaluation import accuracy

    return accuracy(setup.model, setup.tokenizer, setup.heldout, max_new_tokens=setup.max_completion_length)


def summarize(setup: Setup, records: Sequence[dict[str, Any]], warm_accuracy: float, seconds: float) -> dict[str, Any]:
    """What the final table shows, and what `gac compare` reads."""
    config = setup.config
    accuracies = [record["accuracy"] for record in records if "accuracy" in record]
    # the first steps hold one-time costs (kernel choice, allocator) that say nothing about a step
    settled = records[min(5, len(records) // 2) :]
    busy = sum(record["seconds"] for record in settled)
    return {
        "steps": records[-1]["step"],
        "parameters": sum(p.numel() for p in setup.model.parameters()),
        "trained_parameters": sum(p.numel() for p in setup.model.parameters() if p.requires_grad),
        "device": setup.device,
        "estimator": records[-1]["estimator"],
        "warm_start_accuracy": warm_accuracy,
        "final_accuracy": accuracies[-1],
        "last_four_accuracy": sum(accuracies[-4:]) / len(accuracies[-4:]),
        "final_mu": records[-1].get("gac/mu"),
        "mean_mu": _mean(record.get("gac/mu") for record in records),
        "final_reward": _mean(record.get("reward") for record in records[-20:]),
        "seconds_per_step": busy / len(settled),
        "gac_share": sum(record.get("gac/seconds") or 0.0 for record in settled) / busy,
        "gac_budget": (config.overhead or OVERHEAD) if config.interval is None else None,
        "peak_memory_bytes": peak_memory_bytes(setup.device),
        "seconds": seconds,
    }


def _restore(setup: Setup, folder: Path) -> None:
    """Takes the weights that `folder` holds, if it holds any: of the whole model with its tokenizer, or adapters."""
    from gac.tasks.adapters import ADAPTER_CONFIG, load_adapters
    from gac.tasks.models import load_model

    if (folder / ADAPTER_CONFIG).exists():
        load_adapters(setup.model, folder)
    elif (folder / "config.json").exists():
        setup.model, setup.tokenizer = load_model(str(folder))
        setup.model.to(setup.device)


def _completion_length(tokenizer: Any, splits: Sequence[Sequence[dict[str, Any]]], *, slack: int) -> int:
    """Tokens of the longest expected completion, with room for the end token."""
    texts = {
        row["completion"] if isinstance(row["completion"], str) else row["completion"][0]["content"]
        for rows in splits
        for row in rows
    }
    return max(map(len, tokenizer(sorted(texts), add_special_tokens=False)["input_ids"])) + slack


def _identity(config: TrainConfig) -> str:
    """The options that decide the starting model."""
    names = (
        "task", "demonstrations", "prompts", "heldout", "model", "hidden_size", "layers", "seed",
        "warm_start_steps", "warm_start_lr", "max_completion_length",
    )  # fmt: skip
    given = {name: value for name in ("lora", "chat_template") if (value := getattr(config, name)) is not None}
    return json.dumps({name: getattr(config, name) for name in names} | given)


def _remove_incomplete(folder: Path, complete: Sequence[str]) -> None:
    for path in folder.glob("checkpoint-*") if folder.is_dir() else ():
        if str(path) not in complete and os.path.abspath(path) not in complete:
            shutil.rmtree(path)


def _last(records: Sequence[dict[str, Any]], key: str, default: float) -> float:
    return next((record[key] for record in reversed(records) if key in record), default)


def _mean(values: Any) -> float | None:
    found = [value for value in values if value is not None]
    return sum(found) / len(found) if found else None

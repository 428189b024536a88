"""One run in this process: data, warm start, hybrid phase, record."""

import contextlib
import fcntl
import json
import math
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.study.calibration import sampled_pass_rate
from benchmarks.study.drift import mean_kl
from benchmarks.study.methods import GENERATIONS, ROLLOUTS, STEP_DEMONSTRATIONS, STEPS, Arm, arm_of
from benchmarks.study.models import SIZES, WARM_START_BATCH, build
from benchmarks.study.regimes import Turning, cut, demonstrate, noisy, regime_of, wrong_answers
from benchmarks.study.rows import Row
from benchmarks.study.tasks import TASKS, task_data

PRELOAD = ("torch", "datasets", "reasoning_gym", "gac.tasks.evaluation", "gac.trainers.hybrid_grpo", "trl", "rich")
"""What a process may import before it is forked into runs."""

EVALUATE_EVERY = 25
LR_RAMP = 20
_GROUP = 5
"""Steps whose statistics are averaged into one number of the record."""


def train_row(row: Row, cache: Path) -> dict[str, Any]:
    """Makes the run and returns its record (`benchmarks/README.md` has the fields).

    `cache` keeps data and warm starts, which many runs share. The same row gives the same numbers on the same machine,
    but for those that measure time.
    """
    import torch

    torch.set_num_threads(1)  # operations of this size are too small to share out
    torch.backends.mkldnn.enabled = False  # its checks cost 5% of a run; the products are the same without it
    began = time.perf_counter()
    from transformers import PrinterCallback

    from benchmarks.study.ablations import registered
    from gac.tasks.models import load_model

    data, folder = warm_start(row, cache)

    # False, as when the committed runs were made: after the warm start prompts of leg_counting have no blanks
    initial, _ = load_model(str(folder), tokenizer_as_saved=False)
    model, tokenizer = load_model(str(folder), tokenizer_as_saved=False)
    regime = regime_of(row.regime)
    data["prompts"] = demonstrate(regime, data["prompts"], row.seed)
    length = max(len(item[part]) for part in ("answer", "completion") for split in data.values() for item in split) + 1
    recorder = _Recorder(model, initial, tokenizer, data["heldout"], length)
    reward = noisy(regime, recorder.reward, row.seed)
    with registered():
        trainer, demonstrations = _trainer(row, arm_of(row.method, row.setting), model, tokenizer, data, length, reward)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(recorder.callback())
        if regime.turns:
            trainer.add_callback(_turn_half_way(demonstrations, trainer))
        try:
            trainer.train()
        except RuntimeError:
            if all(parameter.isfinite().all() for parameter in model.parameters()):
                raise
            recorder.broke()  # weights that are not finite cannot be sampled from: the run counts, with what it reached
    return _record(row, recorder, trainer, time.perf_counter() - began)


def warm_start_id(row: Row) -> str:
    """Names the starting model of a run: runs of the same name share it."""
    sparse = "-sparse" if regime_of(row.regime).sparse else ""
    return f"{row.task}-{row.size}-seed{row.seed}{sparse}"


def warm_start(row: Row, cache: Path) -> tuple[dict[str, list[dict[str, Any]]], Path]:
    """Data and folder of the starting model, made where they are not there yet."""
    folder = cache / "warm_start" / warm_start_id(row)
    with _locked(folder.with_suffix(".lock")):
        if not folder.exists():
            part = folder.with_suffix(".part")
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
            _make_warm_start(row, part)
            part.rename(folder)
    return json.loads((folder / "data.json").read_text()), folder


def _make_warm_start(row: Row, folder: Path) -> None:
    from gac.tasks.warm_start import warm_start

    found = task_data(row.task, row.seed)
    data = {name: getattr(found, name) for name in ("heldout", "demonstrations", "prompts")}
    (folder / "data.json").write_text(json.dumps(data))
    texts = (item["prompt"] + item["answer"] for split in data.values() for item in split)
    texts = list(texts)

    def trained(steps: int) -> tuple[Any, Any]:
        model, tokenizer = build(row.size, texts, row.seed)
        warm_start(
            model,
            tokenizer,
            data["demonstrations"],
            steps=steps,
            batch_size=WARM_START_BATCH,
            lr=SIZES[row.size].warm_start_lr,
            seed=row.seed,
        )
        return model, tokenizer

    steps = TASKS[row.task].warm_start_steps[row.size]
    if regime_of(row.regime).sparse:
        length = max(len(item["answer"]) for split in data.values() for item in split) + 1
        steps, _ = cut(steps, lambda tried: sampled_pass_rate(*trained(tried), data["heldout"], length, row.seed))
    model, tokenizer = trained(steps)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _trainer(row: Row, arm: Arm, model, tokenizer, data, length: int, reward):
    """TRL's GRPO with a supervised branch, as the arm says, and the branch's demonstrations."""
    from datasets import Dataset

    from gac.runs.config import TrainConfig
    from gac.runs.libraries import quiet_libraries
    from gac.trainers import HybridGRPOConfig, HybridGRPOTrainer
    from gac.trainers.prompts import COLUMN
    from gac.trainers.rules import rule_of

    quiet_libraries()
    law, options = TrainConfig(law=arm.law, prior=arm.prior).law_and_options()
    arguments = HybridGRPOConfig(
        output_dir=tempfile.gettempdir(),
        law=law,
        law_options=options,
        estimator=arm.estimator,
        gac_interval=1,
        gac_metric=arm.metric,
        gac_report_interval=None,
        beta=arm.beta,
        sft_batch_size=STEP_DEMONSTRATIONS // arm.micro_batches,
        sft_weights=arm.sft_weights,
        gac_source_column="source" if arm.sft_weights == "source" else None,
        max_steps=STEPS,
        learning_rate=row.lr,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=LR_RAMP,
        per_device_train_batch_size=ROLLOUTS // arm.micro_batches,
        gradient_accumulation_steps=arm.micro_batches,
        num_generations=GENERATIONS,
        max_completion_length=length,
        seed=row.seed,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    # a rule takes its demonstrations from the prompts that have one: the same 400 that other laws draw from
    from_prompts = rule_of(arguments.build_controller().law).from_prompts
    shown = [arm.every_prompt or item["demonstrated"] for item in data["prompts"]]
    prompts = [
        item | {COLUMN: item["completion"] if given else None}
        for item, given in zip(data["prompts"], shown, strict=True)
    ]
    fields = ("prompt", "completion", "answer")
    demonstrations: Any = [
        {name: item[name] for name in fields} for item, given in zip(data["prompts"], shown, strict=True) if given
    ]
    if arm.sft_weights == "source":
        told = [item.get("source", "a") for item, given in zip(data["prompts"], shown, strict=True) if given]
        demonstrations = [row | {"source": label} for row, label in zip(demonstrations, told, strict=True)]
    if regime_of(row.regime).turns:
        if from_prompts:
            raise ValueError(f"regime {row.regime!r} has no form for {row.method!r}, which acts per prompt")
        others = [text for text, given in zip(wrong_answers(data["prompts"], row.seed), shown, strict=True) if given]
        wrong = [item | {"completion": other} for item, other in zip(demonstrations, others, strict=True)]
        demonstrations = Turning(demonstrations, wrong)
    trainer = HybridGRPOTrainer(
        model,
        reward,
        arguments,
        Dataset.from_list(prompts if from_prompts else data["prompts"]),
        None if from_prompts else demonstrations,
        processing_class=tokenizer,
    )
    return trainer, demonstrations


def _turn_half_way(demonstrations: Turning, trainer):
    """A callback after whose middle step demonstrations are wrong."""
    from transformers import TrainerCallback

    class Callback(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            demonstrations.turned = state.global_step >= STEPS // 2
            if state.global_step == STEPS // 2 and trainer.judges:
                trainer.rescore_demonstrations()

    return Callback()


class _Recorder:
    """Collects a run's numbers: logs of every step, accuracy and drift every so many."""

    def __init__(self, model, initial, tokenizer, heldout: Sequence[dict[str, Any]], length: int) -> None:
        self.model, self.initial, self.tokenizer, self.heldout, self.length = model, initial, tokenizer, heldout, length
        self.logs: list[dict[str, Any]] = []
        self.seconds: list[float] = []
        self.accuracy: list[list[float]] = []
        self.kl: list[list[float]] = []
        self.rollouts = 0
        self.evaluate(0)

    def reward(self, completions: Sequence[Any], answer: Sequence[str], **columns: Any) -> list[float]:
        """Exact match, counted."""
        from gac.tasks.problems import exact_match_reward

        self.rollouts += len(completions)
        return exact_match_reward(completions, answer)

    def evaluate(self, step: int) -> None:
        from gac.tasks.evaluation import accuracy

        self.accuracy.append(
            [step, round(accuracy(self.model, self.tokenizer, self.heldout, max_new_tokens=self.length), 6)]
        )
        drift = 0.0 if step == 0 else mean_kl(self.model, self.initial, self.tokenizer, self.heldout, self.length)
        self.kl.append([step, _rounded(drift)])

    def broke(self) -> None:
        """Fills up the curves of a run whose weights are not finite any more: it answers nothing."""
        for step in range(self.accuracy[-1][0] + EVALUATE_EVERY, STEPS + 1, EVALUATE_EVERY):
            self.accuracy.append([step, 0.0])
            self.kl.append([step, math.nan])

    def callback(self):
        from transformers import TrainerCallback

        recorder = self

        class Callback(TrainerCallback):
            def on_step_begin(self, args, state, control, **kwargs):
                self.begin = time.perf_counter()

            def on_step_end(self, args, state, control, **kwargs):
                recorder.seconds.append(time.perf_counter() - self.begin)
                if state.global_step % EVALUATE_EVERY == 0 or state.global_step == state.max_steps:
                    recorder.evaluate(state.global_step)

            def on_log(self, args, state, control, logs=None, **kwargs):
                if logs and "loss" in logs:
                    recorder.logs.append(dict(logs))

        return Callback()


def _record(row: Row, recorder: _Recorder, trainer, seconds: float) -> dict[str, Any]:
    from gac.trainers.rules import rule_of

    logs = recorder.logs
    task, arm = TASKS[row.task], arm_of(row.method, row.setting)
    rule = rule_of(trainer.mixer.controller.law)
    # a run that broke has fewer logs
    column = lambda name: [log.get(name, math.nan) for log in logs] + [math.nan] * (STEPS - len(logs))
    first = min(5, len(recorder.seconds) // 2)  # the first steps hold one-time costs
    settled = recorder.seconds[first:]
    busy = sum(settled)
    return {
        "key": row.key,
        **row.fields,
        "domain": task.domain,
        "role": task.role,
        "law": arm.law,
        "estimator": trainer.mixer.estimator,
        "metric": arm.metric,
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "steps": STEPS,
        "broke_at": len(logs) if len(logs) < STEPS else None,
        "accuracy": recorder.accuracy,
        "kl": recorder.kl,
        # rules that act per prompt have no mu that says how they mix
        "mu": [
            None if rule.from_prompts or not math.isfinite(value) else round(value, 4) for value in column("gac/mu")
        ],
        "reward": _means(column("reward"), 10),
        "statistics": {
            "step": [step for step, _ in _means(column("reward"), _GROUP)],
            **{
                name: [value for _, value in _means(column(f"gac/{name}"), _GROUP)]
                for name in ("sigma_s2", "sigma_r2", "delta_g2")
            },
        },
        "seconds": round(seconds, 2),
        "seconds_per_step": round(busy / len(settled), 4) if settled else None,
        "gac_share": round(sum(v for v in column("gac/seconds")[first:] if v == v) / busy, 5) if settled else None,
        "rollouts": recorder.rollouts,
        # a step without rollouts does not log it
        "tokens": next((int(log["num_tokens"]) for log in reversed(logs) if "num_tokens" in log), 0),
        "versions": _versions(),
        "command": f"python -m benchmarks.study row {row.key}",
    }


def _versions() -> dict[str, Any]:
    from gac.runs.folder import versions

    found = versions()
    names = ("python", "gac-kernels", "torch", "transformers", "trl", "reasoning-gym", "numpy")
    return {name: found[name] for name in names} | {"cpu": _cpu(), "cores": os.cpu_count(), "threads": 1}


def _cpu() -> str:
    """The processor's name as Linux tells it, else the architecture."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _means(values: Sequence[float], size: int) -> list[list[float]]:
    """``[last step, mean]`` of every `size` steps, over what was measured."""
    found = []
    for begin in range(0, len(values), size):
        known = [value for value in values[begin : begin + size] if math.isfinite(value)]
        found.append([min(begin + size, len(values)), _rounded(sum(known) / len(known)) if known else None])
    return found


def _rounded(value: float) -> float:
    """Four significant digits: enough for pictures, short in the file."""
    return float(f"{value:.4g}")


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield

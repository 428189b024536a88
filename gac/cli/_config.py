"""Options of a training run: their definition, checks, and the form in which a run directory keeps them."""

import argparse
import ast
import contextlib
import dataclasses
import os
from collections.abc import Iterator
from typing import Any

from gac.cli import UsageError

DEFAULT_TASK = "spell_backward:min_word_len=3,max_word_len=6"


@dataclasses.dataclass
class TrainConfig:
    """Everything that decides the numbers of a run. ``None`` where the default depends on the model."""

    task: list[str] = dataclasses.field(default_factory=lambda: [DEFAULT_TASK])
    demonstrations: int = 600
    prompts: int = 5000
    heldout: int = 500
    model: str | None = None
    hidden_size: int = 96
    layers: int = 3
    device: str = "auto"
    law: str = "gac"
    mu: float | None = None
    prior: str | None = None
    law_option: list[str] = dataclasses.field(default_factory=list)
    estimator: str = "auto"
    interval: int = 1
    metric: str = "gradient"
    report_interval: int = 5
    sft_loss: str = "nll"
    beta: float = 0.0
    steps: int = 400
    lr: float | None = None
    micro_batches: int = 4
    batch_size: int = 32
    generations: int = 8
    sft_batch_size: int = 16
    temperature: float = 1.0
    max_completion_length: int | None = None
    warm_start_steps: int | None = None
    warm_start_lr: float | None = None
    seed: int = 0
    threads: int | None = None
    eval_every: int = 20
    save_every: int = 50

    def with_model_defaults(self) -> "TrainConfig":
        """A copy where every option that depends on the kind of model has its value."""
        small = self.model is None
        fill = {"lr": 4e-4 if small else 1e-5, "warm_start_steps": 300 if small else 0}
        fill["warm_start_lr"] = 1e-3 if small else fill["lr"]
        fill["threads"] = 1 if small else 0  # its operations are too small to share out
        return dataclasses.replace(self, **{k: v for k, v in fill.items() if getattr(self, k) is None})

    def law_and_options(self) -> tuple[str, dict[str, Any]]:
        """Name and options of the law from ``--law``, ``--mu``, ``--prior`` and ``--law-option``."""
        name, options = parse_law(self.law)
        if self.mu is not None:
            if name not in ("gac", "fixed") or options:
                raise UsageError(f"--mu {self.mu} is a constant weight and cannot be combined with --law {self.law}")
            name, options = "fixed", {"mu": self.mu}
        if self.prior is not None:
            options["prior"] = parse_prior(self.prior)
        for option in self.law_option:
            options |= _pairs(option, f"--law-option {option}")
        return name, options


RESUME_MAY_CHANGE = ("steps", "device", "threads")
"""Options that `--resume` may change: more steps continue the same run."""


def add_training_options(parser: argparse.ArgumentParser, *, leave_out: tuple[str, ...] = ()) -> None:
    """Adds the options of `TrainConfig` to a parser, in groups. Unset options are absent from the namespace."""
    defaults = TrainConfig()

    def add(group, flag: str, text: str, **kwargs) -> None:
        name = flag.lstrip("-").replace("-", "_")
        if name in leave_out:
            return
        default = getattr(defaults, name)
        if "default" not in text and default not in (None, []):
            text += f" (default: {default})"
        group.add_argument(flag, dest=name, default=argparse.SUPPRESS, help=text.replace("%", "%%"), **kwargs)

    data = parser.add_argument_group("problems")
    add(
        data, "--task",
        "reasoning-gym data set, with parameters after a colon: chain_sum:num_terms=2,num_digits=2; several may be "
        "given (default: spelling words of 3 to 6 letters backwards)",
        nargs="+", metavar="NAME[:KEY=VALUE,...]",
    )  # fmt: skip
    add(
        data,
        "--demonstrations",
        "worked examples for the warm start and the supervised branch",
        type=positive,
        metavar="N",
    )
    add(data, "--prompts", "problems for the reinforcement branch", type=positive, metavar="N")
    add(data, "--heldout", "problems kept for evaluation, never trained on", type=positive, metavar="N")

    model = parser.add_argument_group("model")
    add(
        model, "--model",
        "folder or hub name of a causal LM with its tokenizer (default: a small Qwen2-architecture model with a "
        "character tokenizer, from scratch)",
        metavar="NAME",
    )  # fmt: skip
    add(model, "--hidden-size", "width of the small model", type=positive, metavar="N")
    add(model, "--layers", "depth of the small model", type=positive, metavar="N")
    add(model, "--device", "where to train", choices=("auto", "cpu", "cuda"))

    mix = parser.add_argument_group("mix of the branches")
    add(
        mix, "--law",
        "how mu, the weight of the supervised branch, is set, or a rule that acts per prompt; options after a colon, "
        "such as fixed:0.1, gac:half_life=20 or hpt:gate=2",
        metavar="NAME[:...]",
    )  # fmt: skip
    add(mix, "--mu", "a constant weight in [0, 1]; short for --law fixed:MU", type=float, metavar="MU")
    add(
        mix, "--prior",
        "what mu leans on: a number, or warmup,decay,peak,valley (default: none)",
        metavar="NUMBER|W,D,P,V",
    )  # fmt: skip
    add(mix, "--law-option", "another option of the law; may be repeated", action="append", metavar="KEY=VALUE")
    add(mix, "--estimator", "how gradients are measured: auto, exact, sketch or coefficient", metavar="NAME")
    add(mix, "--interval", "measure in every N-th step", type=positive, metavar="N")
    add(
        mix, "--metric",
        "space of the statistics: that of the gradients, or that of Adam's steps",
        choices=("gradient", "optimizer"),
    )  # fmt: skip
    add(
        mix, "--report-interval",
        "take every N-th measured step apart by module, for gac report; 0: never",
        type=natural, metavar="N",
    )  # fmt: skip
    add(mix, "--sft-loss", "token loss of the supervised branch", choices=("nll", "phi"))

    add(
        mix, "--beta",
        "coefficient of the KL divergence from the starting model in the reinforcement loss; laws that follow KL need "
        "one above 0, and 1e-6 measures KL without pulling",
        type=non_negative, metavar="X",
    )  # fmt: skip

    training = parser.add_argument_group("training")
    add(training, "--steps", "optimizer steps of the hybrid phase", type=positive, metavar="N")
    add(training, "--lr", "learning rate (default: 4e-4; 1e-5 with --model)", type=positive_float, metavar="X")
    add(training, "--micro-batches", "micro-batches a branch and step", type=positive, metavar="N")
    add(training, "--batch-size", "rollouts a micro-batch", type=positive, metavar="N")
    add(training, "--generations", "rollouts a prompt", type=positive, metavar="N")
    add(training, "--sft-batch-size", "demonstrations a micro-batch", type=positive, metavar="N")
    add(training, "--temperature", "of the rollouts", type=positive_float, metavar="X")
    add(
        training, "--max-completion-length",
        "tokens a rollout may have (default: from the longest answer)",
        type=positive, metavar="N",
    )  # fmt: skip
    add(
        training, "--warm-start-steps",
        "supervised steps before the hybrid phase (default: 300; 0 with --model)",
        type=natural, metavar="N",
    )  # fmt: skip
    add(
        training, "--warm-start-lr",
        "learning rate of the warm start (default: 1e-3; --lr with --model)",
        type=positive_float, metavar="X",
    )  # fmt: skip
    add(training, "--seed", "decides the problems, the model and every sample", type=natural, metavar="N")
    add(
        training, "--threads",
        "CPU threads; 0 as torch chooses (default: 1 for the small model, whose operations are small, else 0)",
        type=natural, metavar="N",
    )  # fmt: skip
    add(training, "--eval-every", "steps between two evaluations", type=positive, metavar="N")
    add(training, "--save-every", "steps between two checkpoints", type=positive, metavar="N")


def config_from(args: argparse.Namespace, base: TrainConfig | None = None) -> TrainConfig:
    """`base` (default: all defaults) with the options that were given."""
    names = {field.name for field in dataclasses.fields(TrainConfig)}
    return dataclasses.replace(base or TrainConfig(), **{k: v for k, v in vars(args).items() if k in names})


def check(config: TrainConfig) -> None:
    """Raises `UsageError` for anything that would fail later; knows tasks, laws and estimators by name."""
    from gac.laws.controller import Controller
    from gac.laws.rules import carried_out
    from gac.options import ESTIMATORS
    from gac.tasks.problems import parse_task
    from gac.trainers.rules import rule_of

    with usage_errors():
        for task in config.task:
            parse_task(task)
        name, options = config.law_and_options()
        with carried_out():
            law = Controller(name, **options).law
        rule_of(law).check(config.generations)
    if "kl" in law.needs and not config.beta:
        raise UsageError(
            f"--law {config.law} follows the KL divergence from the starting model, which is measured only with --beta "
            "above 0; --beta 1e-6 measures it and hardly pulls"
        )
    if config.estimator not in ESTIMATORS:
        raise UsageError(f"unknown estimator {config.estimator!r}; known: {', '.join(ESTIMATORS)}")
    if config.generations < 2:
        raise UsageError("--generations must be at least 2: GRPO compares the rollouts of a prompt")
    rollouts = config.batch_size * config.micro_batches
    if rollouts % config.generations:
        raise UsageError(
            f"--batch-size {config.batch_size} times --micro-batches {config.micro_batches} is {rollouts} rollouts a "
            f"step, not a multiple of --generations {config.generations}"
        )
    if config.prompts * config.generations < rollouts:
        raise UsageError(
            f"--prompts {config.prompts} is too few for one step; it needs {rollouts // config.generations}"
        )
    if config.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise UsageError("--device cuda: torch sees no CUDA device; use --device cpu or auto")


def parse_law(text: str) -> tuple[str, dict[str, Any]]:
    """``fixed:0.1`` -> ``("fixed", {"mu": 0.1})``; ``gac:half_life=20,cap=0.05`` -> its name and options."""
    name, _, rest = text.strip().partition(":")
    if not rest:
        return name, {}
    if "=" not in rest:
        if name != "fixed":
            raise UsageError(f"law {text!r}: options are written {name}:key=value,key=value")
        rest = f"mu={rest}"
    return name, _pairs(rest, f"law {text!r}")


def parse_prior(text: str) -> float | dict[str, float]:
    """A constant, or the four arguments of the warm-up and cosine schedule."""
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) == 1:
        return numbers[0]
    if len(numbers) == 4:
        warmup, decay, peak, valley = numbers
        return {"warmup": int(warmup), "decay": int(decay), "peak": peak, "valley": valley}
    raise UsageError(f"--prior {text!r}: give one number, or warmup,decay,peak,valley such as 20,200,0.85,0.15")


def _pairs(text: str, where: str) -> dict[str, Any]:
    options = {}
    for part in text.split(","):
        key, equals, value = part.partition("=")
        if not equals:
            raise UsageError(f"{where}: {part!r} is not of the form key=value")
        value = value.strip()
        try:
            options[key.strip()] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            if not value.isidentifier():
                raise UsageError(f"{where}: {value!r} is neither a number nor a word") from None
            options[key.strip()] = value  # alpha=kl, prior_weight=se
    return options


@contextlib.contextmanager
def usage_errors() -> Iterator[None]:
    """Turns the errors by which the library rejects a value into `UsageError`."""
    try:
        yield
    except (ValueError, TypeError, ImportError) as error:
        raise UsageError(" ".join(str(error).split())) from error


def positive(text: str) -> int:
    """An integer from 1 on."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return int(text)


def natural(text: str) -> int:
    """An integer from 0 on."""
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 on")
    return int(text)


def positive_float(text: str) -> float:
    """A number above 0."""
    value = _float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def non_negative(text: str) -> float:
    """A number from 0 on."""
    value = _float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 on")
    return value


def _float(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("nan")


def quiet_libraries() -> None:
    """Turns off progress bars, telemetry and notices of third-party libraries; errors still show."""
    import logging
    import warnings

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings("ignore", message=".*pin_memory.*")
    for name in ("transformers", "trl", "accelerate", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)

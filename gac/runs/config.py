"""Options of a training run: their definition, checks, and the form in which a run directory keeps them."""

import ast
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gac.runs.errors import UsageError, usage_errors
from gac.tasks.chat import PLAIN

DEFAULT_TASK = "spell_backward:min_word_len=3,max_word_len=6"
SMALL_MODEL = {"hidden_size": 96, "layers": 3}
_OF_SMALL_MODELS = tuple(SMALL_MODEL)
_OF_PRETRAINED_MODELS = ("lora", "chat_template", "model_cache")


@dataclasses.dataclass
class TrainConfig:
    """Everything that decides the numbers of a run. ``None`` where the default depends on the model."""

    task: list[str] = dataclasses.field(default_factory=lambda: [DEFAULT_TASK])
    demonstrations: int = 600
    prompts: int = 5000
    heldout: int = 500
    model: str | None = None
    hidden_size: int | None = None
    layers: int | None = None
    chat_template: str | None = None
    lora: int | None = None
    gradient_checkpointing: bool | None = None
    model_cache: str | None = None
    device: str = "auto"
    law: str = "gac"
    mu: float | None = None
    prior: str | None = None
    law_option: list[str] = dataclasses.field(default_factory=list)
    estimator: str = "auto"
    overhead: float | None = None
    interval: int | None = None
    metric: str = "gradient"
    report_interval: int = 5
    sft_loss: str = "nll"
    sft_weights: str | None = None
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

    @classmethod
    def from_stored(cls, options: Mapping[str, Any]) -> "TrainConfig":
        """The configuration that a run directory holds.

        Raises:
            TypeError: it holds an option that there is none of.
        """
        config = cls(**options)
        # earlier versions stored the small model's size for every model
        return config if config.model is None else dataclasses.replace(config, hidden_size=None, layers=None)

    def with_model_defaults(self) -> "TrainConfig":
        """A copy where every option that depends on the kind of model has its value."""
        small = self.model is None
        # adapters begin at 0 and are scaled down: they take ten times the rate of all weights
        fill = {"lr": 4e-4 if small else 1e-4 if self.lora else 1e-5, "warm_start_steps": 300 if small else 0}
        fill["warm_start_lr"] = 1e-3 if small else self.lr or fill["lr"]
        fill["threads"] = 1 if small else 0  # its operations are too small to share out
        fill["gradient_checkpointing"] = not small
        if small:
            fill |= SMALL_MODEL
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


RESUME_MAY_CHANGE = ("steps", "device", "threads", "model_cache")
"""Options that `--resume` may change: more steps continue the same run."""


def changed_flags(wanted: TrainConfig, stored: Mapping[str, Any], *, may_change: Sequence[str]) -> str:
    """Flags of the options of `wanted` that a stored run has otherwise, as ``--lr, --seed``; empty where none differs.

    Args:
        wanted: the configuration that is asked for.
        stored: options by name, as `config.json` of a run directory holds them.
        may_change: names of options that are not looked at.
    """
    names = [name for name, value in vars(wanted).items() if name not in may_change and stored.get(name) != value]
    return ", ".join("--" + name.replace("_", "-") for name in names)


def check(config: TrainConfig) -> None:
    """Raises `UsageError` for anything that would fail later; knows tasks, laws and estimators by name."""
    from gac.laws.controller import Controller
    from gac.options import ESTIMATORS
    from gac.tasks.problems import parse_task
    from gac.trainers.rules import rule_of

    _check_model(config)
    with usage_errors():
        for task in config.task:
            parse_task(task)
        name, options = config.law_and_options()
        law = Controller(name, **options).law
        rule = rule_of(law)
        rule.check(config.generations)
    if "kl" in law.needs and not config.beta:
        raise UsageError(
            f"--law {config.law} follows the KL divergence from the starting model, which is measured only with --beta "
            "above 0; --beta 1e-6 measures it and hardly pulls"
        )
    if config.estimator not in ESTIMATORS:
        raise UsageError(f"unknown estimator {config.estimator!r}; known: {', '.join(ESTIMATORS)}")
    if config.sft_weights is not None and (rule.from_prompts or config.estimator == "coefficient"):
        raise UsageError(
            f"--sft-weights {config.sft_weights} with --law {config.law} and --estimator {config.estimator}: laws that "
            "act per prompt choose demonstrations by rewards themselves, and the coefficient estimator reads no "
            "gradients; leave one of them out"
        )
    if config.overhead is not None and config.interval is not None:
        raise UsageError("--overhead and --interval: measure as much as a share of the time pays for, or every N steps")
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


def _check_model(config: TrainConfig) -> None:
    """Raises `UsageError` for options that do not go with the kind of model, and for what they need."""
    kind, others = ("--model", _OF_SMALL_MODELS) if config.model else ("no --model", _OF_PRETRAINED_MODELS)
    if config.model == "":
        raise UsageError("--model is empty: give a folder, a hub name or a GGUF file, or leave it out")
    for name in others:
        if (value := getattr(config, name)) is not None:
            flag = f"--{name.replace('_', '-')}"
            what = "the small model's alone, a pretrained one has its own" if config.model else "a pretrained model's"
            raise UsageError(
                f"{flag} {value} with {kind}: it is {what}; leave it out{'' if config.model else ', or give --model'}"
            )
    with usage_errors():
        if config.lora is not None:
            from gac.tasks.adapters import require_peft

            require_peft(f"--lora {config.lora}")
    template = config.chat_template
    if template not in (None, PLAIN) and not Path(template).expanduser().is_file():
        raise UsageError(f"--chat-template {template}: there is no such file; give a Jinja template, or {PLAIN}")


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

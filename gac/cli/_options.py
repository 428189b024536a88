"""Options of a training run on the command line."""

import argparse
import dataclasses
from typing import Any

from gac.runs.config import TrainConfig


def add_training_options(parser: argparse.ArgumentParser, *, leave_out: tuple[str, ...] = ()) -> None:
    """Adds the options of `TrainConfig` to a parser, in groups. Unset options are absent from the namespace."""
    defaults = TrainConfig()

    def add(group: Any, flag: str, text: str, **kwargs: Any) -> None:
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
        "a causal LM with its tokenizer and chat template: a folder (of LoRA adapters too), a hub name, a GGUF file, "
        "the quoted pattern of its parts, or package:NAME for one that an installed package ships (default: a small "
        "Qwen2-architecture model with a character tokenizer, from scratch)",
        metavar="NAME",
    )  # fmt: skip
    add(
        model, "--lora",
        "train LoRA adapters of this rank on all linear layers, by peft, instead of all weights (16 where no rank is "
        "given)",
        nargs="?", const=16, type=positive, metavar="RANK",
    )  # fmt: skip
    add(
        model, "--gradient-checkpointing",
        "compute activations again in backward passes: less memory, a third more time (default: with --model)",
        action=argparse.BooleanOptionalAction,
    )  # fmt: skip
    add(
        model, "--chat-template",
        "Jinja template instead of the tokenizer's own, or none to ask in plain text",
        metavar="FILE",
    )  # fmt: skip
    add(
        model, "--model-cache",
        "where GGUF files are converted to, once (default: gac in XDG_CACHE_HOME or ~/.cache)",
        metavar="DIR",
    )  # fmt: skip
    add(model, "--hidden-size", "width of the small model (default: 96)", type=positive, metavar="N")
    add(model, "--layers", "depth of the small model (default: 3)", type=positive, metavar="N")
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
    add(mix, "--estimator", "how gradients are measured: auto, exact, sketch, coefficient or sequence", metavar="NAME")
    add(mix, "--overhead", "share of a step's time that measuring may take (default: 0.01)", type=share, metavar="X")
    add(mix, "--interval", "measure in every N-th step instead; repeats to the bit", type=positive, metavar="N")
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
        mix, "--sft-weights",
        "reward: each demonstration weighs what its reward is above the policy's at its prompt (default: all alike)",
        choices=("reward",),
    )  # fmt: skip

    add(
        mix, "--beta",
        "coefficient of the KL divergence from the starting model in the reinforcement loss; laws that follow KL need "
        "one above 0, and 1e-6 measures KL without pulling",
        type=non_negative, metavar="X",
    )  # fmt: skip

    training = parser.add_argument_group("training")
    add(training, "--steps", "optimizer steps of the hybrid phase", type=positive, metavar="N")
    add(
        training,
        "--lr",
        "learning rate (default: 4e-4; 1e-5 with --model, 1e-4 with --lora)",
        type=positive_float,
        metavar="X",
    )
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


def share(text: str) -> float:
    """A number above 0, at most 1."""
    value = _float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0 and at most 1")
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

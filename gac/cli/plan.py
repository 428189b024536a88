"""Predicts what GAC costs, and how sure its mu is, for a model and machines that need not be at hand.

Sizes are those that the code would allocate; times come from published peaks of the device and a stated efficiency.
docs/scaling.md has the cost model, its assumptions and what was measured. Several models or numbers of ranks, separated
by commas, give a table with a line for each."""

import argparse
import dataclasses
import json
from collections.abc import Callable, Iterator
from typing import Any

from gac.runs.errors import UsageError

HELP = "predict overhead, memory, traffic and the error of mu for a model and a cluster"
EPILOG = """\
examples:
  gac plan --params 70e9 --ranks 1024 --tokens 8192 --device h100
  gac plan --params 70B --ranks 1024 --sharding fsdp --interval 10
  gac plan --params ./my-model/config.json --trainable 40e6 --ranks 8
  gac plan --params 1B,8B,70B --ranks 8,64 --markdown
  gac plan --params 1B --ranks 8 --estimator sequence --interval 10
  gac plan --params 1B --bandwidth 1.2e12 --flops 2e14 --link-bandwidth 2.5e10"""

_DEVICES = ("h100", "h200", "a100", "b200", "cpu")
_SHARDINGS = ("ddp", "fsdp")
_ESTIMATORS = ("auto", "sketch", "exact", "sequence")
_METRICS = ("gradient", "optimizer")
_DTYPES = ("bf16", "fp16", "fp32")


def _number(low: float, *, whole: bool = False, open_: bool = False) -> Callable[[str], float]:
    """A type for numbers from ``low`` on (above it when ``open_``), such as 70e9."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        good = low < value < 1e30 if open_ else low <= value < 1e30
        if not good or (whole and value != int(value)):
            kind = "whole number" if whole else "number"
            raise argparse.ArgumentTypeError(f"{text!r} is no {kind} {'above' if open_ else 'from'} {low:g}")
        return int(value) if whole else value

    return parse


_count = _number(1, whole=True)


def _counts(text: str) -> tuple[int, ...]:
    return tuple(int(_count(part.strip())) for part in text.split(","))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``gac plan``."""
    positive = _number(0.0, open_=True)
    model = parser.add_argument_group("model")
    model.add_argument(
        "--params", required=True, metavar="LIST",
        help="a number such as 70e9, one of 10M, 0.1B, 1B, 8B, 70B, 405B, or the path of a transformers configuration",
    )  # fmt: skip
    model.add_argument("--trainable", type=_count, metavar="N", help="trainable parameters, as LoRA adapters")
    model.add_argument("--dtype", choices=_DTYPES, default="bf16", help="of the gradients")
    step = parser.add_argument_group("step")
    step.add_argument("--tokens", type=_count, default=8192, metavar="N", help="of a micro-batch of one rank")
    step.add_argument("--micro-batches", type=_count, default=4, metavar="N", help="of a branch, per rank and step")
    step.add_argument("--interval", type=_count, default=1, metavar="N", help="steps between measurements")
    step.add_argument("--estimator", choices=_ESTIMATORS, default="auto")
    step.add_argument("--length", type=_count, default=1024, metavar="N", help="tokens of a sequence, for sequence")
    step.add_argument("--sketch-size", type=int, choices=(8, 16, 32, 64), default=32, help="of a layer, for sequence")
    step.add_argument("--metric", choices=_METRICS, default="gradient", help="optimizer also reads Adam's moments")
    machine = parser.add_argument_group("machines")
    machine.add_argument("--ranks", type=_counts, default=(1,), metavar="LIST", help="data-parallel ranks (default: 1)")
    machine.add_argument("--sharding", choices=_SHARDINGS, default="ddp")
    machine.add_argument("--device", choices=_DEVICES, default="h100")
    machine.add_argument("--bandwidth", type=positive, metavar="B/S", help="peak of the memory, not the device's")
    machine.add_argument("--flops", type=positive, metavar="1/S", help="dense peak, not the device's")
    machine.add_argument("--link-bandwidth", type=positive, metavar="B/S", help="between ranks, one direction")
    noise = parser.add_argument_group("gradients and law")
    noise.add_argument("--noise-rank", type=_number(1.0), metavar="R", help="directions that carry the noise")
    noise.add_argument(
        "--noise-excess", type=_number(0.0), metavar="K", help="relative variance of squared noise by heavy tails"
    )
    noise.add_argument(
        "--disagreement", type=_number(0.0), metavar="X", help="delta_g2/(sigma_s2+sigma_r2) of single micro-batches"
    )
    noise.add_argument("--noise-ratio", type=positive, metavar="Q", help="sigma_s2/sigma_r2")
    noise.add_argument("--alpha", type=_number(0.0), default=0.5, metavar="A", help="weight of SFT in the target")
    noise.add_argument("--half-life", type=positive, metavar="N", help="of the law's averages, in steps")
    noise.add_argument(
        "--momentum", type=_number(0.0), default=0.9, metavar="M", help="of the optimizer: Adam's beta1 (default: 0.9)"
    )
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="print JSON")
    output.add_argument("--markdown", action="store_true", help="print Markdown")


def run(args: argparse.Namespace) -> int:
    """Runs ``gac plan``."""
    from gac.plan import make_plan

    try:
        setups = list(_setups(args))
        plans = [make_plan(setup) for setup in setups]
    except ValueError as error:
        raise UsageError(str(error)) from error
    if args.json:
        print(json.dumps([_record(s, p) for s, p in zip(setups, plans, strict=True)], indent=1))
    elif len(plans) == 1:
        _print_one(setups[0], plans[0], markdown=args.markdown)
    else:
        _print_many(setups, plans, markdown=args.markdown)
    return 0


def _setups(args: argparse.Namespace) -> Iterator:
    from gac.plan import DEVICES, Noise, Parameters, Setup

    device = DEVICES[args.device]
    peaks = {"bandwidth": args.bandwidth, "flops": args.flops, "link": args.link_bandwidth}
    peaks["network"] = args.link_bandwidth
    peaks = {name: value for name, value in peaks.items() if value is not None}
    if peaks:
        device = dataclasses.replace(device, name=f"{device.name}, changed", **peaks)
    assumed = {
        "rank": args.noise_rank,
        "excess": args.noise_excess,
        "disagreement": args.disagreement,
        "ratio": args.noise_ratio,
    }
    noise = Noise(**{name: value for name, value in assumed.items() if value is not None})
    same = (
        "trainable",
        "sharding",
        "tokens",
        "micro_batches",
        "length",
        "sketch_size",
        "interval",
        "dtype",
        "estimator",
        "metric",
        "alpha",
        "momentum",
    )
    options = {name: getattr(args, name) for name in same}
    for name in args.params.split(","):
        parameters = Parameters.of(name.strip())
        for ranks in args.ranks:
            yield Setup(parameters, device, ranks=ranks, half_life=args.half_life, noise=noise, **options)


def _record(setup: Any, plan: Any) -> dict:
    """Everything that was asked and assumed, and the plan."""
    asked = dataclasses.asdict(setup) | {"parameters": setup.parameters.name}
    return {"setup": asked, "plan": dataclasses.asdict(plan)}


def _print_one(setup: Any, plan: Any, *, markdown: bool) -> None:
    from gac.runs.console import Reporter, markdown_table

    title = (
        f"{_count_of(plan.parameters)} parameters, {setup.ranks:,} x {setup.device.name}, {setup.sharding}; "
        f"{setup.micro_batches} micro-batches of {setup.tokens:,} tokens for each branch"
    )
    rows = _lines(setup, plan)
    if markdown:
        print(f"{title}\n\n{markdown_table(('', 'prediction'), rows)}")
        for note in plan.notes:
            print(f"- {note}")
        return
    reporter = Reporter()
    reporter.table(title, ("for each rank", "prediction"), rows)
    for note in plan.notes:
        reporter.say(f"note: {note}")


def _lines(setup: Any, plan: Any) -> list[tuple[str, str]]:
    every = "" if setup.interval == 1 else f", measuring every {setup.interval} steps"
    return [
        ("trainable parameters", f"{plan.trainable:,} in {plan.tensors:,} tensors"),
        ("estimator", plan.estimator),
        ("bytes read in a backward pass", _bytes(plan.read_bytes_per_backward)),
        ("bytes read in a step", _bytes(plan.read_bytes_per_step)),
        ("bytes moved in a step", _bytes(plan.moved_bytes_per_step)),
        ("kernel launches in a backward pass", f"{plan.launches_per_backward}"),
        ("host time in a step, beside the device", _seconds(plan.host_seconds_per_step)),
        ("sketch memory", f"{_bytes(plan.sketch_bytes)}, {_percent(plan.sketch_share)} of the gradients"),
        (
            "all-reduced in a step",
            f"{_bytes(plan.all_reduce_bytes)}, {_percent(plan.all_reduce_share)} of the gradients"
            if setup.ranks > 1
            else "nothing",
        ),
        ("time to read", _seconds(plan.read_seconds)),
        ("time to end the step", _seconds(plan.finish_seconds)),
        ("time to all-reduce", _seconds(plan.all_reduce_seconds)),
        ("time of the model's step", _seconds(plan.step_seconds)),
        (f"overhead{every}", _percent(plan.share)),
        ("host time over the model's step", _percent(plan.host_share)),
        ("contributions of a branch in a step", f"{plan.contributions:,}"),
        ("mu", f"{plan.mu:.3f}"),
        ("standard error of mu, one step", f"{plan.mu_se_one_step:.2g}"),
        ("standard error of mu, averaged", f"{plan.mu_se:.2g} (sketch {plan.mu_se_sketch:.2g})"),
    ]


def _print_many(setups: Any, plans: Any, *, markdown: bool) -> None:
    from gac.runs.console import Reporter, markdown_table

    columns = (
        "model", "ranks", "read a step", "launches a backward", "sketches", "of the gradients", "all-reduced",
        "of the gradients", "overhead", "host", "se of mu",
    )  # fmt: skip
    rows = [
        (
            setup.parameters.name,
            f"{setup.ranks:,}",
            _bytes(plan.read_bytes_per_step),
            f"{plan.launches_per_backward}",
            _bytes(plan.sketch_bytes),
            _percent(plan.sketch_share),
            _bytes(plan.all_reduce_bytes),
            _percent(plan.all_reduce_share),
            _percent(plan.share),
            _percent(plan.host_share),
            f"{plan.mu_se:.2g}",
        )
        for setup, plan in zip(setups, plans, strict=True)
    ]
    if markdown:
        print(markdown_table(columns, rows), end="")
        return
    reporter = Reporter()
    first = setups[0]
    reporter.table(f"{first.device.name}, {first.sharding}, {first.tokens:,} tokens", columns, rows)
    for note in dict.fromkeys(note for plan in plans for note in plan.notes):
        reporter.say(f"note: {note}")


def _scaled(value: float, units: tuple[str, ...]) -> str:
    """Three digits and the unit that fits; each unit is 1,000 of the one before."""
    place = 0
    while value >= 999.5 and place < len(units) - 1:
        value, place = value / 1000, place + 1
    return f"{value:.3g} {units[place]}"


def _bytes(value: float) -> str:
    return _scaled(value, ("B", "kB", "MB", "GB", "TB"))


def _seconds(value: float) -> str:
    return _scaled(value * 1e6, ("us", "ms", "s")) if value else "0"


def _count_of(value: float) -> str:
    return _scaled(value, ("", "K", "M", "B", "T")).replace(" ", "")


def _percent(value: float) -> str:
    return f"{100 * value:.2g}%" if value < 0.0995 else f"{100 * value:.3g}%"

"""Measures the kernels on this machine beside torch's own ways, and what a training step pays for GAC.

Every kernel is first compared with a float64 reference; a wrong one is reported without speed-ups, and the exit code
is then 1. Caches are cold and variants take turns. The read limit is measured in the same run."""

import argparse
import importlib.util
import itertools
import sys
from pathlib import Path
from time import monotonic
from typing import Any

import torch

from gac.runs.errors import UsageError

HELP = "measure kernels and whole-step overhead on this machine"
EPILOG = """\
examples:
  gac bench --quick                            a minute: three sizes, the smallest model list
  gac bench --device cuda --dtype bf16         kernels on the GPU, bf16 only
  gac bench --ops sketch,pair_moments --sizes 64K,64M --models none
  gac bench --step --model 1B --tokens 8192    overhead of whole training steps
  gac bench --all --out results/mine           everything; writes mine.json, mine.md and mine.png"""

_OPERATIONS = (
    "moments",
    "sketch",
    "weighted_sketch",
    "absorb_sketch_",
    "accumulate_",
    "pair_moments",
    "mix_",
    "absorb_",
    "token_moments",
    "kronecker_sketch",
)
_PEERS = ("eager", "foreach", "compile")
_MODELS = ("0.1B", "1B", "8B")
_STEP_MODELS = ("10M", *_MODELS)
_ESTIMATORS = ("auto", "exact", "sketch", "sequence")
_DTYPES = ("bf16", "fp16", "fp32")


def _names(known: tuple[str, ...]) -> Any:
    """A type for comma-separated names."""

    def parse(text: str) -> tuple[str, ...]:
        if text == "none":
            return ()
        names = tuple(part.strip() for part in text.split(","))
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(f"unknown {name!r}; known: {', '.join(known)}, none")
        return names

    return parse


def parse_size(text: str) -> int:
    """``"64K"`` -> 65536."""
    scale = {"K": 1 << 10, "M": 1 << 20}.get(text[-1:].upper(), 1)
    digits = text if scale == 1 else text[:-1]
    if not digits.isdigit() or int(digits) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no size: write 4096, 64K or 4M")
    return int(digits) * scale


def _sizes(text: str) -> tuple[int, ...]:
    return () if text == "none" else tuple(parse_size(part.strip()) for part in text.split(","))


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no positive number of seconds")
    return value


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``gac bench``."""
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--step", action="store_true", help="whole training steps, hooks and import instead of kernels")
    what.add_argument("--all", action="store_true", help="kernels and whole steps")
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda or cuda:N (default: cuda where there is a GPU)")
    parser.add_argument(
        "--dtype", type=_names(_DTYPES), metavar="LIST", help="of bf16, fp16, fp32 (default: bf16,fp32)"
    )
    parser.add_argument(
        "--out", type=Path, metavar="PREFIX",
        help="write PREFIX.json, PREFIX.md and PREFIX.png (default: runs/bench/<device>)",
    )  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="few sizes and short measurements")
    parser.add_argument("--max-seconds", type=_seconds, metavar="S", help="start nothing new after this long")
    kernels = parser.add_argument_group("kernels")
    kernels.add_argument("--ops", type=_names(_OPERATIONS), default=_OPERATIONS, metavar="LIST", help="operations")
    kernels.add_argument("--sizes", type=_sizes, metavar="LIST", help="elements, as 1K,64K,4M (default: 1K to 64M)")
    kernels.add_argument(
        "--models", type=_names(_MODELS), metavar="LIST", help="parameter lists of these models (default: 0.1B,1B,8B)"
    )
    kernels.add_argument("--peers", type=_names(_PEERS), default=_PEERS, metavar="LIST", help="kinds of peers")
    kernels.add_argument("--seconds", type=_seconds, metavar="S", help="spent on each case, about (default: 0.5)")
    step = parser.add_argument_group("whole steps")
    step.add_argument(
        "--model", type=_names(_STEP_MODELS), metavar="LIST", help="default: 10M on a CPU; 0.1B,1B on a GPU"
    )
    step.add_argument(
        "--tokens", type=_sizes, metavar="LIST", help="per micro-batch (default: 1K on a CPU, 1K,8K,32K on a GPU)"
    )
    step.add_argument(
        "--estimator", type=_names(_ESTIMATORS), default=("auto",), metavar="LIST",
        help="of auto, exact, sketch, sequence (default: auto)",
    )  # fmt: skip
    step.add_argument("--step-seconds", type=_seconds, metavar="S", help="spent on each configuration, about")


def run(args: argparse.Namespace) -> int:
    """Runs ``gac bench``."""
    for name in ("rich", "matplotlib", *(("transformers",) if args.step or args.all else ())):
        if importlib.util.find_spec(name) is None:
            raise UsageError(f"{name} is not installed: pip install 'gac-kernels[bench]'")
    from gac.bench import facts, limits, report

    device = _device(args.device)
    prefix = args.out or Path("runs/bench") / device.type
    results = {
        "format": report.FORMAT,
        "device_type": device.type,
        "facts": facts.collect(device, getattr(args, "argv", None)),
        "read_limit": limits.METHOD[device.type],
        "kernels": [],
        "step": [],
        "host": {},
    }
    nominal = limits.nominal_bandwidth(device)
    if nominal:
        results["nominal_gbps"] = nominal * 1e-9
    start = monotonic()
    save = lambda: report.write_json(_with_suffix(prefix, ".json"), results)
    if not args.step:
        _run_kernels(args, device, results, save)
    if args.step or args.all:
        _run_steps(args, device, results, save, start)
    results["seconds"] = monotonic() - start
    save()
    _with_suffix(prefix, ".md").write_text(report.markdown(results), encoding="utf-8")
    report.show(results)
    return _finish(results, prefix)


def _device(name: str | None) -> Any:
    import torch

    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"--device {name}: {str(error).splitlines()[0]}") from error
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device {name}: kernels run on cpu and cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"--device {name}: torch sees no GPU here")
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else device


def _with_suffix(prefix: Path, suffix: str) -> Path:
    return prefix.with_name(prefix.name + suffix)


def _run_kernels(args: argparse.Namespace, device: torch.device, results: dict, save: Any) -> None:
    from gac.bench import kernels

    chosen = {
        "dtypes": args.dtype,
        "sizes": args.sizes,
        "models": args.models,
        "seconds": args.seconds,
        "limit": args.max_seconds,
    }
    if args.quick:
        quick = {"sizes": kernels.QUICK_SIZES, "models": ("0.1B",), "seconds": 0.2}
        chosen = quick | {name: value for name, value in chosen.items() if value is not None}
    chosen = {name: value for name, value in chosen.items() if value is not None}
    options = kernels.Options(device, operations=args.ops, peers=args.peers, **chosen)

    found: dict[tuple, dict] = {}

    def on_row(row: dict) -> None:
        found[row["operation"], row["dtype"], row["label"]] = row  # one that is measured again keeps its place
        results["kernels"][:] = found.values()
        save()
        print(_line(row), file=sys.stderr, flush=True)

    kernels.run(options, on_row)


def _line(row: dict) -> str:
    from gac.bench.kernels import describe
    from gac.bench.report import seconds

    if "variants" not in row:
        return f"{describe(row)}: {row['note']}"
    verdict = f"{row['percent_of_read']:.0f}% of the read limit" if row["gate"]["ok"] else "GATE RED"
    return f"{describe(row)}: {seconds(row['variants']['gac']['p50'])}, {verdict}"


def _run_steps(args: argparse.Namespace, device: torch.device, results: dict, save: Any, start: float) -> None:
    import torch

    from gac.bench import host, step
    from gac.bench.case import dtype_of
    from gac.bench.report import step_row
    from gac.plan.shapes import MODELS

    gpu = device.type == "cuda"
    names = args.model if args.model is not None else ("0.1B", "1B") if gpu else ("10M",)
    tokens = args.tokens if args.tokens is not None else (8192, 1024, 32768) if gpu else (1024,)
    dtypes = args.dtype if args.dtype is not None else ("bf16",) if gpu else ("fp32",)
    spent = args.step_seconds or (8.0 if gpu else 60.0) * (0.3 if args.quick else 1.0)
    rounds = (1, 30) if args.quick else (3, 30)
    late = lambda: args.max_seconds and monotonic() - start > args.max_seconds
    for dtype, count, name, estimator in itertools.product(dtypes, tokens, names, args.estimator):
        what = f"{name} {dtype} {count} tokens, {estimator}"
        if late():
            print(f"{what}: left out, the time limit was reached", file=sys.stderr)
            continue
        options = step.StepOptions(
            MODELS[name], device, dtype_of(dtype), count, estimator=estimator, seconds=spent, rounds=rounds
        )
        place = len(results["step"])

        def on_found(result: dict, place: int = place) -> None:
            results["step"][place:] = [result]
            save()

        try:
            step.run(options, on_found)
        except torch.OutOfMemoryError:
            print(f"{what}: left out, out of memory", file=sys.stderr)
            continue
        print(", ".join(step_row(results["step"][-1])), file=sys.stderr, flush=True)
    if "auto" not in args.estimator:
        return  # the hook is that of the observers of parameters
    if late():
        print("hook and import: left out, the time limit was reached", file=sys.stderr)
        return
    hook = host.hook_cost_alone(device, **({"rounds": 3, "processes": 1} if args.quick else {}))
    results["host"] = {"hook": hook, "import": host.import_time(rounds=1 if args.quick else 5)}


def _finish(results: dict, prefix: Path) -> int:
    """Draws the picture, says where everything is, and judges the gates."""
    from gac.bench import roofline

    red = [row for row in results["kernels"] if not row.get("gate", {"ok": True})["ok"]]
    written = [".json", ".md"]
    if any(row.get("gate", {}).get("ok") for row in results["kernels"]):
        roofline.draw(results, _with_suffix(prefix, ".png"))
        written.append(".png")
    print("written: " + ", ".join(str(_with_suffix(prefix, suffix)) for suffix in written))
    if red:
        from gac.bench.kernels import describe

        print(f"gac bench: wrong results from {', '.join(map(describe, red))}", file=sys.stderr)
    return 1 if red else 0

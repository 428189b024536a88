"""Post-trains a language model on verifiable problems: a short supervised warm start, then supervised and reinforcement
gradients mixed in every step, with the mix set from measured gradient statistics.

Writes config.json, metrics.jsonl, TensorBoard events, checkpoints, summary.json, the final model and a picture to
--out."""

import argparse
import time
from pathlib import Path
from typing import Any

from gac.cli._options import add_training_options, config_from
from gac.files import DamagedFile
from gac.runs.config import RESUME_MAY_CHANGE, TrainConfig, changed_flags, check
from gac.runs.errors import UsageError

HELP = "post-train a model on reasoning-gym problems"
EPILOG = """\
examples:
  gac train
  gac train --task chain_sum:num_terms=2,num_digits=1 --law fixed:0.5 --seed 1
  gac train --task gcd:max_value=50 spell_backward:max_word_len=5 --steps 500
  gac train --model Qwen/Qwen2.5-0.5B-Instruct --task chain_sum --steps 100 --device cuda
  gac train --model SmolLM2-135M-Instruct.gguf --lora 16 --warm-start-steps 10 --task chain_sum --steps 50
  gac train --prior 20,200,0.85,0.15 --law-option prior_weight=0.3
  gac train --out runs/first --resume"""


PICTURE = "run.png"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``gac train``."""
    add_training_options(parser)
    output = parser.add_argument_group("output")
    output.add_argument("--out", type=Path, metavar="DIR", help="run directory (default: runs/LAW-seedN-DATE)")
    output.add_argument(
        "--resume", action="store_true",
        help="continue the run in --out from its last checkpoint, with its options; only "
        + ", ".join(f"--{name.replace('_', '-')}" for name in RESUME_MAY_CHANGE) + " may differ",
    )  # fmt: skip
    output.add_argument(
        "--warm-start", type=Path, metavar="DIR",
        help="folder of the warm start: used if it holds one, else made there (default: warm_start in --out)",
    )  # fmt: skip
    output.add_argument("--warm-start-only", action="store_true", help="stop after the warm start")


def run(args: argparse.Namespace) -> int:
    """Runs ``gac train``."""
    started = time.perf_counter()
    config, out = resolve(args)
    from gac.runs.folder import CONFIG
    from gac.runs.room import stops_without_room

    folders = [folder for folder in (out, args.warm_start) if folder is not None]
    go_on = f"go on with: gac train --out {out} --resume"
    with stops_without_room(folders, lambda: go_on if (out / CONFIG).exists() else "start again"):
        return _run(args, config, out, go_on, started)


def _run(args: argparse.Namespace, config: TrainConfig, out: Path, go_on: str, started: float) -> int:
    from gac.runs import training
    from gac.runs.console import Reporter
    from gac.runs.folder import SUMMARY, forget_config, read_json, write_config

    reporter = Reporter()
    if args.resume and (out / SUMMARY).exists() and read_json(out / SUMMARY)["steps"] >= config.steps:
        reporter.say(f"{out} is finished")
        if not (out / PICTURE).exists():
            draw(config, out, read_json(out / SUMMARY))
        show(reporter, read_json(out / SUMMARY), out)
        return 0
    reporter.say(f"{', '.join(config.task)}  law {config.law}  seed {config.seed}  ->  {out}")
    setup = training.prepare(config)  # first: what does not load leaves nothing behind
    try:
        write_config(out, vars(config), ["gac", *args.argv], args.warm_start)
        warm = training.run_warm_start(setup, args.warm_start or out / training.WARM_START, reporter)
        reporter.say(f"held-out accuracy after the warm start: {warm:.3f}")
        if args.warm_start_only:
            return 0
        summary = training.run_hybrid(setup, out, warm, reporter, started=started)
        draw(config, out, summary)
    except KeyboardInterrupt:
        reporter.end()
        reporter.say(f"stopped; {go_on}")
        raise
    except (UsageError, DamagedFile):
        if not args.resume:
            forget_config(out)
        raise
    except Exception:
        reporter.end()
        raise
    show(reporter, summary, out)
    return 0


def draw(config: TrainConfig, out: Path, summary: dict[str, Any]) -> None:
    """The picture of a run, from its records."""
    from gac.plots import draw_run
    from gac.runs.folder import METRICS, read_metrics

    part = out / f"part.{PICTURE}"
    try:
        draw_run(read_metrics(out / METRICS), summary, part, title=f"{config.law}, seed {config.seed}")
        part.replace(out / PICTURE)
    finally:
        part.unlink(missing_ok=True)


def resolve(args: argparse.Namespace) -> tuple[TrainConfig, Path]:
    """The checked configuration and run directory that the options mean."""
    from gac.runs.folder import CONFIG, METRICS, read_json, require_writable

    if args.resume and args.out is None:
        raise UsageError("--resume needs --out, the directory of the run to continue")
    for option, folder in (("--out", args.out or Path("runs")), ("--warm-start", args.warm_start)):
        if folder is not None:
            require_writable(folder, option)
    if args.resume:
        if not (args.out / CONFIG).exists():
            raise UsageError(f"nothing to resume: {args.out} holds no {CONFIG}")
        stored = read_json(args.out / CONFIG)
        try:
            base, warm_start = TrainConfig.from_stored(stored["options"]), stored["warm_start"]
        except (TypeError, KeyError) as error:
            raise UsageError(
                f"{args.out / CONFIG} is not of a run that this gac knows ({error}); start anew"
            ) from error
        config = config_from(args, base).with_model_defaults()
        if flags := changed_flags(config, vars(base), may_change=RESUME_MAY_CHANGE):
            raise UsageError(f"--resume continues with the stored options, but {flags} differ; leave them out")
        if args.warm_start is None and warm_start:
            args.warm_start = Path(warm_start)
        check(config)
        return config, args.out
    config = config_from(args).with_model_defaults()
    check(config)
    out = (
        args.out or Path("runs") / f"{config.law.replace(':', '-')}-seed{config.seed}-{time.strftime('%Y%m%d-%H%M%S')}"
    )
    if (out / CONFIG).exists():
        raise UsageError(f"{out} already holds a run; add --resume to continue it, or choose another --out")
    if (out / METRICS).exists():
        raise UsageError(f"{out} holds what is left of a run, {METRICS} without {CONFIG}; choose another --out")
    return config, out


def _budget(share: float | None) -> str:
    return "" if share is None else f" of a budget of {100 * share:g}%"


def show(reporter: Any, summary: dict[str, Any], out: Path) -> None:
    """The table at the end of a run."""
    from gac.runs.console import duration, size

    reporter.table(
        "held-out accuracy and cost",
        ["", "value"],
        [
            ["accuracy after the warm start", f"{summary['warm_start_accuracy']:.3f}"],
            ["final accuracy", f"{summary['final_accuracy']:.3f}"],
            ["mean of the last four evaluations", f"{summary['last_four_accuracy']:.3f}"],
            ["final mu (mean over the run)", f"{summary['final_mu']:.3f} ({summary['mean_mu']:.3f})"],
            ["estimator", summary["estimator"]],
            ["time of a step", f"{1000 * summary['seconds_per_step']:.0f} ms"],
            ["share of it spent in GAC", f"{100 * summary['gac_share']:.2f}%{_budget(summary['gac_budget'])}"],
            ["peak memory", size(summary["peak_memory_bytes"])],
            ["total time", duration(summary["seconds"])],
        ],
    )
    reporter.say(f"metrics, checkpoints, model and run.png are in {out}")

"""Trains as 'gac train' does, with every estimator side by side and every law in the shadow of the one in charge, and
measures at regular steps what they estimate: noise and disagreement of the two gradients, from many independent steps
drawn at the same parameters. Prints bias, standard error and correlation of each estimator, the best mu, the mu that
each law chose and the mean squared error of the gradient that it mixes. Training goes exactly as without the audit.

Writes audit.json, audit.png and the raw numbers, audit.pt, beside the files of the run."""

import argparse
import dataclasses
import functools
import json
import math
import time
from pathlib import Path
from typing import Any

from gac.cli._options import add_training_options, config_from, positive
from gac.runs.config import TrainConfig, check
from gac.runs.errors import UsageError, usage_errors

HELP = "compare estimators and laws with a measured truth"
EPILOG = """\
examples:
  gac audit
  gac audit --seed 1 --json audit.json
  gac audit --steps 100 --every 10 --replicates 16
  gac audit --task gcd:max_value=50 --law gac:half_life=20
  gac audit --again runs/audit-seed0-20260101-120000"""

RAW = "audit.pt"
"""The raw numbers of a finished audit in its run directory."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``gac audit``."""
    add_training_options(parser)
    audit = parser.add_argument_group("audit")
    audit.add_argument(
        "--every", type=positive, default=16, metavar="N", help="steps between two measurements of the truth"
    )
    audit.add_argument(
        "--replicates", type=positive, default=24, metavar="N", help="independent steps drawn for each of them"
    )
    audit.add_argument("--json", type=Path, metavar="FILE", help="where the data goes (default: audit.json in --out)")
    audit.add_argument("--png", type=Path, metavar="FILE", help="where the picture goes (default: audit.png in --out)")
    audit.add_argument(
        "--again",
        type=Path,
        metavar="DIR",
        help="tables, data and picture of the finished audit in DIR; trains nothing",
    )
    output = parser.add_argument_group("output")
    output.add_argument("--out", type=Path, metavar="DIR", help="run directory (default: runs/audit-seedN-DATE)")
    output.add_argument(
        "--warm-start", type=Path, metavar="DIR",
        help="folder of the warm start: used if it holds one, else made there (default: warm_start in --out)",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Runs ``gac audit``."""
    started = time.perf_counter()
    from gac.runs import training
    from gac.runs.console import Reporter, duration

    if args.again is not None:
        if not (args.again / RAW).exists():
            raise UsageError(f"{args.again} holds no finished audit: {RAW} is missing")
        _conclude(args, args.again, Reporter())
        return 0
    config = config_from(args).with_model_defaults()
    law, options, alpha = _law(config)  # first: what an audit cannot follow is no reason to ask for --beta
    check(config)
    if config.steps <= args.every // 2:
        raise UsageError(f"--every {args.every} measures no truth in --steps {config.steps}; lower it")
    if args.replicates < 3:
        raise UsageError(f"--replicates {args.replicates} is too few: a spread and its error need at least 3")
    out = args.out or Path("runs") / f"audit-seed{config.seed}-{time.strftime('%Y%m%d-%H%M%S')}"
    from gac.runs.folder import CONFIG, versions, write_json

    if (out / CONFIG).exists():
        raise UsageError(f"{out} already holds a run; choose another --out")
    provenance = {"options": vars(config), "command": ["gac", *args.argv], "versions": versions()}
    write_json(out / CONFIG, {**provenance, "warm_start": args.warm_start and str(args.warm_start)})
    reporter = Reporter()
    reporter.say(f"{', '.join(config.task)}  law {config.law}  seed {config.seed}  ->  {out}")
    setup = training.prepare(config)
    warm = training.run_warm_start(setup, args.warm_start or out / training.WARM_START, reporter)

    import torch

    from gac.audit.record import Record
    from gac.audit.shadow import default_contenders
    from gac.audit.trainer import AuditTrainer

    record = Record(alpha)
    trainer_class = functools.partial(
        AuditTrainer,
        record=record,
        contenders=default_contenders(options if law == "gac" else {}),
        every=args.every,
        replicates=args.replicates,
        seed=config.seed,
    )
    summary = training.run_hybrid(setup, out, warm, reporter, started=started, trainer_class=trainer_class)
    about = {
        **provenance,
        "every": args.every,
        "replicates": args.replicates,
        "seconds": round(time.perf_counter() - started, 1),
        "accuracy": {"warm_start": warm, "final": summary["final_accuracy"]},
    }
    torch.save({"about": about, "record": dataclasses.asdict(record)}, out / RAW)
    _conclude(args, out, reporter)
    reporter.say(f"took {duration(time.perf_counter() - started)}")
    return 0


def _conclude(args: argparse.Namespace, out: Path, reporter: Any) -> None:
    """Figures, data and picture from the raw numbers."""
    import torch

    from gac.audit.figures import figures
    from gac.audit.picture import draw_audit
    from gac.audit.record import Record
    from gac.audit.report import show
    from gac.runs.folder import write_text

    raw = torch.load(out / RAW, weights_only=True)
    record, about = Record.restored(raw["record"]), raw["about"]
    law, options = TrainConfig(**about["options"]).law_and_options()
    found = figures(record, options if law == "gac" else {})
    json_path, png_path = args.json or out / "audit.json", args.png or out / "audit.png"
    write_text(json_path, compact_json({**about, "figures": found.as_json(), "record": record.as_json()}))
    draw_audit(record, png_path, title=f"law {law}, seed {about['options']['seed']}")
    show(found, reporter)
    reporter.say(f"data: {json_path}  picture: {png_path}")


def compact_json(value: Any, indent: str = "") -> str:
    """JSON with a line for each entry of a dictionary, and lists of numbers on one line; NaN becomes null."""
    if isinstance(value, dict) and value:
        inner = indent + " "
        lines = (f"{inner}{json.dumps(str(k))}: {compact_json(v, inner).lstrip()}" for k, v in value.items())
        return "{\n" + ",\n".join(lines) + "\n" + indent + "}" + ("\n" if not indent else "")
    if isinstance(value, (list, tuple)):
        plain = not any(isinstance(item, dict) for item in value)
        parts = [compact_json(item, indent).strip() for item in value]
        return "[" + (", " if plain else ",\n" + indent).join(parts) + "]"
    if isinstance(value, float) and not math.isfinite(value):
        return "null"
    return json.dumps(value)


def _law(config: TrainConfig) -> tuple[str, dict, float]:
    """Name, options and constant alpha of the law in charge."""
    from gac.laws.controller import Controller
    from gac.laws.rules import RuleLaw

    name, options = config.law_and_options()
    with usage_errors():
        law = Controller(name, **options).law
    if isinstance(law, RuleLaw):
        raise UsageError(f"--law {config.law} acts per prompt or token, not through one mu: there is none to audit")
    alpha = options.get("alpha", options.get("alpha_static", 0.5))
    if isinstance(alpha, str):
        raise UsageError(f"--law {config.law} moves its target; an audit needs a constant alpha")
    return law.name, options, float(alpha)

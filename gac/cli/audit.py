"""Trains as 'gac train' does, with every estimator side by side and every law in the shadow of the one in charge, and
measures at regular steps what they estimate: noise and disagreement of the two gradients, from many independent steps
drawn at the same parameters. Prints bias, standard error and correlation of each estimator, the best mu, the mu that
each law chose and the mean squared error of the gradient that it mixes. Training goes exactly as without the audit.

Writes audit.json, audit.png and the raw numbers, audit.pt, beside the files of the run."""

import argparse
import time
from pathlib import Path
from typing import Any

from gac.cli._options import add_training_options, config_from, positive
from gac.runs.config import check
from gac.runs.errors import UsageError

HELP = "compare estimators and laws with a measured truth"
EPILOG = """\
examples:
  gac audit
  gac audit --seed 1 --json audit.json
  gac audit --steps 100 --every 10 --replicates 16
  gac audit --task gcd:max_value=50 --law gac:half_life=20
  gac audit --again runs/audit-seed0-20260101-120000"""


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
    from gac.audit.run import RAW, audited_law, run_audit
    from gac.runs.console import Reporter, duration
    from gac.runs.folder import CONFIG, require_writable

    if args.again is not None:
        if not (args.again / RAW).exists():
            raise UsageError(f"{args.again} holds no finished audit: {RAW} is missing")
        _conclude(args, args.again, Reporter())
        return 0
    config = config_from(args).with_model_defaults()
    audited_law(config)  # first: what an audit cannot follow is no reason to ask for --beta
    check(config)
    if config.steps <= args.every // 2:
        raise UsageError(f"--every {args.every} measures no truth in --steps {config.steps}; lower it")
    if args.replicates < 3:
        raise UsageError(f"--replicates {args.replicates} is too few: a spread and its error need at least 3")
    out = args.out or Path("runs") / f"audit-seed{config.seed}-{time.strftime('%Y%m%d-%H%M%S')}"
    require_writable(out, "--out")
    if (out / CONFIG).exists():
        raise UsageError(f"{out} already holds a run; choose another --out")
    reporter = Reporter()
    reporter.say(f"{', '.join(config.task)}  law {config.law}  seed {config.seed}  ->  {out}")
    run_audit(
        config,
        out,
        reporter,
        every=args.every,
        replicates=args.replicates,
        warm_start=args.warm_start,
        command=["gac", *args.argv],
        started=started,
    )
    _conclude(args, out, reporter)
    reporter.say(f"took {duration(time.perf_counter() - started)}")
    return 0


def _conclude(args: argparse.Namespace, out: Path, reporter: Any) -> None:
    """Figures, data and picture from the raw numbers, where the options say."""
    from gac.audit.run import conclude

    data, picture = args.json or out / "audit.json", args.png or out / "audit.png"
    conclude(out, reporter, data=data, picture=picture)
    reporter.say(f"data: {data}  picture: {picture}")

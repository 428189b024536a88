"""Trains with several laws and seeds from the same starting models and draws the runs together.

Writes one run directory per law and seed, compare.json, compare.md and compare.png to --out. Finished runs are kept, so
the same command goes on where it stopped."""

import argparse
import dataclasses
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from gac.cli._options import add_training_options, config_from, natural, positive
from gac.runs.comparison import COLUMNS, check_stored, collect, result_line, run_directory, warm_start_directory
from gac.runs.config import TrainConfig, check
from gac.runs.errors import UsageError
from gac.runs.folder import require_writable

HELP = "train with several laws and seeds and draw them together"
EPILOG = """\
examples:
  gac compare --laws gac,fixed:0.1,fixed:0.5,fixed:0.9,chord --seeds 3
  gac compare --laws "gac gac:half_life=50,cap=0.05 chord:decay=300" --seeds 5 --jobs 2 --out runs/half-life
  gac compare --laws gac,fixed:0.5 --task gcd:max_value=50 --steps 500"""
DEFAULT_LAWS = "gac,fixed:0.1,fixed:0.5,fixed:0.9,chord"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``gac compare``."""
    own = parser.add_argument_group("comparison")
    own.add_argument(
        "--laws", default=DEFAULT_LAWS, metavar="LAW,LAW,...",
        help="laws as for 'gac train --law', separated by commas; by blanks where a law has several options",
    )  # fmt: skip
    own.add_argument("--seeds", type=positive, default=3, metavar="N", help="seeds 0 to N-1, or from --first-seed on")
    own.add_argument("--first-seed", type=natural, default=0, metavar="N", help="the first seed")
    own.add_argument(
        "--jobs", type=positive, default=min(2, _cores()), metavar="N",
        help="runs side by side; the cores are shared out among them",
    )  # fmt: skip
    own.add_argument("--out", type=Path, default=Path("runs/compare"), metavar="DIR", help="where everything goes")
    add_training_options(parser, leave_out=("law", "mu", "seed", "law_option", "prior", "threads"))


def run(args: argparse.Namespace) -> int:
    """Runs ``gac compare``."""
    from gac.runs.console import Reporter

    laws = split_laws(args.laws)
    require_writable(args.out, "--out")
    config = config_from(args).with_model_defaults()
    for law in laws:
        check(dataclasses.replace(config, law=law))
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    for law in laws:
        for seed in seeds:
            check_stored(run_directory(args.out, law, seed), dataclasses.replace(config, law=law, seed=seed))
    reporter = Reporter()
    reporter.say(f"{len(laws)} laws x {len(seeds)} seeds, {args.jobs} at a time  ->  {args.out}")
    failures = _run_all(args, config, laws, seeds, reporter)
    if failures:
        for text in failures:
            reporter.say(text)
        print("gac compare: some runs failed; the same command tries them again", file=sys.stderr)
        return 1
    rows = collect(args.out, config, laws, seeds, ["gac", *args.argv])
    reporter.table("held-out accuracy, mean over seeds", COLUMNS, rows)
    reporter.say(f"compare.json, compare.md and compare.png are in {args.out}")
    return 0


def split_laws(text: str) -> list[str]:
    """``"gac,fixed:0.1"`` -> both; a comma followed by ``key=value`` belongs to the law before it."""
    laws = [part for part in re.split(r"\s+|,(?!\s*\w+=)", text.strip()) if part]
    if not laws:
        raise UsageError("--laws is empty; name at least one law")
    repeated = sorted({law for law in laws if laws.count(law) > 1})
    if repeated:
        raise UsageError(f"--laws names {', '.join(repeated)} more than once")
    return laws


def _run_all(args: Any, config: TrainConfig, laws: Sequence[str], seeds: Sequence[int], reporter: Any) -> list[str]:
    """Starting models first, then all runs, `args.jobs` at a time; returns what failed."""
    from gac.runs.folder import CONFIG, SUMMARY

    lock, begun = threading.Lock(), time.monotonic()
    total = len(laws) * len(seeds)
    failures: list[str] = []
    done = 0

    def work(law: str | None, seed: int) -> None:
        nonlocal done
        warm = warm_start_directory(args.out, seed)
        out = run_directory(args.out, law, seed) if law else warm.with_name(f"{warm.name}-run")
        if (out / SUMMARY).exists() if law else (warm / "result.json").exists():
            code = 0
        else:
            options = [
                "--out",
                out,
                "--warm-start",
                warm,
                *_options(config, law, seed),
                "--threads",
                _threads(args.jobs),
            ]
            if (out / CONFIG).exists():
                options = ["--out", out, "--warm-start", warm, "--resume"]
            code = _train([*options, *([] if law else ["--warm-start-only"])], out / "log.txt", _threads(args.jobs))
        with lock:
            name = f"{law or 'warm start'}, seed {seed}"
            if code:
                failures.append(f"{name} failed with exit code {code}; see {out / 'log.txt'}")
                return
            if law:
                done += 1
                reporter.advance(done)
                reporter.say(f"{name}: {result_line(out)}   ({time.monotonic() - begun:.0f} s)")

    reporter.begin("runs", total)
    try:
        with ThreadPoolExecutor(args.jobs) as pool:
            list(pool.map(lambda seed: work(None, seed), seeds))
            if not failures:
                list(pool.map(lambda job: work(*job), [(law, seed) for seed in seeds for law in laws]))
    finally:
        reporter.end()
    return failures


def _options(config: TrainConfig, law: str | None, seed: int) -> list[Any]:
    """The command-line form of a configuration."""
    options: list[Any] = ["--seed", seed, *(["--law", law] if law else [])]
    skipped = ("law", "mu", "seed", "law_option", "prior", "threads")
    for name, value in vars(config).items():
        if name in skipped or value is None:
            continue
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            options.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            options += [f"--{flag}", *(value if isinstance(value, list) else [value])]
    return options


def _train(options: Sequence[Any], log: Path, threads: int) -> int:
    """Runs ``gac train`` in a process of its own and returns its exit code."""
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "gac.cli", "train", *map(str, options)]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    with log.open("a", encoding="utf-8") as file:
        return subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environment, check=False).returncode


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _threads(jobs: int) -> int:
    return max(1, _cores() // jobs)

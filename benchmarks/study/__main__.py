"""Runs the study, says how far it is, repeats one of its runs, and writes its report."""

import argparse
import importlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.study import UsageError
from benchmarks.study.records import read_records

_EPILOG = """\
examples:
  python -m benchmarks.study run                        every run that is missing, two at a time
  python -m benchmarks.study run --phase tuning --minutes 30
  python -m benchmarks.study status
  python -m benchmarks.study row KEY                    repeats a run and compares every number
  python -m benchmarks.study report                     docs/study.md and its pictures from the data
  python -m benchmarks.study run --phase regimes --regimes wrong-50 few --arms gac aim-reward fixed:mu=0.1 --seeds 1
  python -m benchmarks.study regret                     of every arm in every regime"""

TIMINGS = frozenset({"seconds", "seconds_per_step", "gac_share"})
"""What differs between two runs of a row."""
_SHOWN = 20
"""Differences that ``row`` prints."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code: 0, 1 for failed rows or differences, 2 for a mistake of the user."""
    args = _parser().parse_args(argv)
    try:
        return args.command(args)
    except UsageError as error:
        print(f"{args.prog}: error: {error}", file=sys.stderr)
        return 2


class _Help(argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of the examples; appends defaults to the options that have one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        shown = action.option_strings and action.default not in (None, "", argparse.SUPPRESS)
        return f"{action.help} (default: %(default)s)" if shown else action.help


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.study",
        description=__doc__,
        epilog=_EPILOG,
        formatter_class=_Help,
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(name: str, function: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        found = commands.add_parser(name, help=text, formatter_class=_Help)
        found.set_defaults(command=function, prog=found.prog)
        found.add_argument(
            "--results", type=Path, default=Path("benchmarks/results/study"), metavar="DIR", help="the data"
        )
        return found

    def add_cache(found: argparse.ArgumentParser) -> None:
        found.add_argument(
            "--cache", type=Path, default=Path("runs/study"), metavar="DIR", help="warm starts and logs of runs"
        )

    run = command("run", _run, "do the runs that are missing; the same command goes on after an interruption")
    add_cache(run)
    run.add_argument("--phase", nargs="+", metavar="NAME", help="only these phases (default: all but the regimes)")
    run.add_argument("--jobs", type=_positive, default=2, metavar="N", help="runs side by side, one thread each")
    run.add_argument("--limit", type=_positive, metavar="N", help="at most N runs")
    run.add_argument("--minutes", type=float, metavar="M", help="start no run after M minutes")
    run.add_argument("--only", nargs="+", default=[], metavar="TEXT", help="only rows whose key holds each TEXT")
    run.add_argument("--arms", nargs="+", metavar="ARM", help="only these, such as gac aim-reward fixed:mu=0.5")
    run.add_argument("--regimes", nargs="+", metavar="NAME", help="only these")
    run.add_argument("--seeds", nargs="+", type=int, metavar="SEED", help="only these")
    status = command("status", _status, "rows done and left, time left")
    status.add_argument("--jobs", type=_positive, default=2, metavar="N", help="runs side by side, for the time left")
    row = command("row", _row, "repeat one run and compare it with its record, number by number")
    add_cache(row)
    row.add_argument("key", metavar="KEY", help="the key of a record")
    report = command("report", _report, "write the report from the data")
    report.add_argument("--out", type=Path, default=Path("docs/study.md"), metavar="FILE", help="the page")
    report.add_argument("--readme", type=Path, default=Path("README.md"), metavar="FILE", help="for its table")
    regret = command("regret", _regret, "what each arm loses to the best constant in hindsight, by regime")
    regret.add_argument("--phase", default="regimes", metavar="NAME", help="regimes or regimes-confirmation")
    regret.add_argument("--arms", nargs="+", metavar="ARM", help="only these, such as gac aim-reward fixed:mu=0.5")
    regret.add_argument("--regimes", nargs="+", metavar="NAME", help="only these")
    regret.add_argument("--picture", type=Path, metavar="FILE", help="draw it, too")
    return parser


def _run(args: argparse.Namespace) -> int:
    from benchmarks.study.pool import ServerError, Stopped
    from benchmarks.study.progress import Progress

    grid = _part("grid")
    deadline = None if args.minutes is None else time.monotonic() + 60 * args.minutes
    progress, failures, waits = Progress(), [], []
    tried: set[str] = set()
    _check_choices(args)
    try:
        for phase in _chosen_phases(grid, args.phase):
            try:
                failures += _run_phase(phase, args, progress, deadline, tried)
            except grid.NotReady as error:
                waits.append(f"{phase} waits: {error}")
    except Stopped as stop:
        print(f"{args.prog}: {stop}; the same command goes on", file=sys.stderr)
        return 128 + stop.signum
    except ServerError as error:
        print(f"{args.prog}: {error}", file=sys.stderr)
        return 1
    for line in waits:
        progress.say(line)
    if failures:
        print(f"{args.prog}: {len(failures)} rows failed; the same command tries them again", file=sys.stderr)
        for failure in failures:
            print(f"  {failure.key}: {failure.reason}  (log: {failure.log})", file=sys.stderr)
    return 1 if failures or (waits and args.phase) else 0


def _run_phase(phase: str, args: argparse.Namespace, progress: Any, deadline: float | None, tried: set[str]) -> list:
    """Runs what a phase misses and nobody `tried` yet, until its finished rows bring no new ones; returns failures."""
    from benchmarks.study.pool import run_rows

    grid, training, failures = _part("grid"), _part("training"), []
    while True:
        records = read_records(args.results)
        done = {record["key"] for record in records}
        rows = [row for row in grid.rows(phase, records) if _wanted(row, args)]
        missing = [row.key for row in rows if row.key not in done | tried]
        if args.limit is not None:
            missing = missing[: args.limit - len(tried)]
        if not missing:
            return failures
        tried.update(missing)
        chosen = done.union(missing)
        failures += run_rows(
            [row for row in rows if row.key in chosen],
            train=training.train_row,
            folder=args.results,
            cache=args.cache,
            jobs=args.jobs,
            report=progress,
            warm_start_id=training.warm_start_id,
            preload=training.PRELOAD,
            deadline=deadline,
        )


def _check_choices(args: argparse.Namespace) -> None:
    """Raises UsageError for an arm or regime that no chosen phase has, as far as they are known."""
    grid, arm = _part("grid"), _part("arms").arm
    if args.arms is None and args.regimes is None:
        return
    records, rows = read_records(args.results), []
    for phase in _chosen_phases(grid, args.phase):
        try:
            rows += grid.rows(phase, records)
        except grid.NotReady:
            return
    for option, wanted, known in (
        ("--arms", args.arms, {arm(row.fields) for row in rows}),
        ("--regimes", args.regimes, {row.regime for row in rows}),
    ):
        if unknown := sorted(set(wanted or ()) - known):
            raise UsageError(f"{option} {' '.join(unknown)}: no such rows; choose from {', '.join(sorted(known))}")


def _wanted(row: Any, args: argparse.Namespace) -> bool:
    arm = _part("arms").arm
    return (
        all(text in row.key for text in args.only)
        and (args.arms is None or arm(row.fields) in args.arms)
        and (args.regimes is None or row.regime in args.regimes)
        and (args.seeds is None or row.seed in args.seeds)
    )


def _status(args: argparse.Namespace) -> int:
    from benchmarks.study.progress import duration, seconds_by_size, time_left

    grid = _part("grid")
    records = read_records(args.results)
    have, known = {record["key"] for record in records}, set()
    seconds, sizes, lines, waits = seconds_by_size(records), [], [], 0
    for phase in (*grid.PHASES, *grid.ON_DEMAND):
        try:
            rows = grid.rows(phase, records)
        except grid.NotReady as error:
            lines.append(f"{phase}: waits: {error}")
            waits += 1
            continue
        missing = [row for row in rows if row.key not in have]
        known.update(row.key for row in rows)
        sizes += [row.size for row in missing]
        left = time_left([row.size for row in missing], [], seconds, args.jobs)
        rest = f", {len(missing)} left, {duration(left)}" if missing else ""
        lines.append(f"{phase}: {len(rows) - len(missing)} of {len(rows)} done{rest}")
    print("\n".join(lines))
    left = duration(time_left(sizes, [], seconds, args.jobs) if sizes else 0)
    print(f"time left, {args.jobs} at a time: {left}" + (f", and {waits} phases that wait" if waits else ""))
    if stray := len(have - known):
        print(f"{stray} records belong to no row of the phases that are ready")
    return 0


def _row(args: argparse.Namespace) -> int:
    from benchmarks.study.pool import Stopped, run_rows
    from benchmarks.study.progress import Progress

    grid, training = _part("grid"), _part("training")
    records = {record["key"]: record for record in read_records(args.results)}
    if args.key not in records:
        raise UsageError(f"KEY {args.key}: no record of it in {args.results}; see the field 'key' of its lines")
    with tempfile.TemporaryDirectory() as folder:
        try:
            failures = run_rows(
                [grid.Row.from_record(records[args.key])],
                train=training.train_row,
                folder=Path(folder),
                cache=args.cache,
                jobs=1,
                report=Progress(),
                preload=training.PRELOAD,
            )
        except Stopped as stop:
            print(f"{args.prog}: {stop}", file=sys.stderr)
            return 128 + stop.signum
        if failures:
            return 1
        (again,) = read_records(Path(folder))
    return _compare(records[args.key], again)


def _compare(old: dict[str, Any], new: dict[str, Any]) -> int:
    """Prints what differs between two records of a row; 1 if anything but timings and versions does."""
    for line in differences(old.get("versions"), new.get("versions"), "versions"):
        print(f"other version: {line}")
    left_out = TIMINGS | {"versions"}
    strip = lambda record: {name: value for name, value in record.items() if name not in left_out}
    lines = list(differences(strip(old), strip(new)))
    for line in lines[:_SHOWN]:
        print(f"differs: {line}")
    if len(lines) > _SHOWN:
        print(f"... and {len(lines) - _SHOWN} more")
    print(f"differing values: {len(lines)}" if lines else "identical to the record, timings aside")
    return 1 if lines else 0


def differences(old: Any, new: Any, name: str = "") -> Iterator[str]:
    """One line for each value that differs: ``accuracy[2][1]: 0.5 -> 0.25``."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in dict.fromkeys([*old, *new]):
            path = f"{name}.{key}" if name else key
            if key in old and key in new:
                yield from differences(old[key], new[key], path)
            else:
                yield f"{path}: only in the {'old' if key in old else 'new'} one"
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for index, pair in enumerate(zip(old, new, strict=True)):
            yield from differences(*pair, f"{name}[{index}]")
    elif old != new:
        yield f"{name}: {old} -> {new}"


def _report(args: argparse.Namespace) -> int:
    try:
        _part("report").main(args.results, out=args.out, readme=args.readme)
    except ValueError as error:
        raise UsageError(str(error)) from None
    return 0


def _regret(args: argparse.Namespace) -> int:
    regret, arm = _part("regret"), _part("arms").arm
    if args.phase not in regret.SAME:
        raise UsageError(f"--phase {args.phase}: choose from {', '.join(regret.SAME)}")
    records = _part("robustness").runs(read_records(args.results), args.phase)
    for option, names, of in (
        ("--arms", args.arms, arm),
        ("--regimes", args.regimes, lambda record: record.get("regime", "clean")),
    ):
        if unknown := set(names or ()) - set(map(of, records)):
            raise UsageError(f"{option} {' '.join(sorted(unknown))}: the data have no such run")
        records = [record for record in records if names is None or of(record) in names]
    try:
        print(regret.text(records))
        if args.picture:
            regret.picture(records, args.picture)
    except ValueError as error:
        raise UsageError(str(error)) from None
    return 0


def _part(name: str) -> Any:
    """A module of the study; each command loads only what it needs."""
    return importlib.import_module(f"benchmarks.study.{name}")


def _chosen_phases(grid: Any, names: Sequence[str] | None) -> Sequence[str]:
    every = (*grid.PHASES, *grid.ON_DEMAND)
    unknown = [name for name in names or () if name not in every]
    if unknown:
        raise UsageError(f"--phase {' '.join(unknown)}: choose from {', '.join(every)}")
    return grid.PHASES if names is None else [phase for phase in every if phase in names]


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return value


if __name__ == "__main__":
    sys.exit(main())

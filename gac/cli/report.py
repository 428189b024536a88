"""Prints what the gradients of a run say: signal-to-noise ratio and noise scale of both branches and their cosine, for
the whole model and module by module. docs/report.md explains the numbers."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from gac.cli._options import positive
from gac.runs.errors import UsageError

_BESIDE = Path()
"""Stands for the page's own name in the run directory."""

HELP = "what a run's gradients say, module by module"
USAGE = "gac report RUN [options]"
EPILOG = """\
examples:
  gac report runs/default
  gac report runs/default --last 10 --plot modules.png
  gac report runs/default --json > report.json
  gac report runs/default --html              one page, in the run directory"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``gac report``."""
    parser.add_argument("directory", type=Path, metavar="RUN", help="run directory, or a history file from one")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw a heat map of modules over steps (PNG, PDF, SVG)"
    )
    parser.add_argument(
        "--html", nargs="?", const=_BESIDE, type=Path, metavar="FILE",
        help="write one page with pictures, maps, tables and advice, that needs nothing beside itself (default: "
        "report.html in RUN)",
    )  # fmt: skip
    parser.add_argument(
        "--last", type=positive, metavar="K", help="use the last K steps measured by module (default: all of them)"
    )


def run(args: argparse.Namespace) -> int:
    """Runs ``gac report``."""
    from gac.report import Report

    report, missing = None, ""
    try:
        report = Report.from_run(args.directory, last=args.last, **_sizes(args.directory), mix=_mix(args.directory))
    except (FileNotFoundError, ValueError) as error:
        missing = str(error)
        if args.html is None or args.json or args.plot or not args.directory.is_dir():
            raise UsageError(missing) from error
    if report is not None:
        _tell(report, args)
    if args.html is not None:
        _write_page(report, missing, args)
    return 0


def _tell(report: Any, args: argparse.Namespace) -> None:
    """The report as text, JSON, a picture."""
    if args.json:
        print(json.dumps(report.as_json(), indent=2, allow_nan=False))
    else:
        _show(report)
    if args.plot:
        args.plot.parent.mkdir(parents=True, exist_ok=True)
        try:
            report.plot(args.plot, title=str(args.directory))
        except ImportError as error:
            raise UsageError(f"--plot needs matplotlib, which cannot be imported: {error}") from error
        except ValueError as error:  # an unknown suffix, or nothing that could be drawn
            raise UsageError(f"--plot {args.plot}: {error}") from error
        print(f"heat map: {args.plot}", file=sys.stderr if args.json else sys.stdout)


def _write_page(report: Any, missing: str, args: argparse.Namespace) -> None:
    """The page; a run that was not measured by module has one without maps and advice."""
    from gac.runs.page import PAGE, write_page

    folder = args.directory if args.directory.is_dir() else args.directory.parent
    path = folder / PAGE if args.html == _BESIDE else args.html
    try:
        write_page(args.directory, report, path, missing=missing)
    except ImportError as error:
        raise UsageError(f"--html needs matplotlib, which cannot be imported: {error}") from error
    except OSError as error:
        raise UsageError(f"--html {path} cannot be written: {error.strerror or error}") from error
    print(f"page: {path}", file=sys.stderr if args.json else sys.stdout)


def _sizes(directory: Path) -> dict[str, Any]:
    """Sequences in a contribution, where ``gac train`` has left them."""
    from gac.runs.folder import CONFIG, read_json

    try:
        options = read_json(directory / CONFIG)["options"]
        sizes = {"sft": float(options["sft_batch_size"]), "rl": float(options["batch_size"])}
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return {"sizes": sizes, "unit": "sequences"}


def _mix(directory: Path) -> Any:
    """Where the law stood at the end, where the run's metrics tell it."""
    from gac.report import Mix
    from gac.runs.folder import METRICS, read_metrics

    try:
        records = read_metrics(directory / METRICS)
    except (OSError, ValueError):
        return None
    return Mix.of(records[-1], "gac/") if records else None


def _show(report: Any) -> None:
    """Tables of rich on a terminal, plain text elsewhere."""
    if sys.stdout.isatty():
        try:
            from rich.console import Console
        except ImportError:
            pass
        else:
            Console(highlight=False).print(report)
            return
    print(report)

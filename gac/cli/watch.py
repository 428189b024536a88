"""Shows a run in the terminal while it goes on: mu with its band, reward, gradient statistics, and what measuring costs
beside its budget. Ends with the run, or with Ctrl-C.

Follows metrics.jsonl of gac train, or the checkpoints that a trainer leaves in its output_dir. Where the output is no
terminal one look is printed."""

import argparse
import time
from pathlib import Path
from typing import Any

from gac.cli._options import positive_float
from gac.runs.errors import UsageError

HELP = "a run in the terminal, while it goes on"
USAGE = "gac watch RUN [options]"
EPILOG = """\
examples:
  gac watch runs/default
  gac watch runs/default --once | tee now.txt"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``gac watch``."""
    parser.add_argument("directory", type=Path, metavar="RUN", help="run directory, or a trainer's output_dir")
    parser.add_argument("--once", action="store_true", help="print one look and end")
    parser.add_argument(
        "--every", type=positive_float, default=1.0, metavar="SECONDS", help="time between two looks at the folder"
    )


def run(args: argparse.Namespace) -> int:
    """Runs ``gac watch``."""
    from gac.runs.watching import WatchedRun

    watched = WatchedRun(args.directory)
    try:
        from rich.console import Console
    except ImportError as error:
        raise UsageError(
            f"gac watch needs rich, which cannot be imported: {error}; install 'gac-kernels[train]'"
        ) from error

    console = Console(highlight=False)
    if args.once or not console.is_terminal:
        console.print(_look(watched, console))
        return 0
    _follow(watched, console, args.every)
    return 0


def _follow(watched: Any, console: Any, every: float) -> None:
    """Draws again whenever something has come, and once a second for the clock."""
    from rich.live import Live

    with Live(_look(watched, console), console=console, auto_refresh=False) as live:
        try:
            while not watched.finished:
                time.sleep(every)
                watched.poll()
                live.update(_look(watched, console), refresh=True)
        except KeyboardInterrupt:  # how one leaves: the last look stays
            pass


def _look(watched: Any, console: Any) -> Any:
    from gac.runs.frame import frame

    plain = not console.encoding.lower().startswith("utf")
    return frame(watched, width=console.width, height=console.height, now=time.time(), plain=plain)

"""The command ``gac``. Every module of this package without a leading underscore is a sub-command.

Such a module is cheap to import and defines ``HELP`` (one line), ``add_arguments(parser)`` and ``run(args) -> int``;
``EPILOG`` (examples) and ``USAGE`` are optional. It may raise `UsageError` for what the user got wrong.
"""

import argparse
import importlib
import pkgutil
import sys
from collections.abc import Sequence

from gac.files import DamagedFile
from gac.runs.errors import StoppedError, UsageError

_DESCRIPTION = """\
Sets the SFT/RL mix of a training step from measured gradient statistics.

Post-train a small model on verifiable problems, compare rules for the mix, and see what a bug report needs."""

_EPILOG = """\
examples:
  gac train                                   a small model that learns to spell backwards, minutes on a CPU
  gac train --task gcd:max_value=50 --law chord --out runs/gcd
  gac train --out runs/gcd --resume           go on after an interruption
  gac watch runs/gcd                          a run in the terminal, while it goes on
  gac report runs/gcd                         what its gradients say, module by module; --html: as a page
  gac compare --laws gac,fixed:0.5,chord --seeds 3
  gac audit                                   estimators and laws against a measured truth
  gac plan --params 70e9 --ranks 1024         overhead, memory and traffic of a run, before it is started
  gac env                                     versions and devices, for a bug report

'gac COMMAND --help' lists a command's options."""


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of descriptions and examples; appends defaults to the options that have one."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=32)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = action.help or ""
        shown = action.default not in (None, False, argparse.SUPPRESS) and "default" not in text
        return f"{text} (default: %(default)s)" if shown and action.option_strings else text


def command_names() -> list[str]:
    """Names of all sub-commands."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))


def build_parser(only: str | None = None) -> argparse.ArgumentParser:
    """The parser of ``gac``; `only` names the one sub-command whose module is loaded, to start quickly."""
    from gac import __version__

    parser = argparse.ArgumentParser(
        prog="gac", description=_DESCRIPTION, epilog=_EPILOG, formatter_class=HelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"gac {__version__}")
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND")
    for name in command_names():
        if only in (None, name):
            module = importlib.import_module(f"{__name__}.{name}")
            command = commands.add_parser(
                name,
                usage=getattr(module, "USAGE", f"gac {name} [options]"),
                help=module.HELP,
                description=module.__doc__,
                epilog=getattr(module, "EPILOG", None),
                formatter_class=HelpFormatter,
            )
            module.add_arguments(command)
            command.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs ``gac`` with `argv` (default: the process's arguments) and returns its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    first = next((word for word in argv if not word.startswith("-")), None)
    parser = build_parser(first if first in command_names() else None)
    try:
        args = parser.parse_args(argv)
    except SystemExit as end:  # argparse has printed its message
        return int(end.code or 0)
    if args.command is None:
        parser.print_help()
        return 0
    args.argv = argv
    try:
        return args.run(args)
    except (UsageError, DamagedFile) as error:
        print(f"gac {args.command}: error: {error}", file=sys.stderr)
        return 2
    except StoppedError as error:
        print(f"gac {args.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"gac {args.command}: interrupted", file=sys.stderr)
        return 130

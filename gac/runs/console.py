"""What a run shows: a progress bar on a terminal, plain lines elsewhere, tables at the end."""

import sys
from collections.abc import Sequence
from typing import Any


class Reporter:
    """Progress of the phases of a run.

    On a terminal a bar per phase with the newest numbers and the time left; elsewhere one line whenever `advance` is
    called with ``milestone=True``.
    """

    def __init__(self) -> None:
        from rich.console import Console

        self.console = Console(highlight=False)
        self._bar: Any = None
        self._task: Any = None
        self._phase = ""
        self._total = 0

    def say(self, text: str) -> None:
        """One line of text, above the bar if there is one."""
        self.console.print(text, markup=False, soft_wrap=True)

    def begin(self, phase: str, total: int, done: int = 0) -> None:
        """Starts a phase of `total` steps of which `done` are done."""
        self.end()
        self._phase, self._total = phase, total
        if not self.console.is_terminal:
            return
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(compact=True),
            TextColumn("left"),
            console=self.console,
        )
        self._bar.start()
        self._task = self._bar.add_task(phase, total=total, completed=done, numbers="")

    def advance(self, step: int, *, milestone: bool = False, **numbers: float | None) -> None:
        """`step` steps are done; `numbers` are shown by name."""
        text = "  ".join(f"{name} {value:.3f}" for name, value in numbers.items() if value is not None)
        if self._bar is not None:
            self._bar.update(self._task, completed=step, numbers=text)
        elif milestone:
            self.say(f"{self._phase} {step}/{self._total}  {text}")

    def end(self) -> None:
        """Ends the phase."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = self._task = None

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """A table whose first column is text and whose other columns are numbers."""
        from rich.box import SIMPLE_HEAD
        from rich.table import Table

        table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
        for index, column in enumerate(columns):
            table.add_column(column, justify="left" if index == 0 else "right", no_wrap=index == 0)
        for row in rows:
            table.add_row(*row)
        self.console.print(table)


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The same table as Markdown."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "|".join(["---", *["---:"] * (len(columns) - 1)]) + "|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows]) + "\n"


def duration(seconds: float) -> str:
    """``75`` -> ``1 min 15 s``."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def size(count: float | None) -> str:
    """Bytes in MiB or GiB."""
    if count is None:
        return "unknown"
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def flush() -> None:
    """Empties the output streams before another process writes to them."""
    sys.stdout.flush()
    sys.stderr.flush()

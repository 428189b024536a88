"""What a running study shows: a bar with the running rows on a terminal, one line a finished row elsewhere."""

import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def duration(seconds: float | None) -> str:
    """``75`` -> ``1 min 15 s``, ``7500`` -> ``2 h 05 min``, None -> ``unknown``."""
    if seconds is None:
        return "unknown"
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def seconds_by_size(records: Iterable[Mapping[str, Any]]) -> dict[str, list[float]]:
    """Seconds of finished rows, by model size."""
    found: dict[str, list[float]] = {}
    for record in records:
        if record.get("seconds") is not None:
            found.setdefault(record.get("size", ""), []).append(record["seconds"])
    return found


def time_left(
    waiting: Iterable[str], running: Sequence[tuple[str, float]], seconds: Mapping[str, Sequence[float]], jobs: int
) -> float | None:
    """Estimated seconds until all rows are done.

    Args:
        waiting: model sizes of the rows to come.
        running: sizes of the running rows and the seconds each has run.
        seconds: seconds of finished rows, by size. A size without any takes the median of all.
        jobs: rows side by side.

    Returns:
        None while no row has ever finished.
    """
    everything = [value for values in seconds.values() for value in values]
    if not everything:
        return None
    medians = {size: statistics.median(values) for size, values in seconds.items() if values}
    expected = lambda size: medians.get(size) or statistics.median(everything)
    rests = [max(expected(size) - elapsed, 0.0) for size, elapsed in running]
    shared = (sum(expected(size) for size in waiting) + sum(rests)) / jobs
    return max([shared, *rests])


class Progress:
    """Progress of the phases of a study; `console` is a rich console (default: standard output)."""

    def __init__(self, console: Any = None):
        from rich.console import Console

        self.console = console or Console(highlight=False)
        self._begun = time.monotonic()
        self._live: Any = None
        self._phase, self._total, self._done = "", 0, 0

    def say(self, text: str) -> None:
        """One line of text, above the bar if there is one."""
        self.console.print(text, markup=False, soft_wrap=True)

    def begin(self, phase: str, total: int, done: int) -> None:
        """Starts a phase of `total` rows of which `done` are done."""
        self.end()
        self._phase, self._total, self._done = phase, total, done
        if self.console.is_terminal:
            from rich.live import Live

            self._live = Live(console=self.console, auto_refresh=False)
            self._live.start()

    def update(self, running: Sequence[tuple[str, float]], left: float | None) -> None:
        """Keys of the running rows with the seconds each has run; estimated seconds left."""
        if self._live is None:
            return
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        line = Table.grid(padding=(0, 1))
        elapsed = duration(time.monotonic() - self._begun)
        line.add_row(
            self._phase,
            ProgressBar(total=max(self._total, 1), completed=self._done, width=24),
            f"{self._done}/{self._total}",
            f"{duration(left)} left, {elapsed} so far",
        )
        rows = [Text(f"  {key}  {duration(spent)}", no_wrap=True, overflow="ellipsis") for key, spent in running]
        self._live.update(Group(line, *rows), refresh=True)

    def finished(self, record: Mapping[str, Any], seconds: float, left: float | None) -> None:
        """A row is done after `seconds`."""
        self._done += 1
        if self._live is None:
            self.say(
                f"{self._done}/{self._total}  {record['key']}  {_accuracy(record)}{duration(seconds)}"
                f"  ({duration(left)} left)"
            )

    def failed(self, key: str, reason: str, log: Any) -> None:
        """A row has failed."""
        self.say(f"FAILED  {key}: {reason}  (log: {log})")

    def end(self) -> None:
        """Ends the phase."""
        if self._live is not None:
            self._live.stop()
            self._live = None


def _accuracy(record: Mapping[str, Any]) -> str:
    curve = record.get("accuracy")
    return f"{curve[0][1]:.3f} -> {curve[-1][1]:.3f}  " if curve else ""

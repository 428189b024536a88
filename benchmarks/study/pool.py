"""Runs rows side by side, each in a process of its own, and writes what they return.

A run starts in a process forked from a server that has imported everything heavy, and computes on one thread: its
numbers depend neither on the runs before it nor on the one beside it. Only this process writes records.
"""

import contextlib
import ctypes
import dataclasses
import gc
import math
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing import connection, forkserver, resource_tracker
from pathlib import Path
from typing import Any

from benchmarks.study import UsageError
from benchmarks.study.progress import Progress, seconds_by_size, time_left
from benchmarks.study.records import append, finite, read_records

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "CUDA_VISIBLE_DEVICES": "",
    "PYTHONHASHSEED": "0",
}
"""Of the processes that train: one thread each, no GPU, and the same order of sets in every process."""

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
"""Numbers that glibc's mallopt takes."""
_REFRESH = 0.5
"""Seconds between two looks at the clock and at signals."""


@dataclasses.dataclass(frozen=True)
class Failure:
    """A row that failed: its key, one line on why, and its log."""

    key: str
    reason: str
    log: Path


class Stopped(Exception):
    """A signal ended the runs; what was finished is on the disk."""

    def __init__(self, signum: int):
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.signum = signum


class ServerError(Exception):
    """No run can start."""


@dataclasses.dataclass
class _Run:
    row: Any
    warm_start: str | None
    process: Any
    connection: Any
    log: Path
    begun: float

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.begun


def run_rows(
    rows: Sequence[Any],
    *,
    train: Callable[[Any, Path], dict[str, Any]],
    folder: Path,
    cache: Path,
    jobs: int = 2,
    report: Progress,
    warm_start_id: Callable[[Any], str] | None = None,
    preload: Iterable[str] = (),
    deadline: float | None = None,
) -> list[Failure]:
    """Runs the rows that `folder` has no record of, `jobs` at a time; returns what failed, in that order.

    Args:
        rows: objects with ``key``, ``phase`` and ``size``; they travel to another process, as `train` does.
        train: ``train(row, cache)`` returns the record of a run. Its output goes to ``cache/logs``.
        folder: holds PHASE.jsonl; nobody else may write there meanwhile.
        warm_start_id: names what rows share and the first of them builds: the others wait for its end.
        preload: modules that runs find imported.
        deadline: `time.monotonic` after which no run starts.

    Raises:
        ServerError: the modules of `preload` cannot be imported.
        Stopped: after SIGINT, SIGTERM or SIGHUP; running rows are killed.
    """
    if jobs < 1:
        raise UsageError(f"--jobs is {jobs}; it must be at least 1")
    records = read_records(folder)
    have = {record["key"] for record in records}
    waiting = [row for row in rows if row.key not in have]
    if not waiting:
        return []
    seconds = seconds_by_size(records)
    context = multiprocessing.get_context("forkserver")
    # the server stays for later calls, so their modules must be the same; it skips what cannot be imported
    context.set_forkserver_preload([*preload, "benchmarks.study.pool", train.__module__])
    running: list[_Run] = []
    built: set[str] = set()
    failures: list[Failure] = []

    def left() -> float | None:
        return time_left([row.size for row in waiting], [(run.row.size, run.elapsed) for run in running], seconds, jobs)

    with _alone(folder), _signals() as caught:
        report.begin(waiting[0].phase, len(rows), len(rows) - len(waiting))
        report.update([], left())
        try:
            while (waiting or running) and not caught:
                while len(running) < jobs and not caught and (deadline is None or time.monotonic() < deadline):
                    row = _next(waiting, {run.warm_start for run in running} - built, warm_start_id)
                    if row is None:
                        break
                    waiting.remove(row)
                    try:
                        running.append(_start(context, row, train, cache, warm_start_id))
                    except ServerError:
                        if not caught:  # else the signal has ended the server too
                            raise
                if not running:
                    break
                report.update([(run.row.key, run.elapsed) for run in running], left())
                ready = connection.wait([run.connection for run in running], timeout=_REFRESH)
                for run in [run for run in running if run.connection in ready and not caught]:
                    running.remove(run)
                    record, reason = _collect(run)
                    if record is None:
                        failures.append(Failure(run.row.key, reason, run.log))
                        report.failed(run.row.key, reason, run.log)
                        continue
                    append(folder / f"{run.row.phase}.jsonl", record)
                    built.add(run.warm_start)
                    seconds.setdefault(run.row.size, []).append(run.elapsed)
                    report.finished(record, run.elapsed, left())
        finally:
            for run in running:
                run.process.kill()
            for run in running:
                run.process.join()
            report.end()
    if caught:
        raise Stopped(caught[0])
    return failures


def log_path(cache: Path, key: str) -> Path:
    """Where a row's output goes."""
    return cache / "logs" / (re.sub(r"[^\w.=,/-]", "-", key) + ".log")


def check_record(record: dict[str, Any], key: str) -> dict[str, Any]:
    """`record` as JSON holds it. Raises ValueError where it is another row's or an accuracy is not finite.

    Anything else that is not finite, as the drift of a model that broke, is a result: it becomes null.
    """
    if record.get("key") != key:
        raise ValueError(f"the record's key is {record.get('key')!r}, not {key!r}")
    if not all(math.isfinite(value) for _, value in record["accuracy"]):
        raise ValueError(f"accuracy is not finite: {record['accuracy']}")
    return finite(record)


def _next(waiting: Sequence[Any], being_built: set[str | None], warm_start_id: Callable[[Any], str] | None) -> Any:
    """The first row that needs nothing which another is building; None where there is no such row."""
    return next((row for row in waiting if warm_start_id is None or warm_start_id(row) not in being_built), None)


def _start(context: Any, row: Any, train: Callable, cache: Path, warm_start_id: Callable[[Any], str] | None) -> _Run:
    log = log_path(cache, row.key)
    log.parent.mkdir(parents=True, exist_ok=True)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(train, row, cache, log, sender), daemon=True)
    try:
        with _environment():
            _launch_server()
            process.start()
    except (EOFError, OSError) as error:
        raise ServerError(f"the process that imports torch and the trainer ended ({error}); see above") from None
    finally:
        sender.close()
    return _Run(row, warm_start_id(row) if warm_start_id else None, process, receiver, log, time.monotonic())


def _collect(run: _Run) -> tuple[dict[str, Any] | None, str]:
    """The record of a run that has ended, or why there is none."""
    try:
        record, reason = run.connection.recv()
    except (EOFError, OSError):
        record, reason = None, ""
    run.connection.close()
    run.process.join(timeout=10)
    if run.process.is_alive():
        run.process.kill()
        run.process.join()
    code = run.process.exitcode
    if record is None and not reason:
        reason = f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    return record, reason


def _child(train: Callable, row: Any, cache: Path, log: Path, sender: Any) -> None:
    """One run, in its own process."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout.reconfigure(line_buffering=True)
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)
        torch.set_num_interop_threads(1)
    _spare_time()
    try:
        message = check_record(train(row, cache), row.key), ""
    except BaseException as error:
        traceback.print_exc()
        message = None, "".join(traceback.format_exception_only(error)).strip().splitlines()[-1]
    sys.stdout.flush()
    sys.stderr.flush()
    sender.send(message)


def _spare_time() -> None:
    """Together 10% of a run, and no bit of its numbers: freed memory stays with the process, and the collector passes
    over what was imported."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 50, 100)
    with contextlib.suppress(AttributeError):  # only glibc has it
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_TRIM_THRESHOLD, 1 << 30)
        mallopt(_TOP_PAD, 1 << 26)
        mallopt(_MMAP_THRESHOLD, 1 << 25)  # the most that it takes


def _end_with_parent() -> None:
    """Without this a run would go on when its parent is killed."""
    connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def _launch_server() -> None:
    """Where it does not run yet. It and the runs are deaf to Ctrl-C: this process decides what to end."""
    resource_tracker.ensure_running()  # unblocks what is blocked, so it must come first
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def _environment() -> Iterator[None]:
    """`ENVIRONMENT` for the server that runs are forked from, which any start may have to launch."""
    before = {name: os.environ.get(name) for name in ENVIRONMENT}
    os.environ.update(ENVIRONMENT)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Holds `folder` for this process."""
    import fcntl

    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"--results {folder}: another process is writing there; wait for its end") from None
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """A list that receives the first signal to stop; the second one acts as usual."""
    caught: list[int] = []
    names = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return

    def handle(signum: int, frame: Any) -> None:
        caught.append(signum)
        restore()

    before = {name: signal.signal(name, handle) for name in names}

    def restore() -> None:
        for name, handler in before.items():
            signal.signal(name, handler)

    try:
        yield caught
    finally:
        restore()

"""Kills ``gac train`` at random moments, goes on with ``--resume``, and compares the end with a run left in peace.

    python -m benchmarks.kill_and_resume --kills 50 --seed 0 --json benchmarks/results/kill_and_resume.json

A run of a few seconds is killed (SIGKILL) up to five times and then left to its end; the next one follows until there
were as many kills as wanted. Half of the kills come at a moment drawn from the length of the run, half at a file
operation drawn from those with which checkpoints are written and removed. What has to be the same: every number of
every step and of the summary but times and memory, the final weights to the bit, and no half-written file beside them.
A checkpoint that was complete must never be missing later. POSIX only: the runs are forks of one process, which has
imported everything.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

RUN = [
    "--task", "chain_sum:terms=2,digits=1", "--heldout", "12", "--demonstrations", "20", "--prompts", "40",
    "--hidden-size", "16", "--layers", "1", "--warm-start-steps", "4", "--micro-batches", "2", "--batch-size", "4",
    "--sft-batch-size", "4", "--generations", "4", "--threads", "1", "--device", "cpu", "--eval-every", "3",
    "--save-every", "2", "--steps", "8", "--interval", "1",
]  # fmt: skip
"""Options of the run."""

MOST_KILLS = 5
"""Of one run."""

COSTS = frozenset({"seconds", "seconds_per_step", "gac_share", "peak_memory_bytes"})
"""What a summary says of time and memory."""


@dataclasses.dataclass(frozen=True)
class Moment:
    """When a run is killed: after so many seconds, or at the file operation of that number among its checkpoints'."""

    seconds: float | None = None
    operation: int | None = None


@dataclasses.dataclass(frozen=True)
class Ending:
    """How a run ended.

    Attributes:
        killed: whether the kill came before the end.
        seconds: that it took.
        operations: on files of checkpoints, where it came to its end.
    """

    killed: bool
    seconds: float
    operations: int


def train(out: Path, log: Path, *, resume: bool, moment: Moment | None = None) -> Ending:
    """Runs ``gac train`` in a fork.

    Args:
        out: its run directory.
        log: what it prints is added here.
        resume: go on with what is in `out`.
        moment: when to kill it; None: not at all.

    Raises:
        RuntimeError: it ended by itself, and not well.
    """
    moment = moment or Moment()
    words = ["train", *([] if resume else RUN), *(["--resume"] if resume else []), "--out", str(out)]
    counted = log.with_suffix(".operations")
    begin = time.perf_counter()
    child = os.fork()
    if not child:
        _child(words, out, log, counted, moment.operation)
    end, status = begin + (moment.seconds or 1e9), 0
    while not (done := os.waitpid(child, os.WNOHANG))[0]:
        if time.perf_counter() > end:
            os.kill(child, signal.SIGKILL)
            done = os.waitpid(child, 0)
            break
        time.sleep(0.001)
    status = done[1]
    killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    if not killed and status:
        raise RuntimeError(f"gac {' '.join(words)} ended with status {status}:\n{log.read_text()[-3000:]}")
    return Ending(killed, time.perf_counter() - begin, 0 if killed else int(counted.read_text()))


def _child(words: list[str], out: Path, log: Path, counted: Path, kill_at: int | None) -> None:
    """The run itself; does not return."""
    code = 70
    try:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        count = _count_operations(str(out / "checkpoints") + os.sep, kill_at)
        from gac.cli import main

        code = main(words)
        counted.write_text(str(count[0]))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _count_operations(under: str, kill_at: int | None) -> list[int]:
    """Counts, from now on, what this process does to files under a folder, and kills it at one of them."""
    count = [0]
    watched = frozenset({"open", "os.mkdir", "os.remove", "os.rename", "os.rmdir"})

    def hook(event: str, arguments: tuple) -> None:
        if event in watched and isinstance(arguments[0], str) and os.path.abspath(arguments[0]).startswith(under):
            if event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR):
                return
            count[0] += 1
            if count[0] == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    return count


def differences(one: Path, other: Path) -> list[str]:
    """What is not the same in two finished run directories, a line each."""
    from gac.runs.folder import CONFIG, METRICS, SUMMARY, TIMING_KEYS, read_json, read_metrics

    def numbers(folder: Path) -> dict[str, Any]:
        steps = read_metrics(folder / METRICS)
        summary = {k: v for k, v in read_json(folder / SUMMARY).items() if k not in COSTS}
        found: dict[str, Any] = {f"summary {k}": v for k, v in summary.items()}
        found["options"] = read_json(folder / CONFIG)["options"]
        found["steps"] = [record["step"] for record in steps]
        for record in steps:
            found |= {f"step {record['step']} {k}": v for k, v in record.items() if k not in TIMING_KEYS}
        for path in sorted((folder / "model").iterdir()):
            found[f"model/{path.name}"] = path.read_bytes()
        found["half-written files"] = [str(path.relative_to(folder)) for path in folder.rglob("*.part")]
        return found

    ours, theirs = numbers(one), numbers(other)
    changed = sorted(name for name in {*ours, *theirs} if ours.get(name) != theirs.get(name))
    return [f"{name}: {str(ours.get(name))[:60]} and {str(theirs.get(name))[:60]}" for name in changed]


@dataclasses.dataclass
class Kills:
    """What the kills came to.

    Attributes:
        runs: that were killed and came to their end.
        by_time, in_checkpoints: kills of both kinds.
        before_config: kills before the run had a `config.json`, so that it was begun anew.
        last_checkpoints: the last complete one at each kill, as its step; 0 for none.
        wrong: what was not the same in the end.
    """

    runs: int = 0
    by_time: int = 0
    in_checkpoints: int = 0
    before_config: int = 0
    last_checkpoints: list[int] = dataclasses.field(default_factory=list)
    wrong: list[str] = dataclasses.field(default_factory=list)

    @property
    def total(self) -> int:
        """All kills."""
        return self.by_time + self.in_checkpoints


def kill_and_resume(folder: Path, kills: int, seed: int) -> Kills:
    """Kills runs `kills` times.

    Args:
        folder: where they live; empty.
        kills: how many.
        seed: of their moments.
    """
    from gac.runs.folder import CONFIG
    from gac.trainers.hybrid_grpo import complete_checkpoints

    draw, found = random.Random(seed), Kills()
    whole = folder / "whole"
    peace = train(whole, folder / "whole.log", resume=False)
    while found.total < kills:
        out, log = folder / f"run{found.runs}", folder / f"run{found.runs}.log"
        last, resume, here = 0, False, 0
        while found.total < kills and here < MOST_KILLS:
            moment = (
                Moment(seconds=draw.uniform(0, peace.seconds))
                if draw.random() < 0.5
                else Moment(operation=draw.randint(1, peace.operations))
            )
            if not train(out, log, resume=resume, moment=moment).killed:
                break
            here += 1
            found.by_time += moment.operation is None
            found.in_checkpoints += moment.operation is not None
            resume = (out / CONFIG).exists()
            found.before_config += not resume
            complete = complete_checkpoints(str(out / "checkpoints"))
            now = int(complete[-1].rpartition("-")[2]) if complete else 0
            if now < last:
                found.wrong.append(f"{out.name}: checkpoint {last} was complete, and {now} is the last one now")
            last = now
            found.last_checkpoints.append(now)
        train(out, log, resume=resume)
        found.wrong += [f"{out.name}: {line}" for line in differences(whole, out)]
        found.runs += 1
    return found


def main(argv: list[str] | None = None) -> int:
    """The command line; 1 where something was not the same."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="how many (default: 50)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    parser.add_argument("--json", type=Path, help="where the result goes")
    options = parser.parse_args(argv)
    # all imports in this process, so that a run begins at once
    import gac.runs.callback
    import gac.runs.training
    import gac.tasks.evaluation
    import gac.tasks.problems
    import gac.tasks.warm_start
    import gac.trainers.hybrid_grpo  # noqa: F401
    from gac.runs.folder import versions, write_json

    gc.freeze()  # of what every run shares; accelerate collects at both ends of a training
    with tempfile.TemporaryDirectory() as folder:
        found = kill_and_resume(Path(folder), options.kills, options.seed)
    result = {
        "command": f"python -m benchmarks.kill_and_resume --kills {options.kills} --seed {options.seed}",
        "run": RUN,
        "seed": options.seed,
        "kills": found.total,
        **dataclasses.asdict(found),
        "versions": versions(),
    }
    print(f"{found.total} kills of {found.runs} runs, {found.in_checkpoints} while a checkpoint was written or removed")
    print("\n".join(found.wrong) or "all ended as the run in peace: every number, the weights to the bit")
    if options.json is not None:
        write_json(options.json, result)
    return 1 if found.wrong else 0


if __name__ == "__main__":
    sys.exit(main())

"""``python -m tests.fuzz``: draws until time is up; exit code 1 where something new was found."""

from __future__ import annotations

import argparse
import multiprocessing
import sys

from tests.fuzz.share import work

TARGETS = ("mixer", "kernels")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--target", choices=("all", *TARGETS), default="all", help="all: 3/4 mixer, 1/4 kernels")
    parser.add_argument("--seconds", type=float, default=60.0, help="for all targets together")
    parser.add_argument("--draws", type=int, default=10**9, help="at most so many of each target")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--number", type=int, default=None, help="this draw alone")
    parser.add_argument("--workers", type=int, default=1, help="processes, of one thread each")
    parser.add_argument("--engine", choices=("one", "ddp", "fsdp2"), default="one", help="of the mixer: 2 ranks (gloo)")
    parser.add_argument(
        "--backend", choices=("cpu", "fallback", "reference", "triton"), default=None, help="of kernels; all but triton"
    )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    targets = TARGETS if options.target == "all" else (options.target,)
    shares = {"mixer": 0.75, "kernels": 0.25} if len(targets) > 1 else {targets[0]: 1.0}
    failed = False
    for target in targets:
        jobs = [(target, options, worker, shares[target] * options.seconds) for worker in range(options.workers)]
        if options.workers == 1:
            found = [work(*jobs[0])]
        else:
            with multiprocessing.get_context("spawn").Pool(options.workers) as pool:
                found = pool.starmap(work, jobs, chunksize=1)
        tally = found[0]
        for other in found[1:]:
            tally.add(other)
        print(tally, flush=True)
        failed |= bool(tally.failures)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())

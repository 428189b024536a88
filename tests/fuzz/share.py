"""One process' share of a run; a module by itself, so that processes which are started anew find it by name."""

from __future__ import annotations

import argparse
import itertools
import warnings
from time import monotonic

import torch

from tests.fuzz.report import Tally


def work(target: str, options: argparse.Namespace, worker: int, seconds: float) -> Tally:
    """One process' share of a target: every ``workers``-th number."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if options.number is not None:
        numbers = [options.number] if worker == 0 else []
    else:
        numbers = itertools.takewhile(lambda n: n < options.draws, itertools.count(worker, options.workers))
    until = monotonic() + seconds
    if target == "kernels":
        from tests.fuzz import kernels

        return kernels.fuzz(options.seed, numbers, until=until, backend=options.backend)
    if options.engine != "one":
        from tests.fuzz import ranks

        return ranks.fuzz(options.engine, options.seed, numbers, until=until)
    from tests.fuzz import mixer

    return mixer.fuzz(options.seed, numbers, until=until)

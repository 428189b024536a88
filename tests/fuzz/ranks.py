"""The target ``mixer`` on two ranks with gloo: DDP, whose ranks contribute each, and FSDP2, whose ranks do together."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path
from time import monotonic
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.fuzz.compare import Comparison
from tests.fuzz.draw import Draw, Pass
from tests.fuzz.drawing import drawn
from tests.fuzz.judge import told
from tests.fuzz.known import KNOWN
from tests.fuzz.models import Net
from tests.fuzz.report import Tally, as_code
from tests.fuzz.run import Outcome, perform, shifted
from tests.fuzz.truth import Replay
from tests.gac.distributed.processes import on_ranks

WORLD = 2


class RankReplay(Replay):
    """The copy on one of the ranks: gradients travel in the open, as lists."""

    def __init__(self, draw: Draw, outcome: Outcome, rank: int) -> None:
        super().__init__(draw, outcome, rank)
        self._used: set[int] = set()  # parameters that had a gradient here since the last average
        self._syncs = True

    def _pass(self, one: Pass, *arguments: Any) -> None:
        self._syncs = one.sync
        super()._pass(one, *arguments)

    def _gathered(self, own: Tensor) -> list[Tensor]:
        found = [torch.empty_like(own) for _ in range(WORLD)]
        dist.all_gather(found, own.contiguous())
        return found

    def _of_all_ranks(self, passes: list[Pass]) -> list[Pass]:
        return [shifted(one, rank) for rank in range(WORLD) for one in passes]

    def _contributions(self, own: Tensor) -> list[Tensor]:
        parts = [part / WORLD for part in self._gathered(own)]
        return parts if self.draw.engine == "ddp" else [sum(parts[1:], parts[0])]

    def _accumulate(self, gradients: tuple[Tensor | None, ...]) -> None:
        """DDP averages what each rank has accumulated since the last average; FSDP2 adds the average up."""
        for k, (parameter, gradient) in enumerate(zip(self.parameters, gradients, strict=True)):
            if gradient is not None:
                self._used.add(k)
            if not self._syncs:
                super()._accumulate_one(parameter, gradient)
                continue
            here = torch.tensor(float(k in self._used))
            dist.all_reduce(here)
            self._used.discard(k)
            if not here:
                continue
            gradient = torch.zeros_like(parameter) if gradient is None else gradient
            before = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            if self.draw.engine == "ddp":
                first, second = self._gathered(before + gradient)
                parameter.grad = first / WORLD + second / WORLD
            else:
                first, second = self._gathered(gradient)
                parameter.grad = before + (first / WORLD + second / WORLD)


def wrapped(draw: Draw, net: Net) -> nn.Module:
    """The model in the draw's engine."""
    if draw.engine == "ddp":
        from torch.nn.parallel import DistributedDataParallel

        return DistributedDataParallel(net, find_unused_parameters=draw.model == "experts")
    from torch.distributed.fsdp import fully_shard

    return fully_shard(net)


def judge(draw: Draw, rank: int) -> str | None:
    """What is wrong with a draw on this rank; None where nothing is."""
    outcome = perform(draw, lambda net: wrapped(draw, net), rank)
    if outcome.error is not None:
        return told(outcome)
    replay = RankReplay(draw, outcome, rank)
    expected = replay.steps()
    for step in expected:
        step.exact = False  # averages are rounded in an order of the engine's own
    differences = Comparison(draw, replay).differences(outcome, expected)
    return "; ".join(map(str, differences[:3])) or None


def _work(rank: int, world: int, engine: str, seed: int, numbers: list[int], seconds: float) -> Tally:
    tally, start = Tally(f"mixer under {engine} on {world} ranks"), monotonic()
    for number in numbers:
        draw = drawn(seed, number, engine=engine)
        for known in KNOWN:  # a rank that raises leaves the others waiting: what is known is drawn without it
            if known.present(draw):
                draw = known.without(draw)
                tally.known[f"{known.name}, left out"] += 1
        what = judge(draw, rank)
        tally.draws += 1
        if what is not None:
            tally.failures.append(f"rank {rank}, draw {number} of seed {seed}: {what}\n    {as_code(draw)}")
        state = torch.tensor([float(what is not None), float(monotonic() - start >= seconds)])
        dist.all_reduce(state, op=dist.ReduceOp.MAX)
        if state.any():
            break  # after a failure the ranks may not stand at the same call any more
    tally.seconds = monotonic() - start
    return tally


def fuzz(engine: str, seed: int, numbers: Iterable[int], *, until: float) -> Tally:
    """Judges draws on two ranks until ``monotonic()`` says ``until``, or one fails."""
    seconds = min(until - monotonic(), 10**6)
    some = [number for number, _ in zip(numbers, range(100_000), strict=False)]
    with tempfile.TemporaryDirectory() as folder:
        found = on_ranks(
            WORLD, Path(folder), _work, engine, seed, some, seconds, preload="tests.fuzz.ranks", seconds=seconds + 120
        )
    for other in found[1:]:
        found[0].failures += other.failures
    return found[0]

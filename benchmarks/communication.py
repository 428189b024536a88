"""What a step of GAC sends and does on each rank, and what the gradients take: ``python -m benchmarks.communication``.

Two ways. *Measured*: gloo processes on this machine train and exchange; what goes through ``all_reduce`` is counted,
and the mu of all ranks compared. *Simulated*: torch's fake process group, which sends nothing, lets one process be any
rank of up to 1,024; whole steps run with and without GAC, and the difference of what they do is counted. Counts are
exact and the same on every machine. Host time is not, and is printed beside them.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import json
import multiprocessing
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import gac
from gac.plan.shapes import MODELS, LlamaShape

RESULT = Path(__file__).parent / "results" / "communication.json"
COMMAND = "python -m benchmarks.communication --write"

TINY = LlamaShape("tiny", 2048, 64, 128, 2, 4, 2, 16, tied=True)
MICRO_BATCHES = 2
STEPS = 4  # the last is also taken apart by module
RANKS = {
    "ddp": ((2, 0), (64, 0), (1024, 0), (1024, 1023)),
    "fsdp2": ((2, 0), (64, 0), (1024, 0), (1024, 1023)),
    "hsdp": ((8, 0), (64, 0), (1024, 0), (1024, 1023)),
    "hsdp, a quarter": ((8, 0), (64, 0), (1024, 0)),
}
"""World sizes and ranks by engine. The last rank of many holds no rows of most tensors. In the last case a quarter of
the ranks trains, and no process group spans it; not as the last rank, because a process keeps its first mesh.
"""

_PACKAGES = tuple(str(Path(module).parent) for module in (gac.__file__, sys.modules["gac_kernels"].__file__))


@dataclass
class Counts:
    """What one optimizer step does on one rank.

    Attributes:
        operations: torch operations, by a dispatch mode.
        calls: Python calls of functions of ``gac`` and ``gac_kernels``.
        collectives: collectives of the default process group and its parts.
        bytes: of the tensors handed to ``all_reduce``.
    """

    operations: int = 0
    calls: int = 0
    collectives: int = 0
    bytes: int = 0

    def __sub__(self, other: Counts) -> Counts:
        return Counts(*(getattr(self, f.name) - getattr(other, f.name) for f in fields(Counts)))


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts = Counts()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.counts.operations += 1
        if function.namespace == "c10d":
            self.counts.collectives += 1
            if function.overloadpacket.__name__ == "allreduce_":
                self.counts.bytes += sum(leaf.nbytes for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor))
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def counting() -> Iterator[Counts]:
    """Counts what happens inside, in the fields of what it yields."""

    def profile(frame, event, argument):
        if event == "call" and frame.f_code.co_filename.startswith(_PACKAGES):
            mode.counts.calls += 1

    with _Counter() as mode:
        sys.setprofile(profile)
        try:
            yield mode.counts
        finally:
            sys.setprofile(None)


def build(llama: LlamaShape, engine: str, ranks: int, *, sends: bool) -> nn.Module:
    """A model under an engine; under DDP without its all-reduce unless it ``sends``."""
    torch.manual_seed(0)
    model = llama.model(dtype=torch.float32, device="cpu", max_length=32)
    if engine == "ddp":
        model = DistributedDataParallel(model)
        if not sends:  # the reducer starts it from C++, where a dispatch mode of Python cannot follow
            model.register_comm_hook(None, _leave)
        return model
    shape = {"fsdp2": (ranks,), "hsdp": (2, ranks // 2), "hsdp, a quarter": (4, 2, ranks // 8)}[engine]
    names = ("part", "replicate", "shard")[-len(shape) :]
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    if len(shape) == 3:
        mesh = mesh["replicate", "shard"]
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def _leave(state, bucket):
    done = torch.futures.Future()
    done.set_result(bucket.buffer())
    return done


def train(
    model: nn.Module, vocabulary: int, mixer: gac.Mixer | None, rank: int, steps: int = STEPS
) -> Iterator[Callable[[], None]]:
    """Optimizer steps to be called one after the other; the same without a mixer, with weights of a half."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    half = torch.tensor(0.5)

    def step(number: int) -> None:
        for branch in ("sft", "rl"):
            with getattr(mixer, branch)() if mixer else contextlib.nullcontext():
                for micro in range(MICRO_BATCHES):
                    generator = torch.Generator().manual_seed(1000 * number + 100 * rank + 10 * micro + len(branch))
                    batch = torch.randint(0, vocabulary, (2, 8), generator=generator)
                    loss = model(input_ids=batch, labels=batch).loss / MICRO_BATCHES
                    (loss * (mixer.weight if mixer else half)).backward()
        optimizer.step()
        if mixer:
            mixer.step()
            _ = mixer.mu
        optimizer.zero_grad()

    for number in range(steps):
        yield functools.partial(step, number)


# -- simulated --------------------------------------------------------------------------------------------------------


def simulate(engine: str, ranks: int, rank: int, *, estimator: str = "sketch", shape: LlamaShape = TINY) -> dict:
    """One rank of many: what GAC adds to each step, and what it keeps.

    Returns:
        ``engine, ranks, rank, estimator, parameters, gradient_bytes`` (of the whole model), ``measured`` and
        ``by_module`` (:class:`Counts` of a step as it is, and of one that is also taken apart by module, as
        dictionaries), ``sketch_bytes`` (memory) and ``seconds`` (host time in GAC's code in the fastest step).
    """
    plain, *_ = _steps(engine, ranks, rank, shape, patched=False)
    (_, second, third, apart), sketch_bytes, seconds = _steps(engine, ranks, rank, shape, estimator=estimator)
    if second != third:
        raise RuntimeError(f"steps differ in what they do: {second}, {third}")
    return {
        "engine": engine,
        "ranks": ranks,
        "rank": rank,
        "estimator": estimator,
        "parameters": shape.numel(),
        "gradient_bytes": 4 * shape.numel(),
        "measured": asdict(third - plain[1]),
        "by_module": asdict(apart - plain[1]),
        "sketch_bytes": sketch_bytes,
        "seconds": seconds,
    }


def _steps(engine, ranks, rank, shape, *, patched=True, estimator="sketch") -> tuple[list[Counts], int, float]:
    """Counts of each step, memory, and the host time of the fastest."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
    mixer = None
    gc.disable()  # mixers that are garbage call functions of GAC when they are collected
    try:
        model = build(shape, engine, ranks, sends=False)
        if patched:
            mixer = gac.patch(model, estimator=estimator, interval=1, report_interval=STEPS)
        found, seconds = [], []
        for step in train(model, shape.vocabulary, mixer, rank, STEPS if patched else 2):
            with counting() as counts:
                step()
            found.append(counts)
            if mixer:
                seconds.append(mixer.metrics(wait=True)["seconds"])
        return found, mixer.nbytes if mixer else 0, min(seconds, default=0.0)
    finally:
        gc.enable()
        if mixer:
            mixer.unpatch()
        dist.destroy_process_group()


# -- measured ---------------------------------------------------------------------------------------------------------


def measure(ranks: int, models: list[str], *, seconds: float = 300) -> list[dict]:
    """Steps on ``ranks`` gloo processes: bytes that GAC hands to ``all_reduce``, beside those of the gradients."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        processes = [context.Process(target=_work, args=(rank, ranks, folder, models)) for rank in range(ranks)]
        for process in processes:
            process.start()
        try:
            for process in processes:
                process.join(seconds)
        finally:
            for process in processes:
                process.kill()
        if any(process.exitcode != 0 for process in processes):
            raise RuntimeError(f"ranks ended with {[process.exitcode for process in processes]}")
        found = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(ranks)]
    if any(other != found[0] for other in found):
        raise RuntimeError("ranks differ in mu or in what they sent")
    return [{k: v for k, v in row.items() if k != "mu"} for row in found[0]]


def _work(rank: int, ranks: int, folder: str, models: list[str]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks, timeout=timedelta(seconds=120)
    )
    rows = [_measure_one(name, engine, rank, ranks) for name in models for engine in ("ddp", "fsdp2")]
    (Path(folder) / f"{rank}.json").write_text(json.dumps(rows))
    dist.destroy_process_group()


def _measure_one(name: str, engine: str, rank: int, ranks: int) -> dict:
    shape = TINY if name == TINY.name else MODELS[name]
    model = build(shape, engine, ranks, sends=True)
    sent: list[int] = []
    send = dist.all_reduce

    def counted(tensor, *args, **kwargs):
        sent.append(tensor.nbytes)
        return send(tensor, *args, **kwargs)

    dist.all_reduce = counted
    try:
        with gac.patch(model, estimator="sketch", interval=1, report_interval=None) as mixer:
            mus = []
            for step in train(model, shape.vocabulary, mixer, rank):
                sent.clear()
                step()
                mus.append(float(mixer.mu))
                if len(sent) != 1:
                    raise RuntimeError(f"{len(sent)} collectives in a step")
    finally:
        dist.all_reduce = send
    return {
        "engine": engine,
        "ranks": ranks,
        "model": name,
        "parameters": shape.numel(),
        "gradient_bytes": 4 * shape.numel(),
        "bytes": sent[0],
        "collectives": 1,
        "mu": mus,
    }


# -- both -------------------------------------------------------------------------------------------------------------


def markdown(data: dict) -> str:
    """The two tables of docs/scaling.md, with an empty line between them."""
    lines = [
        "| engine | processes | model | gradient | all-reduced in a step | of the gradient |",
        "|---|---:|---|---:|---:|---:|",
    ]
    for row in data["measured"]:
        share = row["bytes"] / row["gradient_bytes"]
        lines.append(
            f"| {row['engine']} | {row['ranks']:,} | {row['model']} | {row['gradient_bytes']:,} B | {row['bytes']:,} B "
            f"| {100 * share:.2g}% |"
        )
    lines += [
        "",
        "| engine | ranks | this rank | all-reduces | bytes | operations | Python calls | by module: bytes | "
        "operations | sketch memory |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in data["simulated"]:
        measured, apart = row["measured"], row["by_module"]
        lines.append(
            f"| {row['engine']} | {row['ranks']:,} | {row['rank']:,} | {measured['collectives']} | "
            f"{measured['bytes']:,} | {measured['operations']} | {measured['calls']} | {apart['bytes']:,} | "
            f"{apart['operations']} | {row['sketch_bytes']:,} B |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measures, simulates, prints the tables; ``--write`` keeps the data."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"to {RESULT.relative_to(Path.cwd())}")
    options = parser.parse_args()
    torch.set_num_threads(1)
    simulated = [simulate(engine, ranks, rank) for engine in RANKS for ranks, rank in RANKS[engine]]
    for row in simulated:
        seconds = row.pop("seconds")  # of this machine, so not kept
        print(f"{row['engine']:14} {row['ranks']:5} ranks, rank {row['rank']:4}: {1e3 * seconds:.1f} ms in GAC's code")
    measured = [row for ranks in (2, 4) for row in measure(ranks, ["tiny", "10M"])]
    data = {"format": 1, "command": COMMAND, "torch": torch.__version__, "measured": measured, "simulated": simulated}
    print(markdown(data))
    if options.write:
        RESULT.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""The end of a step by itself: host time of ``mixer.step()`` and of its parts, and what it starts on a GPU.

``python -m gac.bench.ending [--device cuda] [--out FILE]`` prints it as JSON, or writes it as it comes. Steps end as
they do in training and, on a GPU, in plain torch, too; there, calls of ``sketch`` are timed besides. Beside what is
measured stands what was predicted (:data:`PREDICTED`).
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from time import perf_counter, thread_time
from typing import Any

import torch
from torch import nn

import gac
from gac.bench.report import write_json
from gac.bench.timing import quantile
from gac.ending import Ending, why_in_torch
from gac.fused import device as on_device
from gac.fused.host import HostProgram
from gac.measurement import Measurement
from gac.observe.observer import Observer
from gac_kernels import SketchLayout, pair_moments, sketch

PREDICTED: Mapping[str, Mapping[str, float]] = {
    "measured": {"kernels": 5, "host": 300e-6},
    "unmeasured": {"kernels": 1, "host": 80e-6},
}
"""Of a GPU, before any was at hand. Kernels: counted by the tests in Triton's interpreter, 3 programs and 2 fills with
zeros. Seconds of the host: from those of prepared launches (``docs/kernels.md``) and of the same Python on a CPU."""

PARTS: Mapping[str, tuple[tuple[type, str], ...]] = {
    "sums": tuple((Measurement, f"finish{x}") for x in ("_on_device", "_on_host", "_in_program", "")),
    "posting": ((Measurement, "post"),),
    "gradients": ((Observer, "let_go"),),
    "program": ((Ending, "_run"), (HostProgram, "__call__")),
    "metrics": ((Ending, "_publish_row"),),
    "next step": ((Ending, "plan"),),
    "hooks": ((Observer, "measure"),),
    "clearing": ((Observer, "clear"),),
}
"""What is timed within: each part has the time of its methods, less that of other parts that run within them.

``gradients`` is what freeing them takes where ``zero_grad`` came before the step's end: until then they are held, to
tell whether somebody changed them. Without GAC ``zero_grad`` would take it.
"""

TENSORS, CONTRIBUTIONS, INTERVAL = (100, 300), 4, 3

CALLED = (1, 38, 100, 300)
"""Tensors of a call of ``sketch`` whose host time is taken: the rows of ``docs/kernels.md`` on prepared launches."""


class Parts:
    """Host seconds by part, while :meth:`watching`."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._within: list[float] = []  # seconds of parts inside those that run

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Times the methods of :data:`PARTS`."""
        kept = []
        for part, methods in PARTS.items():
            for owner, name in methods:
                kept.append((owner, name, getattr(owner, name)))
                setattr(owner, name, self._timed(part, getattr(owner, name)))
        try:
            yield
        finally:
            for owner, name, method in kept:
                setattr(owner, name, method)

    def _timed(self, part: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            self._within.append(0.0)
            start = perf_counter()
            try:
                return method(*args, **options)
            finally:
                spent = perf_counter() - start
                own = spent - self._within.pop()
                self.seconds[part] = self.seconds.get(part, 0.0) + own
                if self._within:
                    self._within[-1] += spent

        return call


class Steps:
    """Small training steps: so many tensors that are quickly done.

    Args:
        device: where. estimator: of the mixer. tensors: of 64 x 64 elements.
    """

    def __init__(self, device: torch.device, estimator: str = "sketch", tensors: int = TENSORS[0]) -> None:
        torch.manual_seed(0)
        self.tensors = tensors
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.model = nn.ParameterList([torch.randn(64, 64) for _ in range(tensors)]).to(device, dtype)
        self.device = device
        options: dict[str, Any] = {"estimator": estimator, "interval": INTERVAL, "report_interval": None}
        self.mixer = gac.patch(self.model, **options)

    def until_its_end(self) -> None:
        """All of a step but its end."""
        for branch in (self.mixer.sft, self.mixer.rl):
            with branch():
                for _ in range(CONTRIBUTIONS // 2):
                    noise = torch.randn(self.tensors, 64, 64, device=self.device)
                    self.mixer.backward((torch.stack(list(self.model)).float() - noise).square().mean())
        self.model.zero_grad()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def measure(
    device: torch.device, *, rounds: int = 30, on_found: Callable[[dict[str, Any]], object] = lambda found: None
) -> dict[str, Any]:
    """Host seconds and launches of the end of a step; plain data.

    Args:
        device: where the gradients are.
        rounds: measured steps that are timed, and as many more for their parts; medians count.
        on_found: sees what there is whenever more is.

    Returns:
        For ``sketch`` and ``exact``, of 100 tensors and again of 300, and on a GPU ``in torch`` (the sketch's steps
        without the program): ``measured`` and ``unmeasured`` steps, with ``host`` seconds, those by ``parts``, and on a
        GPU ``kernels`` and ``copies``. On a CPU also the time of the ``thread``, which other processes are not in, its
        ``quickest``, and the ``floor``: what one read of both branches' totals takes at that moment. On a GPU also the
        host seconds of ``calls`` of ``sketch`` by :func:`calls`, and beside them what was ``predicted``. Last the
        ``seconds`` that it took.
    """
    start = perf_counter()
    found: dict[str, Any] = {}
    if device.type == "cuda":
        found |= {"predicted": PREDICTED, "calls": {str(tensors): calls(device, tensors) for tensors in CALLED}}
    for tensors in TENSORS:
        for estimator in ("sketch", "exact"):
            name = estimator if tensors == TENSORS[0] else f"{estimator}, {tensors} tensors"
            found[name] = _of(Steps(device, estimator, tensors), rounds)
            on_found(found)
    if device.type == "cuda":
        kept, on_device.ON = on_device.ON, set()
        try:
            found["in torch"] = _of(Steps(device), rounds)
        finally:
            on_device.ON = kept
    return found | {"seconds": perf_counter() - start}


def calls(device: torch.device, tensors: int, *, times: int = 50) -> float:
    """Host seconds of a call of ``sketch`` on so many bf16 tensors of 64 elements, with ``into``, that repeats.

    Least of ten turns, the device idle before each: later calls of a turn do not wait for it.
    """
    gradients = [torch.randn(64, device=device).bfloat16() for _ in range(tensors)]
    layout = SketchLayout.per_tensor([64] * tensors)
    out, into = torch.zeros(layout.size, device=device), torch.zeros(2, dtype=torch.float64, device=device)
    turns = []
    for turn in range(11):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = perf_counter()
        for _ in range(times):
            sketch(gradients, out, layout=layout, into=into)
        if turn:  # the first compiles
            turns.append((perf_counter() - start) / times)
    return min(turns)


def _of(steps: Steps, rounds: int) -> dict[str, Any]:
    with steps.mixer as mixer:
        for _ in range(4 * INTERVAL):  # kernels are compiled, tables are there
            steps.until_its_end()
            mixer.step()
        times: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
        of_parts: dict[bool, list[dict[str, float]]] = {True: [], False: []}
        floors: list[float] = []
        for number in range(2 * INTERVAL * rounds):
            measured, watched = number % INTERVAL == 0, number // INTERVAL % 2 == 1
            steps.until_its_end()
            parts = Parts()
            with parts.watching() if watched else nullcontext():  # which costs time by itself
                start, of_thread = perf_counter(), thread_time()
                mixer.step()
                spent = perf_counter() - start, thread_time() - of_thread
            if number % INTERVAL == INTERVAL - 1:  # the last one of an interval prepares a measured step
                if steps.device.type == "cpu":
                    floors.append(_reading(mixer))
            elif watched:
                of_parts[measured].append(parts.seconds)
            else:
                times[measured].append(spent)
        result: dict[str, Any] = {"why_in_torch": why_in_torch(mixer.controller.law, steps.device)}
        for measured, name in ((True, "measured"), (False, "unmeasured")):
            result[name] = {
                "host": quantile([spent for spent, _ in times[measured]], 0.5),
                "parts": {part: quantile([x.get(part, 0.0) for x in of_parts[measured]], 0.5) for part in PARTS},
            }
            if steps.device.type == "cpu":
                of_threads = [of_thread for _, of_thread in times[measured]]
                result[name] |= {"thread": quantile(of_threads, 0.5), "quickest": min(of_threads)}
        if floors:
            result["measured"]["floor"] = quantile(floors, 0.5)
        if steps.device.type == "cuda":
            for name in ("measured", "unmeasured"):
                steps.until_its_end()
                result[name] |= _started(mixer.step)
    return result


def _reading(mixer: gac.Mixer) -> float:
    """Seconds of the thread in one read of both branches' totals, as a step's passes have left the caches."""
    pairs = [ledger._vectors[: 2 * ledger.layout.size].view(2, -1).unbind() for ledger in mixer._observer.ledgers]
    start = thread_time()
    for pair in pairs:
        pair_moments(*pair)
    return thread_time() - start


def _started(call: Callable[[], object]) -> dict[str, Any]:
    """Kernels by name and copies that a call starts on the GPU."""
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        call()
        torch.cuda.synchronize()
    names = [e.name for e in recorded.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    kernels = [name for name in names if not name.startswith("Memcpy")]
    by_name = {name: kernels.count(name) for name in sorted(set(kernels))}
    return {"kernels": len(kernels), "copies": len(names) - len(kernels), "by_name": by_name}


def main(argv: list[str] | None = None) -> int:
    """Measures, and prints or writes the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="cpu or cuda")
    parser.add_argument("--rounds", type=int, default=30, help="measured steps that are timed")
    parser.add_argument("--out", type=Path, help="a file to write")
    args = parser.parse_args(argv)
    device = torch.device("cuda", torch.cuda.current_device()) if args.device.type == "cuda" else args.device
    write = (lambda found: None) if args.out is None else functools.partial(write_json, args.out)
    found = measure(device, rounds=args.rounds, on_found=write)
    if args.out is None:
        print(json.dumps(found, indent=1))
    else:
        write(found)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""The end of a step by itself: host time of ``mixer.step()`` and of its parts, and what it starts on a GPU.

``python -m gac.bench.ending [--device cuda] [--out FILE]`` prints it as JSON, or writes it. Steps end as they do in
training and, on a GPU, in plain torch, too. Beside what is measured stands what was predicted (:data:`PREDICTED`).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import nn

import gac
from gac.bench.report import write_json
from gac.bench.timing import quantile
from gac.ending import Ending, why_in_torch
from gac.fused import device as on_device
from gac.measurement import Measurement
from gac.observe.observer import Observer

PREDICTED: Mapping[str, Mapping[str, float]] = {
    "measured": {"kernels": 5, "host": 300e-6},
    "unmeasured": {"kernels": 1, "host": 80e-6},
}
"""Of a GPU, before any was at hand. Kernels: counted by the tests in Triton's interpreter, 3 programs and 2 fills with
zeros. Seconds of the host: from those of prepared launches (``docs/kernels.md``) and of the same Python on a CPU."""

PARTS: Mapping[str, tuple[type, tuple[str, ...]]] = {
    "sums": (Measurement, ("post", "finish_on_device", "finish_on_host", "finish")),
    "program": (Ending, ("_run",)),
    "metrics": (Ending, ("_publish", "_publish_vector")),
    "next step": (Ending, ("plan",)),
    "clearing": (Observer, ("clear",)),
}
"""What is timed within: each part has the time of its methods, less that of other parts that run within them."""

TENSORS, CONTRIBUTIONS, INTERVAL = 100, 4, 3


class Parts:
    """Host seconds by part, while :meth:`watching`."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._within: list[float] = []  # seconds of parts inside those that run

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Times the methods of :data:`PARTS`."""
        kept = []
        for part, (owner, names) in PARTS.items():
            for name in names:
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
        device: where. estimator: of the mixer.
    """

    def __init__(self, device: torch.device, estimator: str = "sketch") -> None:
        torch.manual_seed(0)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.model = nn.ParameterList([torch.randn(64, 64) for _ in range(TENSORS)]).to(device, dtype)
        self.device = device
        options: dict[str, Any] = {"estimator": estimator, "interval": INTERVAL, "report_interval": None}
        self.mixer = gac.patch(self.model, **options)

    def until_its_end(self) -> None:
        """All of a step but its end."""
        for branch in (self.mixer.sft, self.mixer.rl):
            with branch():
                for _ in range(CONTRIBUTIONS // 2):
                    noise = torch.randn(TENSORS, 64, 64, device=self.device)
                    self.mixer.backward((torch.stack(list(self.model)).float() - noise).square().mean())
        self.model.zero_grad()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def measure(device: torch.device, *, rounds: int = 30) -> dict[str, Any]:
    """Host seconds and launches of the end of a step; plain data.

    Args:
        device: where the gradients are. rounds: measured steps that are timed; the median counts.

    Returns:
        For ``sketch``, ``exact`` and, on a GPU, ``in torch`` (the sketch's steps without the program): ``measured`` and
        ``unmeasured`` steps, with ``host`` seconds, those by ``parts``, and on a GPU ``kernels`` and ``copies``. Beside
        them what was ``predicted`` of a GPU, and the ``seconds`` that it took.
    """
    start = perf_counter()
    found: dict[str, Any] = {estimator: _of(Steps(device, estimator), rounds) for estimator in ("sketch", "exact")}
    if device.type == "cuda":
        found["predicted"] = PREDICTED
        kept, on_device.ON = on_device.ON, set()
        try:
            found["in torch"] = _of(Steps(device), rounds)
        finally:
            on_device.ON = kept
    return found | {"seconds": perf_counter() - start}


def _of(steps: Steps, rounds: int) -> dict[str, Any]:
    with steps.mixer as mixer:
        for _ in range(4 * INTERVAL):  # kernels are compiled, tables are there
            steps.until_its_end()
            mixer.step()
        times: dict[bool, list[tuple[float, dict[str, float]]]] = {True: [], False: []}
        for number in range(INTERVAL * rounds):
            steps.until_its_end()
            parts = Parts()
            with parts.watching():
                start = perf_counter()
                mixer.step()
                spent = perf_counter() - start
            if number % INTERVAL != INTERVAL - 1:  # the last one of an interval prepares a measured step
                times[number % INTERVAL == 0].append((spent, parts.seconds))
        result: dict[str, Any] = {"why_in_torch": why_in_torch(mixer.controller.law, steps.device)}
        for measured, name in ((True, "measured"), (False, "unmeasured")):
            result[name] = {
                "host": quantile([spent for spent, _ in times[measured]], 0.5),
                "parts": {
                    part: quantile([seconds.get(part, 0.0) for _, seconds in times[measured]], 0.5) for part in PARTS
                },
            }
        if steps.device.type == "cuda":
            for name in ("measured", "unmeasured"):
                steps.until_its_end()
                result[name] |= _started(mixer.step)
    return result


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
    found = measure(device, rounds=args.rounds)
    if args.out is None:
        print(json.dumps(found, indent=1))
    else:
        write_json(args.out, found)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

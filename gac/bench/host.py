"""Host time: what a hook costs per parameter, and what ``import gac`` adds to ``import torch``."""

from __future__ import annotations

import subprocess
import sys
from time import perf_counter

import torch
from torch import nn

import gac
from gac.bench.timing import quantile

_IMPORT = """
import torch
from time import perf_counter
start = perf_counter()
import gac
print(perf_counter() - start)
"""


class _Many(nn.Module):
    """Many small parameters: the tensors' own work is nothing, what is left is per parameter."""

    def __init__(self, count: int, device: torch.device) -> None:
        super().__init__()
        self.items = nn.ParameterList(nn.Parameter(torch.ones(8, device=device)) for _ in range(count))

    def loss(self) -> torch.Tensor:
        return torch.stack(list(self.items)).sum()


def hook_cost(device: torch.device, *, parameters: int = 1000, rounds: int = 60) -> dict[str, float | int]:
    """Seconds of host time per parameter and backward pass that a patched model adds.

    Returns:
        ``hook``: the hooks alone, without the ledger's calls; ``hook_and_read``: with the bucket's kernel call and the
        contribution's end; both are medians of differences within a round. ``parameters``, ``rounds``.
    """
    model = _Many(parameters, device)
    samples: dict[str, list[float]] = {"plain": [], "hook": [], "hook_and_read": []}
    for _ in range(rounds + 1):
        with gac.patch(model, estimator="sketch") as mixer:
            clock = _LedgerClock(mixer)
            loss = model.loss()
            _synchronize(device)
            start = perf_counter()
            with mixer.sft():
                mixer.backward(loss)
            spent = perf_counter() - start
            samples["hook_and_read"].append(spent)
            samples["hook"].append(spent - clock.seconds)
        loss = model.loss()
        _synchronize(device)
        start = perf_counter()
        (0.5 * loss).backward()
        samples["plain"].append(perf_counter() - start)
    result: dict[str, float | int] = {"parameters": parameters, "rounds": rounds}
    for arm in ("hook", "hook_and_read"):
        differences = [a - p for a, p in zip(samples[arm], samples["plain"], strict=True)]
        result[arm] = quantile(differences[1:], 0.5) / parameters  # the first round warms up
    return result


class _LedgerClock:
    """Host time that a mixer spends in its ledgers' calls."""

    def __init__(self, mixer: gac.Mixer) -> None:
        self.seconds = 0.0
        for ledger in mixer._observer.ledgers:
            for name in ("begin", "read", "end"):
                setattr(ledger, name, self._timed(getattr(ledger, name)))

    def _timed(self, function):
        def call(*args):
            start = perf_counter()
            function(*args)
            self.seconds += perf_counter() - start

        return call


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def import_time(*, rounds: int = 5) -> dict[str, float | int]:
    """Seconds that ``import gac`` takes in a new process after ``import torch``: quantiles."""
    found = []
    for _ in range(rounds):
        done = subprocess.run([sys.executable, "-c", _IMPORT], capture_output=True, text=True, timeout=120, check=True)
        found.append(float(done.stdout))
    return {f"p{q}": quantile(found, q / 100) for q in (20, 50, 80)} | {"rounds": rounds}

"""Host time: what a hook costs per parameter, and what ``import gac`` adds to ``import torch``."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from time import perf_counter
from typing import Any

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

_HOOK = """
import json, torch
from gac.bench.host import hook_cost
print(json.dumps(hook_cost(torch.device("{device}"), rounds={rounds})))
"""


class _Many(nn.Module):
    """Many small parameters: the tensors' own work is nothing, what is left is per parameter."""

    def __init__(self, count: int, device: torch.device) -> None:
        super().__init__()
        self.items = nn.ParameterList(nn.Parameter(torch.ones(8, device=device)) for _ in range(count))

    def loss(self) -> torch.Tensor:
        return torch.stack(list(self.items)).sum()


def hook_cost(device: torch.device, *, parameters: int = 1000, rounds: int = 60) -> dict[str, float | int]:
    """Seconds of host time per parameter and backward pass that a patched model adds to its twin.

    The model is patched once, as in training; a round is a step of two contributions a branch, each beside one backward
    pass of the twin.

    Returns:
        ``hook``: the hooks alone, without the ledger's calls; ``hook_and_read``: with the bucket's kernel call and the
        contribution's end; both are medians over rounds of the mean difference within a round. ``parameters``,
        ``rounds``.
    """
    plain, patched = _Many(parameters, device), _Many(parameters, device)
    found: dict[str, list[float]] = {"hook": [], "hook_and_read": []}
    with gac.patch(patched, estimator="sketch", interval=1) as mixer:
        clock = _LedgerClock(mixer)
        for _ in range(rounds + 1):
            spent, clock.seconds = 0.0, 0.0
            for branch in (mixer.sft, mixer.sft, mixer.rl, mixer.rl):
                with branch():
                    spent += _seconds(patched, mixer.backward)
                spent -= _seconds(plain, lambda loss: (0.5 * loss).backward())
            mixer.step()
            plain.zero_grad()
            patched.zero_grad()
            found["hook_and_read"].append(spent / 4)
            found["hook"].append((spent - clock.seconds) / 4)
    # the first round warms up
    medians = {name: quantile(values[1:], 0.5) / parameters for name, values in found.items()}
    return {"parameters": parameters, "rounds": rounds} | medians


def hook_cost_alone(device: torch.device, *, rounds: int = 60, processes: int = 3) -> dict[str, float | int]:
    """:func:`hook_cost` in new processes: medians over them, and ``processes``.

    A hook is so short that it shows where its process happens to have its memory: in one that has run other benchmarks
    the same code takes half as long again.
    """
    found = [json.loads(_in_new_process(_HOOK.format(device=str(device), rounds=rounds))) for _ in range(processes)]
    medians = {name: quantile([one[name] for one in found], 0.5) for name in ("hook", "hook_and_read")}
    return found[0] | medians | {"processes": processes}


def _in_new_process(code: str) -> str:
    """What `code` prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True)
    return done.stdout


def _seconds(model: _Many, backward: Callable[[torch.Tensor], object]) -> float:
    """Of one backward pass, from an idle device."""
    loss = model.loss()
    _synchronize(loss.device)
    start = perf_counter()
    backward(loss)
    return perf_counter() - start


class _LedgerClock:
    """Host time that a mixer spends in its ledgers' calls."""

    def __init__(self, mixer: gac.Mixer) -> None:
        self.seconds = 0.0
        for ledger in mixer._observer.ledgers:
            for name in ("begin", "read", "end"):
                setattr(ledger, name, self._timed(getattr(ledger, name)))

    def _timed(self, function: Any) -> Any:
        def call(*args: Any) -> None:
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
        found.append(float(_in_new_process(_IMPORT)))
    return {f"p{q}": quantile(found, q / 100) for q in (20, 50, 80)} | {"rounds": rounds}

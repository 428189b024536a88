"""Whole-step overhead: training steps of a transformers model with and without :func:`gac.patch`, in turn.

One model and one optimizer serve all arms. A round is: patch with ``interval=2``, one step that measures (to warm up),
one that does not, one that does, unpatch, one plain step. What an interval of ``k`` adds is then
``(measured + (k - 1) * unmeasured) / k - plain``. Two figures come out of it: host time spent in GAC's code, which the
mixer counts, over the plain step; and the difference of whole steps, which is noisier and checks the first.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic, perf_counter
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

import gac
from gac.bench.inputs import free_bytes
from gac.bench.timing import quantile
from gac.plan.shapes import LlamaShape

ARMS = ("plain", "unmeasured", "measured")
INTERVALS = (1, 10)
_SEQUENCE = 1024
_MU = 0.5
_LARGE_LOGITS = 1 << 30


@dataclass(frozen=True)
class StepOptions:
    """What to run.

    Attributes:
        shape: the model.
        device, dtype: where and in what it trains.
        tokens: tokens per micro-batch, in sequences of at most 1,024.
        micro_batches: per branch and optimizer step.
        estimator: of :func:`gac.patch`. ``sequence`` measures each of the sequences.
        seconds: what to spend on rounds.
        rounds: fewest and most.
    """

    shape: LlamaShape
    device: torch.device
    dtype: torch.dtype
    tokens: int
    micro_batches: int = 2
    estimator: str = "auto"
    seconds: float = 20.0
    rounds: tuple[int, int] = (3, 30)


class Trainer:
    """A model, its optimizer and fixed random batches; steps with and without a mixer."""

    def __init__(self, options: StepOptions) -> None:
        torch.manual_seed(0)
        length = min(_SEQUENCE, options.tokens)
        self.options = options
        self.model: Any = options.shape.model(dtype=options.dtype, device=options.device, max_length=length)
        if _activation_bytes(options) > 0.4 * free_bytes(options.device):
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.model.train()
        fused = options.device.type == "cuda"
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=fused, foreach=not fused)
        size = (options.tokens // length, length)
        batches = 2 * options.micro_batches
        self.batches = [torch.randint(0, options.shape.vocabulary, size, device=options.device) for _ in range(batches)]

    def loss(self, batch: torch.Tensor) -> torch.Tensor:
        """Mean negative log-likelihood of the next token, over the number of micro-batches of the branch."""
        logits_bytes = 4 * batch.numel() * self.options.shape.vocabulary
        if logits_bytes <= _LARGE_LOGITS:
            return self.model(input_ids=batch, labels=batch).loss / self.options.micro_batches
        hidden = self.model.model(input_ids=batch).last_hidden_state[:, :-1]
        targets, part = batch[:, 1:], max(1, _SEQUENCE // len(batch))
        total = torch.zeros((), device=batch.device)
        for some, wanted in zip(hidden.split(part, dim=1), targets.split(part, dim=1), strict=True):
            total = total + checkpoint(self._summed, some, wanted, use_reentrant=False)
        return total / (targets.numel() * self.options.micro_batches)

    def _summed(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Summed loss of some positions ``[B, t]``, whose logits are taken again in the backward pass."""
        logits = self.model.lm_head(hidden).flatten(0, 1).float()
        return cross_entropy(logits, targets.flatten(), reduction="sum")

    def plain(self) -> None:
        """One optimizer step without GAC."""
        for batch in self.batches:
            (_MU * self.loss(batch)).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def mixed(self, mixer: gac.Mixer) -> None:
        """The same step with GAC."""
        half = len(self.batches) // 2
        for branch, batches in ((mixer.sft, self.batches[:half]), (mixer.rl, self.batches[half:])):
            with branch():
                for batch in batches:
                    mixer.backward(self.loss(batch))
        self.optimizer.step()
        mixer.step()
        self.optimizer.zero_grad()

    def patch(self, interval: int) -> gac.Mixer:
        """Patches the model."""
        return gac.patch(self.model, interval=interval, estimator=self.options.estimator)

    def synchronize(self) -> None:
        """Waits for the device."""
        if self.options.device.type == "cuda":
            torch.cuda.synchronize(self.options.device)


def _activation_bytes(options: StepOptions) -> int:
    """What one micro-batch's backward pass keeps, roughly: the inputs of each layer's products and activations."""
    shape = options.shape
    return options.tokens * shape.layers * (16 * shape.hidden + 6 * shape.intermediate) * options.dtype.itemsize


def run(options: StepOptions, on_found: Callable[[dict], object] = lambda found: None) -> dict:
    """Measures one configuration; the result is plain data.

    Args:
        on_found: sees it as soon as the arms are there, and with what else it has on a GPU each time that more is.
    """
    trainer = Trainer(options)
    trainer.plain()
    samples: dict[str, list[dict]] = {arm: [] for arm in ARMS}
    deadline = monotonic() + options.seconds
    while len(samples["plain"]) < options.rounds[1]:
        if len(samples["plain"]) >= options.rounds[0] and monotonic() > deadline:
            break
        _round(trainer, samples)
    result = {
        "model": options.shape.name,
        "parameters": options.shape.numel(),
        "dtype": str(options.dtype).removeprefix("torch."),
        "tokens": options.tokens,
        "micro_batches_per_branch": options.micro_batches,
        "rounds": len(samples["plain"]),
        "arms": {arm: _summary(found) for arm, found in samples.items()},
        "intervals": {str(k): _overhead(samples, k) for k in INTERVALS},
    } | _sketch_bytes(trainer)
    on_found(result)
    if options.device.type == "cuda":
        for name, look in (("synchronizations", synchronizations), ("launches", launches)):
            result[name] = look(trainer)
            on_found(result)
    return result


def _round(trainer: Trainer, samples: dict[str, list[dict]]) -> None:
    with trainer.patch(interval=2) as mixer:
        trainer.mixed(mixer)
        for arm in ("unmeasured", "measured"):
            sample = _timed(trainer, lambda: trainer.mixed(mixer))
            sample["gac"] = mixer.metrics(wait=True)["seconds"]
            samples[arm].append(sample)
    sample = _timed(trainer, trainer.plain)
    sample["gac"] = 0.0
    samples["plain"].append(sample)


def _timed(trainer: Trainer, step: Callable[[], None]) -> dict:
    """Seconds from start to finish, until the host was done, of the device; peak memory above what is held."""
    trainer.synchronize()
    cuda = trainer.options.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(trainer.options.device)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
    start = perf_counter()
    step()
    host = perf_counter() - start
    if not cuda:
        return {"wall": host, "host": host}
    end.record()
    trainer.synchronize()
    return {
        "wall": perf_counter() - start,
        "host": host,
        "device": begin.elapsed_time(end) * 1e-3,
        "peak_memory": torch.cuda.max_memory_allocated(trainer.options.device),
    }


def _summary(found: list[dict]) -> dict:
    summary: dict = {f"p{q}": quantile([s["wall"] for s in found], q / 100) for q in (20, 50, 80)}
    for key in ("host", "device", "peak_memory", "gac"):
        if key in found[0]:
            summary[key] = quantile([s[key] for s in found], 0.5)
    return summary


def _overhead(samples: dict[str, list[dict]], interval: int) -> dict:
    """Share of a step that GAC takes at an interval: by its own clock, and by whole steps (device time on a GPU)."""
    clock = "device" if "device" in samples["plain"][0] else "wall"
    step = quantile([s["wall"] for s in samples["plain"]], 0.5)
    mean = lambda key: [
        (m[key] + (interval - 1) * u[key]) / interval
        for m, u in zip(samples["measured"], samples["unmeasured"], strict=True)
    ]
    differences = [d / p[clock] - 1 for d, p in zip(mean(clock), samples["plain"], strict=True)]
    plain = [s[clock] for s in samples["plain"]]
    return {
        "seconds_in_gac": quantile(mean("gac"), 0.5),
        "share_in_gac": quantile(mean("gac"), 0.5) / step,
        "whole_step": quantile(differences, 0.5),
        "noise": (quantile(plain, 0.8) - quantile(plain, 0.2)) / quantile(plain, 0.5),
    }


def _sketch_bytes(trainer: Trainer) -> dict:
    with trainer.patch(interval=1) as mixer:
        sketches = mixer.nbytes
        estimator = mixer.estimator
        if estimator == "sequence":  # those of a batch's sequences, while it runs
            sketches += 4 * len(trainer.batches[0]) * mixer.coverage.width
    gradients = sum(p.numel() * p.element_size() for p in trainer.model.parameters())
    return {"estimator": estimator, "sketch_bytes": sketches, "gradient_bytes": gradients}


def launches(trainer: Trainer) -> dict:
    """Kernels and copies that one step starts on the GPU, in each arm, and the time of GAC's own kernels."""
    from torch.profiler import ProfilerActivity, profile

    def count(step: Callable[[], None]) -> dict:
        trainer.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as recorded:  # the host's side takes a minute to read
            step()
            trainer.synchronize()
        events = [e for e in recorded.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        kernels = [e for e in events if not e.name.startswith(("Memcpy", "Memset"))]
        own = [e for e in kernels if e.name.startswith(_own_kernels())]
        return {
            "kernels": len(kernels),
            "copies": len(events) - len(kernels),
            "gac_kernels": len(own),
            "gac_kernel_seconds": sum(e.device_time for e in own) * 1e-6,
        }

    found = {}
    with trainer.patch(interval=2) as mixer:
        trainer.mixed(mixer)
        trainer.mixed(mixer)
        found["measured"] = count(lambda: trainer.mixed(mixer))
        found["unmeasured"] = count(lambda: trainer.mixed(mixer))
    found["plain"] = count(trainer.plain)
    return found


def _own_kernels() -> tuple[str, ...]:
    from gac_kernels.triton import gather_kernel, kernels, kronecker, step_kernels

    modules = (kernels, gather_kernel, kronecker, step_kernels)
    return tuple(name for module in modules for name in vars(module) if name.endswith("_kernel"))


def synchronizations(trainer: Trainer) -> dict[str, str]:
    """``none``, or the first host synchronisation that torch reports, of a plain step and of one with GAC.

    Where the plain step itself synchronises (the model's own code), GAC is checked on its own: backward passes and
    ``mixer.step()``, with the forward passes left out.
    """
    found = {"plain": _first_sync(trainer.plain)}
    with trainer.patch(interval=1) as mixer:
        for _ in range(3):
            trainer.mixed(mixer)
        if found["plain"] == "none":
            found["gac"] = _first_sync(lambda: trainer.mixed(mixer))
            return found
        verdicts = []
        for branch in (mixer.sft, mixer.rl):
            with branch():
                for batch in trainer.batches[: trainer.options.micro_batches]:
                    loss = trainer.loss(batch)
                    verdicts.append(_first_sync(functools.partial(mixer.backward, loss)))
        verdicts.append(_first_sync(mixer.step))
        trainer.optimizer.zero_grad()
    found["gac"] = next((v for v in verdicts if v != "none"), "none") + " (backward passes and mixer.step)"
    return found


def _first_sync(step: Callable[[], object]) -> str:
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    except RuntimeError as error:
        return str(error).strip().splitlines()[0][:200]
    finally:
        torch.cuda.set_sync_debug_mode(before)
    return "none"

"""The hybrid trainer under audit: it trains bit for bit as without, and measures the truth on the way."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from gac.audit.panel import Panel, Probe, Watched
from gac.audit.record import RUN, Point, Record, three
from gac.audit.replicates import FEWEST, truth
from gac.audit.shadow import Contender, Shadows
from gac.laws.base import momentum_of
from gac.laws.rules import RuleLaw
from gac.statistics import Branch
from gac.trainers.demonstrations import EpochSampler
from gac.trainers.hybrid_grpo import HybridGRPOTrainer

_FILLED_IN_PLACE = ("_metrics", "_logs", "_pending_metrics", "_pending_extra_logs")
"""Containers of TRL's trainer that a step appends to; its other attributes are replaced."""


class AuditTrainer(HybridGRPOTrainer):
    """`HybridGRPOTrainer` that also writes down every estimator's statistics, every contender's mu, and the truth.

    At the steps ``every/2, 3*every/2, ...`` (the middles of equal stretches) it draws ``replicates`` whole optimizer
    steps at the present parameters and takes none of them. Each is made by the trainer's own `training_step`: new
    prompts from the training set, new rollouts of the present policy, the same rewards, advantages, micro-batches and
    divisors, and the demonstrations that this epoch has not seen yet, in a new order. Then it draws as many supervised
    steps from all demonstrations. Parameters, gradients, random states, data order, metrics and the mixer are as if
    nothing had happened.

    Args:
        *args, **kwargs: as for `HybridGRPOTrainer`.
        record: filled while `train` runs.
        contenders: laws to run beside the one in charge.
        every: steps between two truths.
        replicates: steps drawn for each truth.
        seed: of the drawn steps.
        on_replicate: called with the number of drawn steps so far after each.

    Raises:
        ValueError: too few replicates, a law that acts per prompt, several ranks, or rollouts that several optimizer
            steps share (steps must be independent).
    """

    def __init__(
        self,
        *args: Any,
        record: Record,
        contenders: list[Contender],
        every: int,
        replicates: int,
        seed: int = 0,
        on_replicate: Any = None,
        **kwargs: Any,
    ) -> None:
        if every < 1:
            raise ValueError(f"every must be at least 1 step, got {every}")
        if replicates < FEWEST:
            raise ValueError(f"replicates must be at least {FEWEST}, got {replicates}")
        super().__init__(*args, **kwargs)
        law = self.args.build_controller().law
        if isinstance(law, RuleLaw):
            raise ValueError(f"law {law.name!r} acts per prompt or token, not through one mu: there is none to audit")
        if self.accelerator.num_processes > 1:
            raise ValueError("an audit runs on one rank")
        if self.args.steps_per_generation != self.args.gradient_accumulation_steps or self.num_iterations != 1:
            raise ValueError(
                "an audit needs fresh rollouts in every optimizer step: leave steps_per_generation and num_iterations "
                "at their defaults"
            )
        self._observes = True  # tokens, for the coefficients
        self._record = record
        self._every = every
        self._replicates = replicates
        self._audit_seed = seed
        self._on_replicate = on_replicate
        self._drawn = 0
        self._signals = frozenset({"entropy"} | ({"kl"} if self.args.beta else set()))
        self._shadows = Shadows(contenders, self._signals)
        record.left_out = self._shadows.left_out
        self._panel: Panel | None = None

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        prepared = super()._prepare_for_training(*args, **kwargs)
        self._shadows.follow(self.optimizer)
        # a law that knows nothing of momentum is judged by what the optimizer makes of its mu all the same
        self._record.momentum = getattr(self.mixer.controller.law, "momentum", momentum_of(self.optimizer))
        self._panel = Panel(self.model, self.num_generations)
        self.mixer = Watched(self.mixer, self._panel)
        return prepared

    def _detach(self) -> None:
        super()._detach()
        if self._panel is not None:
            self._panel.remove()

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """As in training; at the first micro-step of a step whose turn it is, the truth comes first."""
        if self._step % self.current_gradient_accumulation_steps == 0:
            self._record.before_step({RUN: float(self.mixer.mu), **self._shadows.mu()})
            if self.state.global_step % self._every == self._every // 2:
                self._measure_truth(model, num_items_in_batch)
        return super().training_step(model, inputs, num_items_in_batch)

    def end_optimizer_step(self) -> None:
        statistics = self._panel.advance(self._panel.read())
        self._record.after_step(statistics)
        self._shadows.update(statistics, {name: self._mean_of_step(name) for name in self._signals})
        self._panel.clear()
        super().end_optimizer_step()

    # -- the truth ------------------------------------------------------------------------------------------------

    def _measure_truth(self, model: Any, num_items_in_batch: Any) -> None:
        step = self.state.global_step
        sft, rl, fresh = [], [], []
        draws: dict[str, list[torch.Tensor]] = {}
        drawn = self._drawn
        epoch, place = divmod(self._sft_position, self._sampler.size)
        unseen = self._sampler.take(epoch * self._sampler.size, self._sampler.size)[place:]
        with self._undisturbed():
            for number in range(self._replicates):
                seeds = [_seed(self._audit_seed, step, number, kind) for kind in range(2)]
                self._draw_step(model, num_items_in_batch, unseen, seed=seeds[0])
                gradients = self._panel.gradients()
                sft.append(gradients[Branch.SFT])
                rl.append(gradients[Branch.RL])
                for name, found in self._panel.read().items():
                    draws.setdefault(name, []).append(three(found))
                self._forget(model)
                self._draw_demonstrations(model, seed=seeds[1])
                fresh.append(self._panel.gradients()[Branch.SFT])
                self._forget(model)
                drawn += 1
                if self._on_replicate is not None:
                    self._on_replicate(drawn)
        self._drawn = drawn
        estimates = {name: torch.stack(values) for name, values in draws.items()}
        self._record.points.append(Point(step, truth(sft, rl, fresh), estimates, self._shadows.averages()))

    def _draw_step(self, model: Any, num_items_in_batch: Any, unseen: list[int], *, seed: int) -> None:
        """The gradients of one optimizer step as training could go on from here."""
        _seed_all(seed)
        chosen = torch.randperm(len(self.train_dataset))[: self.args.generation_batch_size // self.num_generations]
        rows = [self.train_dataset[i] for i in chosen.tolist() for _ in range(self.num_generations)]
        self._step = 0
        self._buffered_inputs = None
        self._sft_position = 0
        self._sampler = Continuation(unseen, self._sampler.size, seed)
        for _ in range(self.current_gradient_accumulation_steps):
            super().training_step(model, rows, num_items_in_batch)

    def _draw_demonstrations(self, model: Any, *, seed: int) -> None:
        """The gradient of one optimizer step's supervised branch, with demonstrations from the whole set."""
        _seed_all(seed)
        self._sft_position = 0
        self._sampler = EpochSampler(self._sampler.size, seed)
        self._begin_window()
        for _ in range(self.current_gradient_accumulation_steps):
            self._sft_step(model, None)
        self._micro_steps_left = 0

    def _forget(self, model: Any) -> None:
        self._panel.clear()
        model.zero_grad(set_to_none=True)

    @contextmanager
    def _undisturbed(self) -> Iterator[None]:
        """Puts everything back that a step changes: between two optimizer steps, with no gradients accumulated."""
        own = dict(vars(self))
        seen = self.state.num_input_tokens_seen
        gradients = {p: p.grad for p in self.model.parameters()}
        try:
            with _random_states(), self.mixer.aside():
                for name in _FILLED_IN_PLACE:
                    if name in own:
                        setattr(self, name, copy.deepcopy(own[name]))
                self.model.zero_grad(set_to_none=True)
                self.mixer = Probe(self._panel)
                yield
        finally:
            vars(self).clear()
            vars(self).update(own)
            self.state.num_input_tokens_seen = seen
            for parameter, gradient in gradients.items():
                parameter.grad = gradient


class Continuation:
    """An order of demonstrations: those left of an epoch, shuffled anew, then new epochs. As `EpochSampler`.

    Args:
        unseen: indices that are left.
        size: of the whole set.
        seed: of the order.
    """

    def __init__(self, unseen: Sequence[int], size: int, seed: int) -> None:
        self.size = size
        generator = torch.Generator().manual_seed(seed)
        self._unseen = [unseen[i] for i in torch.randperm(len(unseen), generator=generator).tolist()]
        self._later = EpochSampler(size, seed)

    def take(self, position: int, count: int) -> list[int]:
        """Indices at ``position, ..., position + count - 1``."""
        own = self._unseen[position : position + count]
        begin = max(0, position - len(self._unseen))
        return own + self._later.take(begin, count - len(own))


def _seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


@contextmanager
def _random_states() -> Iterator[None]:
    """Leaves the global generators as they were."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def _seed(*numbers: int) -> int:
    """One seed from several numbers, different for each."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 2)

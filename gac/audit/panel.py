"""The estimators side by side: all of them see the same backward passes and the same tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gac.observe.observer import Observer
from gac.observe.reduction import reduce_step
from gac.observe.temporal import MovingMeans, noise_from_time, take_in
from gac.observe.topology import topology_of
from gac.sequences.observer import SequenceObserver
from gac.sequences.options import SequenceOptions
from gac.sequences.reduction import SequenceReduction
from gac.statistics.branch import Branch
from gac.statistics.coefficient import CoefficientOptions, sequence_rows, statistics_from_rows
from gac.statistics.step import Statistics, statistics_from_sums
from gac.statistics.uncertainty import StandardErrors
from gac_kernels.arguments import accumulator_dtype

EXACT, SKETCH, INCOMING, TEMPORAL = "exact", "sketch", "sketch, incoming", "temporal"
SEQUENCE = "sequence"
GRADIENT_ESTIMATORS = (EXACT, SKETCH, INCOMING, TEMPORAL, SEQUENCE)
"""Estimators whose numbers are in units of a squared gradient; ``incoming`` is how DDP is read."""

COEFFICIENT, COEFFICIENT_RAW = "coefficient", "coefficient, raw"
COEFFICIENT_FORMS = {
    COEFFICIENT: CoefficientOptions(z_normalize=True, phi=True),
    "coefficient, no phi": CoefficientOptions(z_normalize=True, phi=False),
    COEFFICIENT_RAW: CoefficientOptions(z_normalize=False, phi=True),
    "coefficient, raw, no phi": CoefficientOptions(z_normalize=False, phi=False),
}
"""The paper's proxies: z-normalised as its text says, or raw as the authors' code has them."""

ESTIMATORS = (*GRADIENT_ESTIMATORS, *COEFFICIENT_FORMS)


class Panel:
    """Every estimator, watching one model. All of them count one backward pass as one contribution, as the mixer does.

    ``exact`` and both sketches are the observers that the mixer uses; ``temporal`` compares the step's whole gradients
    with moving means of the steps that were handed to :meth:`advance`; the coefficients come from the tokens.
    ``sequence`` alone counts each row of a pass, and ``generations`` neighbouring ones as one in the RL branch.

    Args:
        model: a module with plain parameters, on one rank.
        generations: rollouts of a prompt, which lie side by side.
    """

    def __init__(self, model: nn.Module, generations: int = 1) -> None:
        parameters = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.device = parameters[0][1].device
        self._dtype = accumulator_dtype(self.device)
        self._topology = topology_of(model, parameters, None)
        layouts = {EXACT: (True, False), SKETCH: (False, True), INCOMING: (False, False)}
        self._observers = {
            name: Observer(parameters, lossless=lossless, running=running, seed=0)
            for name, (lossless, running) in layouts.items()
        }
        self._sequences = SequenceObserver(model, parameters, SequenceOptions(), self._topology)
        self._sequences.group_size = generations
        self._rows: list[Tensor] = []
        self._means = [MovingMeans(ledger.device) for ledger in self._observers[EXACT].ledgers]
        self._errors = {name: StandardErrors(self.device, self._dtype) for name in ESTIMATORS}

    @contextmanager
    def branch(self, branch: Branch, weight: Tensor, tokens: float | Tensor | None) -> Iterator[None]:
        """Backward passes inside are contributions of ``branch``, whose losses carry ``weight``."""
        scale = torch.where(weight > 0, 1.0 / weight, 0.0)
        for observer in self._observers.values():
            observer.enter(branch, scale, tokens)
        self._sequences.enter(branch, scale)  # what a row counts for is not told
        failed = True
        try:
            yield
            failed = False
        finally:
            for observer in self._everyone():
                observer.leave(failed=failed)

    def observe_tokens(self, logprobs: Tensor, advantages: Tensor, mask: Tensor, is_expert: Tensor) -> None:
        """As :meth:`gac.Mixer.observe_tokens`."""
        with torch.no_grad():
            self._rows.append(sequence_rows(logprobs, advantages, mask, is_expert).to(self.device))

    # -- what a step has shown ------------------------------------------------------------------------------------

    @torch.no_grad()
    def read(self) -> dict[str, Statistics]:
        """Every estimator's statistics of the step so far."""
        found = {name: self._from_contributions(observer) for name, observer in self._observers.items()}
        exact = found[EXACT]
        ledgers = self._observers[EXACT].ledgers
        noise = {branch: noise_from_time(branch, ledgers, self._means, self.device) for branch in Branch}
        found[TEMPORAL] = dataclasses.replace(
            exact,
            sigma_s2=noise[Branch.SFT],
            sigma_r2=noise[Branch.RL],
            delta_g2=exact.distance2 - noise[Branch.SFT] - noise[Branch.RL],
        )
        found[SEQUENCE] = self._from_contributions(self._sequences)
        rows = torch.cat(self._rows) if self._rows else torch.zeros(0, 8, dtype=self._dtype, device=self.device)
        found |= {name: statistics_from_rows(rows, options) for name, options in COEFFICIENT_FORMS.items()}
        return {name: found[name] for name in ESTIMATORS}

    def gradients(self) -> dict[Branch, Tensor]:
        """The step's gradient of each branch so far, ``[P]`` in fp32 on the CPU, without the branches' weights.

        Elements stand in the sketch's order and carry its signs, the same for both branches and in every step: inner
        products are those of the gradients.
        """
        ledgers = self._observers[EXACT].ledgers
        return {branch: torch.cat([x.totals[branch].to("cpu", copy=True) for x in ledgers]) for branch in Branch}

    @torch.no_grad()
    def advance(self, statistics: dict[str, Statistics]) -> dict[str, Statistics]:
        """Ends a training step: the next one is compared with it. Returns the statistics with standard errors."""
        healthy = statistics[EXACT].nonfinite == 0
        for branch in Branch:
            take_in(branch, self._observers[EXACT].ledgers, self._means, healthy)
        return {name: self._errors[name].attach(found) for name, found in statistics.items()}

    def _from_contributions(self, observer: Observer) -> Statistics:
        """Statistics of what an observer holds, by the mixer's own reduction and formulas."""
        nothing = torch.zeros(2, dtype=self._dtype, device=self.device)
        reduce = SequenceReduction if isinstance(observer, SequenceObserver) else reduce_step
        sums = reduce(observer, self.device, self._topology, time_noise=nothing, silent=False).finish()
        return statistics_from_sums(sums)

    def clear(self) -> None:
        """Forgets the step."""
        for observer in self._everyone():
            observer.clear()
        self._sequences.step += 1
        self._sequences.measure(True)  # with new signs
        self._rows.clear()

    def remove(self) -> None:
        """Takes the hooks off the model."""
        for observer in self._everyone():
            observer.remove()

    def _everyone(self) -> list[Observer]:
        return [*self._observers.values(), self._sequences]


class Watched:
    """A mixer whose branches and tokens a panel sees too; everything else is the mixer's own."""

    def __init__(self, mixer: Any, panel: Panel) -> None:
        self._mixer = mixer
        self._panel = panel

    def __getattr__(self, name: str) -> Any:
        return getattr(self._mixer, name)

    def sft(self, *, tokens: float | Tensor | None = None) -> AbstractContextManager:
        """As :meth:`gac.Mixer.sft`."""
        return self._branch(Branch.SFT, self._mixer.sft, tokens)

    def rl(self, *, tokens: float | Tensor | None = None) -> AbstractContextManager:
        """As :meth:`gac.Mixer.rl`."""
        return self._branch(Branch.RL, self._mixer.rl, tokens)

    @contextmanager
    def _branch(self, branch: Branch, enter: Any, tokens: float | Tensor | None) -> Iterator[Watched]:
        with enter(tokens=tokens), self._panel.branch(branch, self._mixer.weight, tokens):
            yield self

    def observe_tokens(self, *coefficients: Tensor) -> None:
        """As :meth:`gac.Mixer.observe_tokens`."""
        self._panel.observe_tokens(*coefficients)
        self._mixer.observe_tokens(*coefficients)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Backward passes inside go unnoticed by the mixer; between two of its steps."""
        with self._mixer.aside():
            yield


class Probe:
    """Stands in for a mixer in steps that are drawn to be measured, not to be taken: a panel alone sees them.

    Both branches weigh one half, which scales without rounding.
    """

    def __init__(self, panel: Panel) -> None:
        self._panel = panel
        self.weight = torch.full((), 0.5, device=panel.device)

    def sft(self, *, tokens: float | Tensor | None = None) -> AbstractContextManager:
        """As :meth:`gac.Mixer.sft`."""
        return self._panel.branch(Branch.SFT, self.weight, tokens)

    def rl(self, *, tokens: float | Tensor | None = None) -> AbstractContextManager:
        """As :meth:`gac.Mixer.rl`."""
        return self._panel.branch(Branch.RL, self.weight, tokens)

    def weigh(self, loss: Tensor) -> Tensor:
        """As :meth:`gac.Mixer.weigh`."""
        return self.weight * loss

    def observe_tokens(self, *coefficients: Tensor) -> None:
        """As :meth:`gac.Mixer.observe_tokens`."""
        self._panel.observe_tokens(*coefficients)

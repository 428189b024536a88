"""The estimators side by side: all of them see the same backward passes and the same tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gac.observe.observer import Observer
from gac.observe.temporal import MovingMeans
from gac.statistics import Branch, Statistics, contribution_statistics, noise_from_weighted
from gac.statistics.coefficient import CoefficientOptions, sequence_rows, statistics_from_rows
from gac.statistics.uncertainty import SuccessiveDifferences
from gac_kernels import pair_moments
from gac_kernels.arguments import accumulator_dtype

EXACT, SKETCH, INCOMING, TEMPORAL = "exact", "sketch", "sketch, incoming", "temporal"
GRADIENT_ESTIMATORS = (EXACT, SKETCH, INCOMING, TEMPORAL)
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

_READ = ("sigma_s2", "sigma_r2", "distance2", "delta_g2")


class Panel:
    """Every estimator, watching one model. All of them count one backward pass as one contribution, as the mixer does.

    ``exact`` and both sketches are the observers that the mixer uses; ``temporal`` compares the step's whole gradients
    with moving means of the steps that were handed to :meth:`advance`; the coefficients come from the tokens.

    Args:
        model: a module with plain parameters, on one rank.
    """

    def __init__(self, model: nn.Module) -> None:
        parameters = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.device = parameters[0][1].device
        self._dtype = accumulator_dtype(self.device)
        layouts = {EXACT: (True, False), SKETCH: (False, True), INCOMING: (False, False)}
        self._observers = {
            name: Observer(parameters, lossless=lossless, running=running, seed=0)
            for name, (lossless, running) in layouts.items()
        }
        self._rows: list[Tensor] = []
        self._means = [MovingMeans(ledger.device) for ledger in self._observers[EXACT].ledgers]
        self._uncertainty = {name: SuccessiveDifferences(len(_READ), self.device, self._dtype) for name in ESTIMATORS}

    @contextmanager
    def branch(self, branch: Branch, weight: Tensor, tokens: float | Tensor | None) -> Iterator[None]:
        """Backward passes inside are contributions of ``branch``, whose losses carry ``weight``."""
        scale = torch.where(weight > 0, 1.0 / weight, 0.0)
        for observer in self._observers.values():
            observer.enter(branch, scale, tokens)
        failed = True
        try:
            yield
            failed = False
        finally:
            for observer in self._observers.values():
                observer.leave(failed=failed)

    def observe_tokens(self, logprobs: Tensor, advantages: Tensor, mask: Tensor, is_expert: Tensor) -> None:
        """As :meth:`gac.Mixer.observe_tokens`."""
        with torch.no_grad():
            self._rows.append(sequence_rows(logprobs, advantages, mask, is_expert).to(self.device))

    # -- what a step has shown ------------------------------------------------------------------------------------

    @torch.no_grad()
    def read(self) -> dict[str, Statistics]:
        """Every estimator's statistics of the step so far."""
        found = {name: _from_contributions(observer, self.device) for name, observer in self._observers.items()}
        exact = found[EXACT]
        noise = {branch: self._noise_from_time(branch) for branch in Branch}
        found[TEMPORAL] = dataclasses.replace(
            exact,
            sigma_s2=noise[Branch.SFT],
            sigma_r2=noise[Branch.RL],
            delta_g2=exact.distance2 - noise[Branch.SFT] - noise[Branch.RL],
        )
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
        for ledger, means in zip(self._observers[EXACT].ledgers, self._means, strict=True):
            for branch in Branch:
                means.update(branch, ledger.totals[branch], healthy.to(ledger.device))
        return {name: self._with_errors(name, found) for name, found in statistics.items()}

    def _with_errors(self, name: str, found: Statistics) -> Statistics:
        values = torch.stack([getattr(found, field) for field in _READ])
        errors = self._uncertainty[name].update(values, found.nonfinite == 0).unbind()
        return dataclasses.replace(found, **{f"{field}_se": e for field, e in zip(_READ, errors, strict=True)})

    def _noise_from_time(self, branch: Branch) -> Tensor:
        ledgers = self._observers[EXACT].ledgers
        parts = [means.noise(branch, x.totals[branch]) for x, means in zip(ledgers, self._means, strict=True)]
        return torch.stack([part.to(self.device) for part in parts]).sum()

    def clear(self) -> None:
        """Forgets the step."""
        for observer in self._observers.values():
            observer.clear()
        self._rows.clear()

    def remove(self) -> None:
        """Takes the hooks off the model."""
        for observer in self._observers.values():
            observer.remove()


def _from_contributions(observer: Observer, device: torch.device) -> Statistics:
    """Statistics of what an observer holds, by the mixer's formulas."""
    ledgers = observer.ledgers
    over_ledgers = lambda numbers: torch.stack([number.to(device) for number in numbers]).sum(0)
    powers = over_ledgers(ledger.powers() for ledger in ledgers)
    inner = [pair_moments(ledger.totals[Branch.SFT], ledger.totals[Branch.RL]) for ledger in ledgers]
    norm_s2, norm_r2, dot = over_ledgers(inner).to(powers.dtype).unbind()
    noise, count = {}, {}
    for branch, norm2 in zip(Branch, (norm_s2, norm_r2), strict=True):
        own = [k for k, c in enumerate(observer.contributions) if c.branch is branch]
        tokens = torch.tensor(
            [1.0 if (t := observer.contributions[k].tokens) is None else float(t) for k in own],
            dtype=powers.dtype,
            device=device,
        )
        counted = tokens > 0
        weighted = torch.where(counted, powers[own] / tokens, 0.0).sum() * tokens.sum()
        count[branch] = counted.sum().to(powers.dtype)
        noise[branch] = noise_from_weighted(weighted, norm2, count[branch])
    return contribution_statistics(
        sigma_s2=noise[Branch.SFT],
        sigma_r2=noise[Branch.RL],
        norm_s2=norm_s2,
        norm_r2=norm_r2,
        dot=dot,
        n_s=count[Branch.SFT],
        n_r=count[Branch.RL],
        nonfinite=over_ledgers(ledger.nonfinite() for ledger in ledgers) + float(observer.broken),
    )


class Watched:
    """A mixer whose branches and tokens a panel sees too; everything else is the mixer's own."""

    def __init__(self, mixer: Any, panel: Panel) -> None:
        self._mixer = mixer
        self._panel = panel

    def __getattr__(self, name: str) -> Any:
        return getattr(self._mixer, name)

    def sft(self, *, tokens: float | Tensor | None = None):
        """As :meth:`gac.Mixer.sft`."""
        return self._branch(Branch.SFT, self._mixer.sft, tokens)

    def rl(self, *, tokens: float | Tensor | None = None):
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
        observer = self._mixer._observer
        observer.outside = True
        try:
            yield
        finally:
            observer.outside = False


class Probe:
    """Stands in for a mixer in steps that are drawn to be measured, not to be taken: a panel alone sees them.

    Both branches weigh one half, which scales without rounding.
    """

    def __init__(self, panel: Panel) -> None:
        self._panel = panel
        self.weight = torch.full((), 0.5, device=panel.device)

    def sft(self, *, tokens: float | Tensor | None = None):
        """As :meth:`gac.Mixer.sft`."""
        return self._panel.branch(Branch.SFT, self.weight, tokens)

    def rl(self, *, tokens: float | Tensor | None = None):
        """As :meth:`gac.Mixer.rl`."""
        return self._panel.branch(Branch.RL, self.weight, tokens)

    def observe_tokens(self, *coefficients: Tensor) -> None:
        """As :meth:`gac.Mixer.observe_tokens`."""
        self._panel.observe_tokens(*coefficients)

"""The interface of a law, its registry, and the guardrails that laws share."""

from __future__ import annotations

import difflib
import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any, ClassVar

import torch
from torch import Tensor

from gac.laws.momentum import momentum_of as momentum_of
from gac.laws.momentum import noise_left as noise_left
from gac.schedules import Schedule
from gac.state import Range
from gac.statistics import Statistics
from gac.statistics.worth import Worth

_LAWS: dict[str, type[Law]] = {}
_ALIASES: dict[str, str] = {}


@dataclass(frozen=True)
class Step:
    """What a law is told of the optimizer step just done, besides its statistics.

    Attributes:
        number: of the step, from 0.
        prior, alpha: replace the law's own in this step where given.
        kl: mean KL divergence per token of the policy from its reference, in nats.
        entropy: mean entropy per token of the policy, in nats.
        worth: what steps were worth, where it was measured.
    """

    number: int
    prior: float | Tensor | None = None
    alpha: float | Tensor | None = None
    kl: float | Tensor | None = None
    entropy: float | Tensor | None = None
    worth: Worth | None = None


class Law(ABC):
    """A rule for mu. Its state is a dictionary of float64 tensors on the statistics' device.

    Every law's state has ``mu``, the estimate ``raw`` before prior and guardrails, its standard error ``mu_se`` and the
    ``prior``; NaN where the law has none.

    A law sees the statistics of a step (or None where none were measured) and returns the mu of the next step. It
    never reads a device value on the host: what depends on the statistics is decided by ``torch.where``.
    """

    name: ClassVar[str]
    needs: ClassVar[tuple[str, ...]] = ()
    """Fields of :class:`Step` that every update must bring, such as ``"kl"``."""
    needs_trainer: ClassVar[bool] = False
    """Whether a trainer has to carry out a part of the law that acts per prompt or token."""
    measures_worth: ClassVar[bool] = False
    """Whether :attr:`Step.worth` is to be measured for it, where the estimator can."""
    shows: ClassVar[tuple[str, ...]] = ()
    """Entries of its state that the metrics show besides, by these names."""
    ranges: ClassVar[Mapping[str, Range]] = {
        "mu": Range(0.0, 1.0),
        "raw": Range(-math.inf, math.inf, unknown=True),
        "mu_se": Range(0.0, math.inf, unknown=True),
        "prior": Range(0.0, 1.0, unknown=True),
    }
    """What a saved state may hold under these names; a subclass declares those of its own entries alone.

    What no class declares must be finite, or NaN where the law begins with NaN.
    """

    def __init__(self, start: float) -> None:
        self.start = unit_interval("start", start)
        self.state: dict[str, Tensor] = {"mu": torch.tensor(self.start, dtype=torch.float64)}
        for name in ("raw", "mu_se", "prior"):
            self.record(name, float("nan"))

    @classmethod
    def range_of(cls, name: str) -> Range | None:
        """What the class, or the nearest one that it is derived from, declares of an entry of the state."""
        declared = (vars(kind).get("ranges", {}) for kind in cls.__mro__)
        return next((ranges[name] for ranges in declared if name in ranges), None)

    @property
    def mu(self) -> Tensor:
        """The current weight of the SFT branch, 0-dim."""
        return self.state["mu"]

    def record(self, name: str, value: float | Tensor) -> None:
        """Keeps a 0-dim number in the state, for the next step or for the metrics."""
        self.state[name] = value if isinstance(value, Tensor) else self.beside(value)

    def beside(self, value: float | Tensor) -> Tensor:
        """A number in the state's dtype and on its device; the host waits for nothing."""
        mu = self.mu
        if isinstance(value, Tensor):
            return value.detach().to(device=mu.device, dtype=mu.dtype, non_blocking=True)
        return torch.full((), float(value), dtype=mu.dtype, device=mu.device)

    def leaning(self, step: Step, schedule: Schedule | None, number: int) -> Tensor | None:
        """The prior of this update, 0-dim and recorded: that of ``step``, else ``schedule(number)``, else None.

        A tensor is clipped to [0, 1], and counts as the present mu where it is not finite.
        """
        prior = step.prior
        if prior is None and schedule is not None:
            prior = schedule(number)
        if prior is None:
            self.record("prior", float("nan"))
            return None
        if isinstance(prior, Tensor):
            prior = self.beside(prior)
            prior = torch.where(torch.isfinite(prior), prior.clamp(0.0, 1.0), self.mu)
        self.record("prior", prior)
        return self.state["prior"]

    def to(self, device: torch.device) -> None:
        """Moves the state; only the first update ever finds it elsewhere."""
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self.state = {k: v.to(device=device, dtype=dtype, non_blocking=True) for k, v in self.state.items()}

    def follow(self, optimizer: torch.optim.Optimizer) -> None:  # noqa: B027 - most laws do not mind
        """Tells the law which optimizer takes its steps, once, before training."""

    @abstractmethod
    def update(self, statistics: Statistics | None, step: Step) -> Tensor:
        """The next mu, 0-dim."""


def register(name: str, *aliases: str) -> Callable[[type[Law]], type[Law]]:
    """Class decorator that makes a law available as ``law=name``."""

    def decorate(cls: type[Law]) -> type[Law]:
        cls.name = name
        _LAWS[name] = cls
        _ALIASES.update(dict.fromkeys(aliases, name))
        return cls

    return decorate


def unregister(name: str) -> None:
    """Takes a law and its aliases out of the registry; a name that it does not know is no error."""
    _LAWS.pop(name, None)
    for alias in [alias for alias, meant in _ALIASES.items() if meant == name]:
        del _ALIASES[alias]


def available() -> tuple[str, ...]:
    """Names of the laws."""
    return tuple(sorted(_LAWS))


def kind_of(name: str) -> type[Law]:
    """The class of a law, by its name or an alias. Raises ValueError for an unknown one, which says what is known."""
    cls = _LAWS.get(_ALIASES.get(name, name))
    if cls is None:
        close = difflib.get_close_matches(str(name), [*_LAWS, *_ALIASES], n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"unknown law {name!r}; known: {', '.join(available())}.{hint}")
    return cls


def create(name: str, **options: Any) -> Law:
    """Builds a law.

    Raises ValueError for an unknown name or a value out of range, TypeError for an option that the law lacks; both
    name what is known.
    """
    cls = kind_of(name)
    known = list(inspect.signature(cls).parameters)
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise TypeError(f"law {cls.name!r} has no option {', '.join(unknown)}; it has: {', '.join(known)}")
    return cls(**options)


def number(name: str, value: float, low: float, high: float) -> float:
    """``value`` as a float in ``[low, high]``, or an error with the argument's name."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not low <= value <= high:
        raise ValueError(f"{name} must be in [{low:g}, {high:g}], got {value}")
    return float(value)


def unit_interval(name: str, value: float) -> float:
    """``value`` as a float in [0, 1]."""
    return number(name, value, 0.0, 1.0)


def whole(name: str, value: float, low: int, high: int = 10**9) -> int:
    """``value`` as an int in ``[low, high]``, or an error with the argument's name."""
    if number(name, value, low, high) != int(value):
        raise ValueError(f"{name} must be a whole number, got {value}")
    return int(value)


def bounds(mu_min: float, mu_max: float, **start: float) -> tuple[float, float]:
    """The checked bounds of mu. ``start`` is the first mu, under the name of its option: it must lie between them."""
    low, high = unit_interval("mu_min", mu_min), unit_interval("mu_max", mu_max)
    if low > high:
        raise ValueError(f"mu_min must not exceed mu_max, got {mu_min} > {mu_max}")
    for name, value in start.items():
        if not low <= unit_interval(name, value) <= high:
            raise ValueError(f"{name} must be in [mu_min, mu_max] = [{mu_min}, {mu_max}], got {value}")
    return low, high


def closed_form(
    sigma_s2: Tensor, sigma_r2: Tensor, delta_g2: Tensor, alpha: float | Tensor, *, epsilon: float = 0.0
) -> Tensor:
    """The mu of least mean squared error, ``(alpha*delta_g2 + sigma_r2) / (delta_g2 + sigma_s2 + sigma_r2)``.

    From ``(mu-alpha)^2*delta_g2 + mu^2*sigma_s2 + (1-mu)^2*sigma_r2`` (GAC, arXiv 2605.26184). The three numbers must
    not be negative. NaN when all are 0 (every mu is then as good), unless ``epsilon`` is added to the denominator.
    """
    return (alpha * delta_g2 + sigma_r2) / (delta_g2 + sigma_s2 + sigma_r2 + epsilon)

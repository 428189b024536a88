"""Where the mix stands in a report: mu and, under laws that measure it, the aim, each with its standard error."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from gac.report.estimates import Estimate, digits


@dataclass(frozen=True)
class Mix:
    """The newest numbers of a law; NaN where it has none.

    Attributes:
        mu: weight of the SFT branch.
        mu_raw, mu_se: the law's estimate of it before prior and guardrails, and its standard error.
        alpha, alpha_se: the SFT gradient's share of the wanted direction, where the law tells it.
        share: of SFT in the steps to come, where the law weighs branches by their gradients' lengths.
        sft_weight, sft_weight_se: mean weight of the step's demonstrations, where something weighs them.
    """

    mu: float
    mu_raw: float = math.nan
    mu_se: float = math.nan
    alpha: float = math.nan
    alpha_se: float = math.nan
    share: float = math.nan
    sft_weight: float = math.nan
    sft_weight_se: float = math.nan

    @classmethod
    def of(cls, told: Mapping[str, Any], prefix: str = "") -> Mix | None:
        """From a mixer's metrics, or from a line of a run's (``prefix="gac/"``); None where they have no mu."""
        found = {f.name: told.get(prefix + f.name) for f in fields(cls)}
        numbers = {name: float(value) for name, value in found.items() if isinstance(value, (int, float))}
        return cls(**numbers) if math.isfinite(numbers.get("mu", math.nan)) else None

    def sentence(self) -> str:
        """What the law has decided, and how surely."""
        text = f"The SFT branch has the weight mu = {digits(self.mu, 3)}"
        if math.isfinite(self.mu_raw):
            text += f"; the law's estimate is {_text(self.mu_raw, self.mu_se)}"
        if math.isfinite(self.alpha):
            text += f", its aim alpha = {_text(self.alpha, self.alpha_se)} of the SFT gradient"
        if math.isfinite(self.share):
            text += f", at lengths that make {digits(100 * self.share, 2)}% of a step SFT's"
        if math.isfinite(self.sft_weight):
            text += f"; demonstrations weigh {_text(self.sft_weight, self.sft_weight_se)}"
        return text + "."

    def as_json(self) -> dict[str, float | None]:
        """What :mod:`json` takes; None for NaN."""
        return {name: value if math.isfinite(value) else None for name, value in asdict(self).items()}

    @classmethod
    def from_json(cls, found: Mapping[str, float | None]) -> Mix:
        """What :meth:`as_json` gave."""
        return cls(**{name: math.nan if value is None else value for name, value in found.items()})


def _text(value: float, error: float) -> str:
    """Three digits behind the point at most: nobody acts on more."""
    return digits(value, 3) if error < 0.0005 else Estimate(value, error).text()

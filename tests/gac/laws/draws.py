"""Statistics of simulated steps: what Gaussian contributions of known noise and disagreement would give."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

import gac

FIELDS = ("sigma_s2", "sigma_r2", "delta_g2", "distance2", "sigma_s2_se", "sigma_r2_se", "distance2_se")


@dataclass(frozen=True)
class Truth:
    """The three numbers, noise spread evenly over ``directions`` of the gradient, and ``n`` contributions a branch."""

    sigma_s2: float
    sigma_r2: float
    delta_g2: float
    directions: int
    n: int = 4

    @property
    def distance2(self) -> float:
        return self.sigma_s2 + self.sigma_r2 + self.delta_g2

    def mu(self, alpha: float = 0.5) -> float:
        """The mu of least expected error."""
        return (alpha * self.delta_g2 + self.sigma_r2) / self.distance2

    def error(self, mu: float, alpha: float = 0.5) -> float:
        """Mean squared error of the mixed gradient; that of another mu' is larger by ``(mu' - mu)^2 * distance2``."""
        return (mu - alpha) ** 2 * self.delta_g2 + mu**2 * self.sigma_s2 + (1 - mu) ** 2 * self.sigma_r2

    def draw(self, *shape: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Independent steps, each number of the given shape, float64; standard errors as a step would estimate them.

        ``sigma_b2`` is chi-square with ``(n-1) * directions`` degrees of freedom; ``distance2``, of the variance
        ``q = (sigma_s2 + sigma_r2) / directions`` in each direction, non-central chi-square with ``directions``.
        """

        def chi_square(degrees: int) -> Tensor:
            half = torch.full(shape, degrees / 2, dtype=torch.float64)
            return 2 * torch._standard_gamma(half, generator=generator) if degrees else torch.zeros_like(half)

        degrees = (self.n - 1) * self.directions
        sigma_s2 = self.sigma_s2 * chi_square(degrees) / degrees
        sigma_r2 = self.sigma_r2 * chi_square(degrees) / degrees
        q = (self.sigma_s2 + self.sigma_r2) / self.directions
        along = torch.randn(shape, generator=generator, dtype=torch.float64) + math.sqrt(self.delta_g2 / q)
        distance2 = q * (along.square() + chi_square(self.directions - 1))
        delta_g2 = distance2 - sigma_s2 - sigma_r2
        q_hat = (sigma_s2 + sigma_r2) / self.directions
        relative = math.sqrt(2 / degrees)
        distance2_se = (2 * q_hat.square() * self.directions + 4 * q_hat * delta_g2.clamp(min=0)).sqrt()
        values = (sigma_s2, sigma_r2, delta_g2, distance2, relative * sigma_s2, relative * sigma_r2, distance2_se)
        return dict(zip(FIELDS, values, strict=True))


def estimates(truth: Truth, runs: int, steps: int, *, seed: int = 0, **options) -> tuple[Tensor, Tensor]:
    """``[runs, steps]`` estimates of law ``gac`` and their standard errors, each run on its own draws."""
    drawn = truth.draw(runs, steps, generator=torch.Generator().manual_seed(seed))
    states = side_by_side("gac", drawn, **options)
    return torch.stack([state["raw"] for state in states], 1), torch.stack([state["mu_se"] for state in states], 1)


def side_by_side(law: str, told: dict[str, Tensor], **options) -> list[dict[str, Tensor]]:
    """The law's state after each step of many runs, which go through its ``update`` together.

    Args:
        told: statistics by name, ``[runs, steps]``.

    Returns:
        Of each step the state's entries, ``[runs, ...]``.
    """
    controller = gac.Controller(law, **options)

    def update(state: dict[str, Tensor], values: dict[str, Tensor]) -> dict[str, Tensor]:
        controller.law.state = dict(state)
        controller.update(gac.Statistics(**values))
        return controller.law.state

    runs, steps = next(iter(told.values())).shape
    state = {name: value.expand(runs, *value.shape) for name, value in controller.law.state.items()}
    found = []
    for step in range(steps):
        state = torch.vmap(update)(state, {name: value[:, step] for name, value in told.items()})
        found.append(state)
    return found

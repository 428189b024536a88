"""Gradients of steps with a known truth, and records made of them."""

from __future__ import annotations

import torch

from gac.audit.panel import ESTIMATORS
from gac.audit.record import RUN, Point, Record
from gac.audit.replicates import truth

DIMENSIONS = 24
SCALES_S = torch.linspace(0.2, 1.5, DIMENSIONS, dtype=torch.float64)
SCALES_R = torch.linspace(2.0, 0.1, DIMENSIONS, dtype=torch.float64)
MEAN_S = 0.5 * torch.sin(torch.arange(DIMENSIONS, dtype=torch.float64))
MEAN_R = 0.5 * torch.cos(torch.arange(DIMENSIONS, dtype=torch.float64))
TRUE = torch.stack([SCALES_S.square().sum(), SCALES_R.square().sum(), (MEAN_S - MEAN_R).square().sum()])
"""sigma_s2, sigma_r2, delta_g2 of the distribution that `draw` draws from."""


def draw(count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """``[count, D]`` of both branches; the noise of a branch is far from isotropic."""
    noise = torch.randn(2, count, DIMENSIONS, generator=generator, dtype=torch.float64)
    return MEAN_S + SCALES_S * noise[0], MEAN_R + SCALES_R * noise[1]


def record(mu: dict[str, list[float]], *, points: int = 4, replicates: int = 12, scale: float = 1.0) -> Record:
    """A record of one step for each point, whose estimators all estimate without bias.

    Args:
        mu: for each law its mu in each step; the first one's is that of the run.
        scale: of the coefficients, which live in a unit of their own.
    """
    generator = torch.Generator().manual_seed(5)
    made = Record(alpha=0.5)
    made.mu = {RUN: next(iter(mu.values())), **mu}
    spread = 0.1 * TRUE
    for step in range(points):
        draws = {
            name: (TRUE + spread * torch.randn(replicates, 3, generator=generator, dtype=torch.float64))
            * (scale if name.startswith("coefficient") else 1.0)
            for name in ESTIMATORS
        }
        found = truth(*draw(replicates, generator))
        made.points.append(Point(step, found, draws, {name: x.mean(0) for name, x in draws.items()}))
        for name, x in draws.items():
            made.estimates[name].append(x[0].tolist())
        made.errors.append(spread.tolist())
    return made

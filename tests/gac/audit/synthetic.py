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
SHIFT = 0.3 * torch.cos(2 + torch.arange(DIMENSIONS, dtype=torch.float64))
"""Of the demonstrations that training has not seen for long, against the whole set."""


def true_values(shift: bool) -> torch.Tensor:
    """``[4]``: what `draw` draws from, in the order of `TRUE_COLUMNS`."""
    bias = SHIFT if shift else 0 * SHIFT
    difference = MEAN_S - MEAN_R
    noise = SCALES_S.square().sum() + bias.square().sum()
    return torch.stack([noise, SCALES_R.square().sum(), difference.square().sum(), bias @ difference])


TRUE = true_values(shift=False)[:3]
"""sigma_s2, sigma_r2, delta_g2 without a shift."""


def draw(count: int, generator: torch.Generator, shift: bool = False) -> tuple[torch.Tensor, ...]:
    """``[count, D]`` of steps' SFT and RL gradients and of fresh SFT gradients; the noise is far from isotropic."""
    noise = torch.randn(3, count, DIMENSIONS, generator=generator, dtype=torch.float64)
    step = MEAN_S + SCALES_S * noise[0] + (SHIFT if shift else 0.0)
    return step, MEAN_R + SCALES_R * noise[1], MEAN_S + SCALES_S * noise[2]


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

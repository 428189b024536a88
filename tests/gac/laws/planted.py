"""Situations whose right answer any user knows, as data, and a law's answers in them.

The gradients of both branches are drawn: a mean, which is the truth, and noise that is spread evenly over
:data:`DIRECTIONS` directions, in :data:`CONTRIBUTIONS` contributions a step. The mean of the RL branch is the direction
in which the reward rises. A law sees what a mixer would measure of them, in every step.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

import gac
from gac.fused import law as fused_law
from gac.fused.state import numbers_of
from gac.fused.statistics import UNMEASURED
from gac.laws.base import Step, create
from gac.observe.temporal import DECAY
from gac.statistics.uncertainty import SuccessiveDifferences
from gac.statistics.worth import WORTH, Worth

Rows = list[dict[str, float]]
"""What was measured in each step."""

DIRECTIONS, CONTRIBUTIONS = 100, 4
MOMENTUM = 0.9
"""Of the optimizer, as Adam has it."""


@dataclass(frozen=True)
class Source:
    """The gradients of a branch.

    Attributes:
        cosine: of its mean with the direction in which the reward rises.
        signal, noise: length of the mean; root mean square length of a step's noise.
        unit: what its loss is multiplied by.
        halves: steps in which both lengths halve, from the phase's beginning; 0: they stay.
        noise_stays: whether ``halves`` leaves the noise as it is.
        absent: the branch has no data.
    """

    cosine: float = 1.0
    signal: float = 1.0
    noise: float = 2.0
    unit: float = 1.0
    halves: float = 0.0
    noise_stays: bool = False
    absent: bool = False

    def lengths(self, step: int) -> tuple[float, float]:
        """Of mean and noise in a step of the phase, without the unit."""
        left = 0.5 ** (step / self.halves) if self.halves else 1.0
        return self.signal * left, self.noise * (1.0 if self.noise_stays else left)


@dataclass(frozen=True)
class Phase:
    """So many steps with the same sources."""

    steps: int
    sft: Source
    rl: Source = Source()


@dataclass(frozen=True)
class Wanted:
    """Bounds of SFT's share after so many steps, the units of both losses divided out."""

    after: int
    low: float = 0.0
    high: float = 1.0


@dataclass(frozen=True)
class Situation:
    """Phases and the answers that are wanted of a law.

    Attributes:
        story: what it is, for readers.
        felt: the share is that of the update: weights times the present lengths of the gradients.
    """

    story: str
    phases: tuple[Phase, ...]
    wanted: tuple[Wanted, ...]
    felt: bool = False


TEACHER = Source(cosine=0.5)
"""Demonstrations that are right: they move the reward up, and more than that."""
_OPPOSED, _BESIDE, _NOISE = replace(TEACHER, cosine=-0.5), replace(TEACHER, cosine=0.0), replace(TEACHER, signal=0.0)
_BOTH = {"low": 0.3, "high": 0.7}

SITUATIONS: dict[str, Situation] = {
    "rl-silent": Situation(
        "RL gradient 0 (all advantages 0) from step 60 to 120",
        (Phase(60, TEACHER), Phase(60, TEACHER, Source(signal=0.0, noise=0.0)), Phase(70, TEACHER)),
        (Wanted(120, low=0.8), Wanted(190, **_BOTH)),
    ),
    "rl-noise-a-while": Situation(
        "RL gradient pure noise from step 60 to 160",
        (Phase(60, TEACHER), Phase(100, TEACHER, _NOISE), Phase(70, TEACHER)),
        (Wanted(160, low=0.75), Wanted(230, **_BOTH)),
    ),
    "rl-noise": Situation("RL gradient pure noise", (Phase(150, TEACHER, _NOISE),), (Wanted(150, low=0.75),)),
    "sft-noise": Situation("SFT gradient pure noise", (Phase(150, _NOISE),), (Wanted(150, high=0.25),)),
    "sft-beside": Situation(
        "SFT at right angles to the reward (labels that mean nothing)",
        (Phase(200, _BESIDE),),
        (Wanted(200, high=0.25),),
    ),
    "sft-opposed": Situation("SFT opposed to the reward", (Phase(150, _OPPOSED),), (Wanted(150, high=0.15),)),
    "teacher": Situation("SFT right", (Phase(150, TEACHER),), (Wanted(150, **_BOTH),)),
    "weak-teacher": Situation(
        "SFT right, and mostly about something else (cosine .15)",
        (Phase(200, replace(TEACHER, cosine=0.15)),),
        (Wanted(200, **_BOTH),),
    ),
    "quiet-teacher": Situation(
        "SFT right, signals 1 in 5 of the noise's length",
        (Phase(200, replace(TEACHER, noise=5.0), Source(noise=5.0)),),
        (Wanted(200, **_BOTH),),
    ),
    "quiet-opposed": Situation(
        "SFT opposed, signals 1 in 5 of the noise's length",
        (Phase(200, replace(_OPPOSED, noise=5.0), Source(noise=5.0)),),
        (Wanted(200, high=0.15),),
    ),
    "faint": Situation(
        "SFT right, signals 1 in 20 of the noise's length",
        (Phase(200, replace(TEACHER, noise=20.0), Source(noise=20.0)),),
        (Wanted(200, low=0.2, high=0.7),),
    ),
    "faint-rl": Situation(
        "RL's signal 1 in 20 of the noise's length, SFT clear and opposed",
        (Phase(200, _OPPOSED, Source(noise=20.0)),),
        (Wanted(200, high=0.7),),
        felt=True,
    ),
    "same": Situation("both the same", (Phase(150, Source()),), (Wanted(150, low=0.4, high=0.6),)),
    "same-rl-noisier": Situation(
        "both the same, RL with 4 times the noise",
        (Phase(150, Source(), Source(noise=8.0)),),
        (Wanted(150, low=0.75),),
    ),
    "unit-100": Situation("SFT loss times 100", (Phase(150, replace(TEACHER, unit=100.0)),), (Wanted(150, **_BOTH),)),
    "unit-0.01": Situation(
        "SFT loss times a hundredth", (Phase(150, replace(TEACHER, unit=0.01)),), (Wanted(150, **_BOTH),)
    ),
    "learned": Situation(
        "demonstrations are learned: their gradient halves every 20 steps, noise and all",
        (Phase(40, TEACHER), Phase(160, replace(TEACHER, halves=20.0))),
        (Wanted(200, high=0.25),),
        felt=True,
    ),
    "learned-noise-stays": Situation(
        "demonstrations are learned: their mean halves every 20 steps, the noise stays",
        (Phase(40, TEACHER), Phase(160, replace(TEACHER, halves=20.0, noise_stays=True))),
        (Wanted(200, high=0.3),),
    ),
    "sft-returns": Situation(
        "SFT has no data from step 60 to 140",
        (Phase(60, TEACHER), Phase(80, replace(TEACHER, absent=True)), Phase(70, TEACHER)),
        (Wanted(140, low=0.2, high=0.8), Wanted(150, **_BOTH), Wanted(210, **_BOTH)),
    ),
    "turns-wrong": Situation(
        "SFT right, from step 120 on opposed",
        (Phase(120, TEACHER), Phase(70, _OPPOSED)),
        (Wanted(120, **_BOTH), Wanted(190, high=0.15)),
    ),
    "turns-useless": Situation(
        "SFT right, from step 120 on at right angles",
        (Phase(120, TEACHER), Phase(100, _BESIDE)),
        (Wanted(120, **_BOTH), Wanted(220, high=0.3)),
    ),
    "turns-right": Situation(
        "SFT opposed, from step 120 on right",
        (Phase(120, _OPPOSED), Phase(70, TEACHER)),
        (Wanted(120, high=0.15), Wanted(190, **_BOTH)),
    ),
}


def _draw(phases: tuple[Phase, ...], branch: str, rng: np.random.Generator) -> np.ndarray:
    """``[steps, contributions, directions]``; NaN where the branch is absent."""
    found = []
    for phase in phases:
        source: Source = getattr(phase, branch)
        lengths = np.array([source.lengths(step) for step in range(phase.steps)])[:, :, None, None]
        mean = np.zeros(DIRECTIONS)
        mean[:2] = source.cosine, np.sqrt(1 - source.cosine**2)
        noise = rng.standard_normal((phase.steps, CONTRIBUTIONS, DIRECTIONS)) * np.sqrt(CONTRIBUTIONS / DIRECTIONS)
        drawn = source.unit * (lengths[:, 0] * mean + lengths[:, 1] * noise) / CONTRIBUTIONS
        found.append(np.full_like(drawn, np.nan) if source.absent else drawn)
    return np.concatenate(found)


@functools.cache
def measured(name: str, seed: int) -> Rows:
    """What a mixer would measure in each step: fields of :class:`gac.Statistics`, and :data:`WORTH`."""
    rng = np.random.default_rng(seed)
    x = {branch: _draw(SITUATIONS[name].phases, branch, rng) for branch in ("sft", "rl")}
    total = {branch: values.sum(1) for branch, values in x.items()}
    product = lambda a, b: np.einsum("td,td->t", a, b)
    norm = {branch: product(g, g) for branch, g in total.items()}
    spread = CONTRIBUTIONS / (CONTRIBUTIONS - 1)
    sigma = {b: spread * ((v**2).sum((1, 2)) - norm[b] / CONTRIBUTIONS) for b, v in x.items()}
    dot = product(total["sft"], total["rl"])
    distance2 = norm["sft"] + norm["rl"] - 2 * dot
    earlier = {branch: _means_before(g) for branch, g in total.items()}
    columns = {
        "sigma_s2": sigma["sft"],
        "sigma_r2": sigma["rl"],
        "delta_g2": distance2 - sigma["sft"] - sigma["rl"],
        "distance2": distance2,
        "norm_s2": norm["sft"],
        "norm_r2": norm["rl"],
        "dot": dot,
        "n_s": CONTRIBUTIONS * np.isfinite(norm["sft"]),
        "n_r": CONTRIBUTIONS * np.isfinite(norm["rl"]),
    }
    pairs = [(now, before) for now in ("sft", "rl") for before in ("sft", "rl")]
    columns |= {key: product(total[now], earlier[before]) for key, (now, before) in zip(WORTH, pairs, strict=True)}
    return [{key: float(value[t]) for key, value in columns.items()} for t in range(len(dot))]


def _means_before(gradients: np.ndarray) -> np.ndarray:
    """``[steps, directions]``: the moving mean of the steps before each; NaN before the first."""
    mean, weight, found = np.zeros(DIRECTIONS), 0.0, []
    for gradient in gradients:
        found.append(mean / weight if weight else np.full(DIRECTIONS, np.nan))
        there = np.isfinite(gradient).all()
        mean = DECAY * mean + (1 - DECAY) * (gradient if there else 0.0)
        weight = DECAY * weight + (1 - DECAY) * there
    return np.array(found)


def answers_of(law: str, **options: Any) -> Callable[[Rows], list[float]]:
    """From what was measured to the ``mu`` after each step."""

    def answer(rows: Rows) -> list[float]:
        told = {"momentum": MOMENTUM, **options}
        if law == "gac":  # on plain numbers, which tests hold to the law in torch
            made: Any = create("gac", **told)
            state, found = numbers_of(made.state), []
            for step, row in enumerate(rows):
                state = fused_law.update(made, state, UNMEASURED | row, Step(step))
                found.append(state["mu"])
            return found
        controller, found = gac.Controller(law, **told), []
        differences = SuccessiveDifferences(len(WORTH), torch.device("cpu"), torch.float64)
        for row in rows:
            values = torch.tensor([row[name] for name in WORTH], dtype=torch.float64)
            worth = Worth(values, differences.update(values, torch.tensor(True)))
            found.append(float(controller.update(statistics_of(row), worth=worth)))
        return found

    return answer


def shares(name: str, mus: list[float]) -> list[float]:
    """SFT's share after each step: the units of the losses divided out, and for ``felt`` times the present lengths."""
    situation, found = SITUATIONS[name], []
    times = [(phase, step) for phase in situation.phases for step in range(phase.steps)]
    for (phase, step), mu in zip(times, mus, strict=True):
        weights = [mu * phase.sft.unit, (1 - mu) * phase.rl.unit]
        if situation.felt:
            lengths = [sum(x * x for x in source.lengths(step)) ** 0.5 for source in (phase.sft, phase.rl)]
            weights = [weight * length for weight, length in zip(weights, lengths, strict=True)]
        found.append(weights[0] / sum(weights))
    return found


def judge(name: str, answer: Callable[[Rows], list[float]], seed: int = 0) -> list[float]:
    """SFT's share at each of the situation's :class:`Wanted`."""
    run = shares(name, answer(measured(name, seed)))
    return [run[wanted.after - 1] for wanted in SITUATIONS[name].wanted]


def fulfils(name: str, found: list[float]) -> bool:
    """Whether shares are as wanted."""
    return all(w.low <= share <= w.high for w, share in zip(SITUATIONS[name].wanted, found, strict=True))


def statistics_of(row: Mapping[str, float]) -> gac.Statistics:
    """The statistics of a row of :func:`measured`."""
    return gac.Statistics(**{key: value for key, value in row.items() if key not in WORTH})

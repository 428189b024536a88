"""A small run with fixed numbers: what every way of measuring makes of it, to the bit.

Gradients are handed to autograd as data with few binary digits and ``mu`` stays at one half, so that every sum is exact
and no machine rounds another way. ``python -m tests.gac.fixed_run FILE`` writes the record that the test compares with.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
from pathlib import Path

import torch

import gac

NUMBERS = ("sigma_s2", "sigma_r2", "delta_g2", "distance2", "norm_s2", "norm_r2", "dot", "n_s", "n_r", "nonfinite")
SHAPES = {"embed_tokens": (6, 8), "layers.0.self_attn": (8, 8), "layers.0.mlp": (16, 8), "norm": (8,)}
CASES = {
    "sketch": {"estimator": "sketch"},
    "exact": {"estimator": "exact"},
    "auto, every second step": {"interval": 2},
    "tokens, sketch": {"estimator": "sketch", "tokens": True},
    "tokens, exact": {"estimator": "exact", "tokens": True},
    "buffers": {"estimator": "sketch", "hooks": False},
    "one contribution": {"estimator": "sketch", "contributions": 1},
    "coefficients": {"estimator": "coefficient"},
}
MOVING = {
    "sketch": {"estimator": "sketch"},
    "exact": {"estimator": "exact"},
    "prior": {"estimator": "sketch", "prior": {"warmup": 2, "decay": 5, "peak": 0.9, "valley": 0.1}, "momentum": 0.9},
    "kl": {"estimator": "exact", "alpha": "kl", "half_life": 5},
}
"""Of law ``gac``, whose mu moves and weighs the losses."""
LAWS = {
    "gac": {},
    "gac, prior": {"prior": 0.25, "prior_weight": 0.5},
    "paper": {},
    "fixed": {"mu": 0.3},
    "chord-mu": {},
}


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name, shape in SHAPES.items():
            module = self
            *path, last = name.split(".")
            for part in path:
                if not hasattr(module, part):
                    module.add_module(part, torch.nn.Module())
                module = getattr(module, part)
            leaf = torch.nn.Module()
            leaf.weight = torch.nn.Parameter(torch.zeros(shape))
            module.add_module(last, leaf)

    def forward(self, seed: int) -> torch.Tensor:
        """A loss whose gradient is a multiple of 1/8 in every element."""
        generator = torch.Generator().manual_seed(seed)
        data = [torch.randint(-8, 9, p.shape, generator=generator) / 8 for p in self.parameters()]
        return sum((p * d).sum() for p, d in zip(self.parameters(), data, strict=True))


def measure(*, tokens: bool = False, contributions: int = 4, **options) -> list[dict]:
    """Every step's statistics, those by module, and a hash of the gradients."""
    model, found = Model(), []
    with gac.patch(model, law="fixed", mu=0.5, report_interval=2, **options) as mixer:
        for step in range(4):
            for number, branch in enumerate((mixer.sft, mixer.rl)):
                with branch():
                    for k in range(contributions):
                        count = {"tokens": float(2 ** (k % 3))} if tokens else {}
                        loss = model(100 * step + 10 * number + k)
                        if options.get("hooks", True):
                            mixer.backward(loss, **count)
                        else:
                            (mixer.weight * loss).backward()
                            mixer.observe("grad", **count)
            if options.get("estimator") == "coefficient":
                generator = torch.Generator().manual_seed(step)
                logprobs = -torch.randint(1, 9, (6, 5), generator=generator, dtype=torch.float64) / 8
                advantages = torch.randint(-8, 9, (6,), generator=generator, dtype=torch.float64) / 8
                mixer.observe_tokens(logprobs, advantages, torch.ones(6, 5), torch.arange(6) < 3)
            mixer.step()
            gradients = b"".join(p.grad.numpy().tobytes() for p in model.parameters())
            row = {"gradients": hashlib.sha256(gradients).hexdigest()[:16], "mu": float(mixer.mu)}
            if mixer.statistics is not None:
                row |= {name: float(getattr(mixer.statistics, name)) for name in NUMBERS}
            if mixer.modules is not None:
                row["modules"] = [list(mixer.modules.labels), mixer.modules.values.tolist()]
            found.append(row)
            model.zero_grad()
    return found


def moving(**options) -> list[dict]:
    """Every step's statistics, mu and state of law ``gac``; every step is measured."""
    model, found = Model(), []
    with gac.patch(model, law="gac", interval=1, **options) as mixer:
        for step in range(12):
            for number, branch in enumerate((mixer.sft, mixer.rl)):
                if step == 5 and number == 0:
                    continue  # without demonstrations
                with branch():
                    for k in range(3):
                        broken = step == 7 and number == 1 and k == 2
                        told = {"tokens": 1.0 + k} if step % 3 == 2 else {}
                        mixer.backward((math.nan if broken else 1.0) * model(100 * step + 10 * number + k), **told)
            mixer.step(kl=0.01 * step)
            model.zero_grad()
            state = mixer.controller.law.state
            row = {name: float(getattr(mixer.statistics, name)) for name in gac.Statistics.names()}
            found.append(row | {"mu": float(mixer.mu)} | {name: state[name].tolist() for name in sorted(state)})
    return found


def control(law: str, options: dict, *, gaps: bool = True) -> list[float]:
    """Every step's mu from statistics that are given, with steps that measured nothing or a part unless told not to."""
    controller, found = gac.Controller(law.split(",")[0], **options), []
    generator = torch.Generator().manual_seed(0)
    for step in range(40):
        sigma_s2, sigma_r2, delta_g2 = (torch.rand(3, generator=generator, dtype=torch.float64) + 0.5).tolist()
        if gaps and step % 7 == 3:
            delta_g2 = float("nan")
        statistics = gac.Statistics(
            sigma_s2=sigma_s2,
            sigma_r2=sigma_r2 * 1.05**step,
            delta_g2=delta_g2,
            distance2=delta_g2 + sigma_s2 + sigma_r2 * 1.05**step,
            n_s=4.0,
            n_r=4.0,
            sigma_s2_se=0.1,
            sigma_r2_se=0.1,
            delta_g2_se=0.2,
            distance2_se=0.2,
        )
        found.append(float(controller.update(None if gaps and step % 11 == 5 else statistics)))
    return found


def record() -> dict:
    """Everything, as plain numbers."""
    runs = {name: measure(**options) for name, options in CASES.items()}
    laws = {name: control(name, options) for name, options in LAWS.items()}
    every_step = {name: control(name, options, gaps=False) for name, options in LAWS.items()}
    gac_law = {name: moving(**options) for name, options in MOVING.items()}
    return {"runs": runs, "laws": laws, "laws, every step measured": every_step, "law gac, mu moving": gac_law}


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(record(), indent=1))

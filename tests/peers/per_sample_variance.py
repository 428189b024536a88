"""sigma2 from one-sample micro-batches against BackPACK, Opacus and gns-pytorch on the same gradients.

    pip install --no-deps --target peers backpack-for-pytorch unfoldnd opacus opt_einsum scipy gns-pytorch
    PYTHONPATH=peers python -m tests.peers.per_sample_variance

``--no-deps --target`` keeps them out of the environment and leaves its torch alone. Exits with 1 when a number is off
by more than 1e-4, relative.
"""

from __future__ import annotations

import sys
from importlib.metadata import version

import backpack
import backpack.extensions
import gns_pytorch
import opacus
import torch
from torch import nn

import gac

SAMPLES = 16
TOLERANCE = 1e-4


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 64), nn.Tanh(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 5))


def data(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two of the five classes occur, so that the mean gradient stands out: gns-pytorch returns 0 where it does not."""
    x = torch.randn(SAMPLES, 20, generator=torch.Generator().manual_seed(seed))
    return x, (x[:, 0] > 0).long()


def ours(estimator: str, sft, rl) -> gac.Statistics:
    """A step of ``SAMPLES`` one-sample micro-batches a branch; each branch's gradient is the mean over its samples."""
    model, loss = network(), nn.CrossEntropyLoss()
    with gac.patch(model, estimator=estimator) as mixer:
        for branch, (x, y) in ((mixer.sft, sft), (mixer.rl, rl)):
            with branch():
                for k in range(SAMPLES):
                    mixer.backward(loss(model(x[k : k + 1]), y[k : k + 1]) / SAMPLES)
        mixer.step()
        return mixer.statistics


def by_backpack(x: torch.Tensor, y: torch.Tensor) -> float:
    """``variance`` is the population variance of the samples' shares of the mean loss, which are the contributions."""
    model, loss = backpack.extend(network()), backpack.extend(nn.CrossEntropyLoss())
    with backpack.backpack(backpack.extensions.Variance()):
        loss(model(x), y).backward()
    return SAMPLES**2 / (SAMPLES - 1) * sum(float(p.variance.double().sum()) for p in model.parameters())


def by_opacus(x: torch.Tensor, y: torch.Tensor) -> float:
    """``grad_sample`` holds each sample's gradient."""
    model = opacus.GradSampleModule(network(), loss_reduction="mean")
    nn.CrossEntropyLoss()(model(x), y).backward()
    return sum(float(p.grad_sample.double().var(0).sum()) for p in model.parameters()) / SAMPLES


def noise_scale_by_gns(x: torch.Tensor, y: torch.Tensor) -> float:
    """B_simple = tr(C) / |g|^2 with both estimated without bias (McCandlish et al. 2018, appendix A.1)."""
    model = network()
    losses = nn.CrossEntropyLoss(reduction="none")(model(x), y)
    return gns_pytorch.compute_gns(losses, model, param_percentage=1.0, batch_percentage=1.0)


def main() -> int:
    sft, rl = data(1), data(2)
    print(", ".join(f"{name} {version(name)}" for name in ("torch", "backpack-for-pytorch", "opacus", "gns-pytorch")))
    worst = 0.0
    for estimator in ("exact", "sketch"):
        found = ours(estimator, sft, rl)
        for branch, batch, sigma2, norm2 in (
            ("sft", sft, found.sigma_s2, found.norm_s2),
            ("rl", rl, found.sigma_r2, found.norm_r2),
        ):
            scale = SAMPLES * float(sigma2) / float(norm2 - sigma2)
            for name, value, reference in (
                ("sigma2, BackPACK", float(sigma2), by_backpack(*batch)),
                ("sigma2, Opacus", float(sigma2), by_opacus(*batch)),
                ("noise scale, gns-pytorch", scale, noise_scale_by_gns(*batch)),
            ):
                difference = abs(value / reference - 1)
                worst = max(worst, difference)
                print(f"{estimator:6} {branch:3} {name:24} gac {value:.8f}  peer {reference:.8f}  off {difference:.1e}")
    return int(worst > TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())

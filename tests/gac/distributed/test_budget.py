"""Ranks whose steps cost each of them something else decide alike under a budget, and agree to the bit."""

import time

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

import gac
from tests.gac.distributed.processes import on_ranks

STEPS = 45


def train(rank, world):
    """The mu of each step, whether it was measured, and the state at the end."""
    torch.manual_seed(0)
    net = DistributedDataParallel(torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4)))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    mus, measured = [], []
    with gac.patch(net, overhead=0.05) as mixer:
        for step in range(STEPS):
            measured.append(mixer._measurement.is_measured)
            for branch, target in ((mixer.sft, 1.0), (mixer.rl, -1.0)):
                with branch():
                    for micro in range(2):
                        seed = 1000 * step + 100 * rank + 10 * micro + (target > 0)
                        x = torch.randn(5, 8, generator=torch.Generator().manual_seed(seed))
                        mixer.backward((net(x) - target).square().mean() / 2)
            time.sleep(0.004 * rank)  # the last one works while the others wait
            optimizer.step()
            mixer.step()
            optimizer.zero_grad()
            mus.append(repr(float(mixer.mu)))
        cadence = {name: repr(value.tolist()) for name, value in mixer.state_dict()["cadence"].items()}
    return mus, measured, cadence


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_decide_alike(tmp_path, world):
    found = on_ranks(world, tmp_path, train, preload=__name__, seconds=120)
    for other in found[1:]:
        assert other == found[0]
    measured = found[0][1]
    assert all(measured[:10])
    assert not all(measured)
    assert sum(measured) > 10

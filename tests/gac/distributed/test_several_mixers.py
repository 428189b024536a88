"""Actor and critic on two ranks: two mixers share the process group, and each is the one it would be alone."""

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

import gac
from tests.gac.distributed.processes import on_ranks

MICRO_BATCHES = 2


def model(seed):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(6, 12), torch.nn.Tanh(), torch.nn.Linear(12, 3))


def step(net, mixer, rank, number):
    for branch, target in (("sft", 1.0), ("rl", -1.0)):
        with getattr(mixer, branch)():
            for micro in range(MICRO_BATCHES):
                generator = torch.Generator().manual_seed(100 * number + 10 * rank + micro)
                x = torch.randn(5, 6, generator=generator)
                mixer.backward((net(x) - target).square().mean() / MICRO_BATCHES)


def train(rank, world, seeds):
    """Numbers of the mixers of models with these seeds, after three steps that are taken in turn."""
    nets = [DistributedDataParallel(model(seed)) for seed in seeds]
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9) for net in nets]
    mixers = [gac.patch(net, name=f"model{seed}") for net, seed in zip(nets, seeds, strict=True)]
    for number in range(3):
        for net, mixer in zip(nets, mixers, strict=True):
            step(net, mixer, rank, number)
        for optimizer, mixer in zip(optimizers, mixers, strict=True):
            optimizer.step()
            mixer.step()
            optimizer.zero_grad()
    found = {}
    for mixer in mixers:
        found |= {name: value for name, value in mixer.metrics(wait=True).items() if not name.endswith("/seconds")}
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    runs = {"both": (0, 1), "actor": (0,), "critic": (1,)}
    results = {}
    for name, seeds in runs.items():
        folder = tmp_path_factory.mktemp(name)
        results[name] = on_ranks(2, folder, train, seeds, preload=__name__, seconds=120)
    return results


def test_both_ranks_agree_to_the_bit(found):
    one, other = found["both"]
    assert {k: repr(v) for k, v in one.items()} == {k: repr(v) for k, v in other.items()}
    assert one["model0/n_s"] == one["model1/n_s"] == 2 * MICRO_BATCHES


def test_each_is_what_it_is_alone(found):
    alone = found["actor"][0] | found["critic"][0]
    assert {k: repr(v) for k, v in found["both"][0].items()} == {k: repr(v) for k, v in alone.items()}
    assert alone["model0/mu"] != alone["model1/mu"]

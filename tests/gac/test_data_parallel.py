"""Two processes with DDP: the same mu on both, equal to one process that saw all the data."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

import gac
from tests.gac.models import rl_loss, sft_loss, tiny_model, tokens

STEPS, MICRO_BATCHES = 3, 2


def batches(step: int, branch: int, rank: int) -> list[torch.Tensor]:
    return tokens(MICRO_BATCHES, 1000 * step + 100 * branch + rank)


def train(model, patched, ranks, mixer, *, no_sync=None):
    """Steps over the micro-batches of the ranks given, each loss divided by their number on one rank."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    mus, noises = [], []
    for step in range(STEPS):
        for number, (branch, loss) in enumerate(((mixer.sft, sft_loss), (mixer.rl, rl_loss))):
            with branch():
                for rank in ranks:
                    for k, batch in enumerate(batches(step, number, rank)):
                        quiet = no_sync is not None and not (number == 1 and k == MICRO_BATCHES - 1)
                        if quiet:
                            with no_sync():
                                mixer.backward(loss(patched, batch) / MICRO_BATCHES)
                        else:
                            mixer.backward(loss(patched, batch) / MICRO_BATCHES / len(ranks))
        optimizer.step()
        mixer.step()
        optimizer.zero_grad()
        mus.append(float(mixer.mu))
        noises.append([float(getattr(mixer.statistics, n)) for n in ("sigma_s2", "sigma_r2", "distance2", "n_s")])
    return mus, noises


def worker(rank: int, store: str, folder: str, estimator: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    model = DistributedDataParallel(tiny_model())
    with gac.patch(model, estimator=estimator) as mixer:
        result = train(model, model, [rank], mixer, no_sync=model.no_sync)
    torch.save((*result, [p.detach() for p in model.parameters()]), os.path.join(folder, f"{rank}.pt"))
    dist.destroy_process_group()


@pytest.mark.timeout(120)
@pytest.mark.parametrize("estimator", ["exact", "sketch"])
def test_two_ranks_equal_one_process(tmp_path: Path, estimator):
    mp.spawn(worker, args=(str(tmp_path / "store"), str(tmp_path), estimator), nprocs=2)
    (mus, noises, parameters), other = (torch.load(tmp_path / f"{r}.pt") for r in range(2))
    assert mus == other[0]
    assert noises == other[1], "bit-identical on every rank"
    assert all(torch.equal(a, b) for a, b in zip(parameters, other[2], strict=True))
    model = tiny_model()
    with gac.patch(model, estimator=estimator) as mixer:
        alone_mus, alone_noises = train(model, model, [0, 1], mixer)
    assert mus == pytest.approx(alone_mus, rel=1e-5)
    for ours, theirs in zip(noises, alone_noises, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)

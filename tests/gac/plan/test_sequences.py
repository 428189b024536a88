"""Plans of the sequence estimator against the real one: sizes, calls, bytes read, the message, the sketch's error."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

import gac
import gac.sequences.step
from gac.bench.step import StepOptions, Trainer
from gac.plan import DEVICES, Parameters, Setup, make_plan, mu_error
from gac.plan.error import Noise
from gac.plan.sequences import buckets_of
from gac.plan.shapes import LlamaShape

TIED = LlamaShape("tied", 300, 72, 80, 2, 2, 1, 36, tied=True)
UNTIED = LlamaShape("untied", 300, 72, 80, 2, 2, 1, 36, tied=False)
ROWS, LENGTH = 4, 16


def setup_of(shape, **changes):
    options = {"tokens": ROWS * LENGTH, "length": LENGTH, "micro_batches": 2, "dtype": "fp32", "sketch_size": 8}
    parameters = Parameters.of_shapes(shape.name, shape.shapes())
    return Setup(parameters, DEVICES["h100"], estimator="sequence", **options | changes)


@pytest.mark.parametrize("shape", [TIED, UNTIED], ids=lambda shape: shape.name)
def test_a_step_of_a_model(shape, monkeypatch):
    """Width, memory, contributions; calls of the kernel and the bytes of their sides."""
    calls = []
    real = gac.sequences.step.kronecker_sketch

    def sketch(left, right, out, **options):
        calls.append(left.nbytes + right.nbytes)
        return real(left, right, out, **options)

    monkeypatch.setattr(gac.sequences.step, "kronecker_sketch", sketch)
    # as on a GPU, whose kernel reads whole inputs: a CPU projects those that layers share once, before it is called
    monkeypatch.setattr("gac.sequences.observer.share_signs", lambda layers: None)
    trainer = Trainer(StepOptions(shape, torch.device("cpu"), torch.float32, tokens=LENGTH))
    trainer.batches = [torch.randint(0, shape.vocabulary, (ROWS, LENGTH)) for _ in range(4)]
    found = make_plan(setup_of(shape))
    with gac.patch(trainer.model, estimator="sequence", sketch_size=8, interval=1, report_interval=None) as mixer:
        trainer.mixed(mixer)
        assert (mixer.statistics.n_s, mixer.statistics.n_r) == (found.contributions, found.contributions)
        assert found.sketch_size == mixer.coverage.width
        assert found.sketch_bytes == mixer.nbytes + 4 * ROWS * mixer.coverage.width
    assert len(calls) == 4 * found.calls_per_backward
    assert sum(calls) == 4 * found.read_bytes_per_backward


@pytest.mark.parametrize("ranks", [4], indirect=True)
def test_the_message(ranks, monkeypatch):
    sent = []
    real = dist.all_reduce
    monkeypatch.setattr(dist, "all_reduce", lambda t, *a, **k: (sent.append(t.nbytes), real(t, *a, **k))[1])
    net = torch.nn.Sequential(torch.nn.Embedding(30, 24), torch.nn.Linear(24, 30, bias=False))
    with gac.patch(net, estimator="sequence", sketch_size=16, interval=1, report_interval=None) as mixer:
        for branch in (mixer.sft, mixer.rl):
            with branch():
                mixer.backward(net(torch.randint(0, 30, (3, 5))).square().mean())
        mixer.step()
    parameters = Parameters.of_shapes("net", [p.shape for p in net.parameters()])
    found = make_plan(Setup(parameters, DEVICES["h100"], ranks=ranks, estimator="sequence", sketch_size=16))
    assert sent[-1] == found.all_reduce_bytes


def test_more_sequences_are_surer_and_new_signs_average_out():
    some, more = (make_plan(setup_of(TIED, tokens=tokens)) for tokens in (ROWS * LENGTH, 8 * ROWS * LENGTH))
    assert more.contributions == 8 * some.contributions
    assert more.mu_se_one_step < some.mu_se_one_step
    fixed = mu_error(Noise(), 8, averaged=1 / ROWS, size=buckets_of(8, 15), momentum=0.9)
    assert some.mu_se_sketch < fixed.sketch / 3


def test_the_error_of_a_sketch_is_at_most_that_of_rank_one():
    """Relative variance of ``|M|^2`` over seeds: L layers of rank one have ``2 / buckets_of(k, L)``, others less."""
    from gac_kernels import kronecker_sketch
    from gac_kernels.kronecker import sign_keys

    k, layers, draws = 16, 3, 300
    torch.manual_seed(0)
    found = {}
    for rank in (1, 64):
        sides = [(torch.randn(rank, 64), torch.randn(rank, 64)) for _ in range(layers)]
        squares = torch.zeros(draws, layers)
        for draw in range(draws):
            for layer, (left, right) in enumerate(sides):
                out = torch.zeros(1, k, k)
                keys = torch.tensor(sign_keys(draw * layers + layer))
                kronecker_sketch(left, right, out, bounds=torch.tensor([0, rank]), keys=keys)
                squares[draw, layer] = out.square().sum()
        total = squares.sum(1)
        found[rank] = float(total.var() / total.mean().square()) * buckets_of(k, layers) / 2
    assert found[1] == pytest.approx(1.0, abs=0.35)  # (1 + 2/k)^2 - 1 is 6% above 4/k; 400 draws: 7% and heavy tails
    assert found[64] < 0.2

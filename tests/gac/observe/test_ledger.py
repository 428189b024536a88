"""The ledger's books, and what they cost: launches of a contribution, on any backend."""

import os
import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import gac_kernels
from gac.observe.ledger import Ledger
from gac.statistics import Branch

NUMELS = (3000, 70, 0, 1025)
ONE = torch.tensor(1.0)


def gradients(seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, generator=generator) for n in NUMELS]


@pytest.fixture
def incoming(monkeypatch):
    """A ledger in which elements share buckets and the gradient is seen before accumulation."""
    monkeypatch.setattr("gac.observe.ledger.SMALLEST_SKETCH", 2048)
    ledger = Ledger(NUMELS, torch.device("cpu"), lossless=False, running=False)
    assert ledger.current is not None
    assert ledger.layout.size < sum(NUMELS)
    return ledger


def sketched(ledger: Ledger, tensors: list[torch.Tensor]) -> torch.Tensor:
    out = torch.zeros(ledger.layout.size)
    gac_kernels.sketch(tensors, out, layout=ledger.layout)
    return out


def contribute(ledger: Ledger, branch: Branch, calls, scale=ONE) -> None:
    ledger.begin()
    for indices, tensors in calls:
        ledger.read(branch, indices, tensors, scale)
    ledger.end(branch, scale)


def sums(ledger: Ledger, *branches: Branch) -> torch.Tensor:
    """``[6]``: squares of each branch's contributions (branches are given), non-finite elements, inner products."""
    powers = ledger.powers()
    assert len(powers) == len(branches)
    own = [
        sum((p for p, b in zip(powers, branches, strict=True) if b is branch), torch.tensor(0.0)) for branch in Branch
    ]
    return torch.cat([torch.stack([*own, ledger.nonfinite()]).double(), ledger.inner(ledger.both_totals)])


def test_parameters_without_a_gradient_count_as_zero(incoming):
    """A region that an earlier contribution filled must not enter a later one."""
    x, y, z = gradients(1), gradients(2), gradients(3)
    scale = torch.tensor(0.7)
    contribute(incoming, Branch.SFT, [([0, 1, 2, 3], x)], scale)
    contribute(incoming, Branch.SFT, [([1], [y[1]])], scale)
    contribute(incoming, Branch.SFT, [([3], [z[3]]), ([0], [z[0]])], scale)
    zeros = [torch.zeros(n) for n in NUMELS]
    parts = [x, [zeros[0], y[1], zeros[2], zeros[3]], [z[0], zeros[1], zeros[2], z[3]]]
    sketches = [0.7 * sketched(incoming, part).double() for part in parts]
    torch.testing.assert_close(incoming.totals[Branch.SFT].double(), sum(sketches), rtol=1e-6, atol=1e-6)
    power = sum(s.square().sum() for s in sketches)
    found = sums(incoming, *[Branch.SFT] * 3)
    torch.testing.assert_close(found[0], power, rtol=1e-6, atol=0)
    assert found[1:3].tolist() == [0.0, 0.0]
    incoming.clear()
    assert not sums(incoming).any()
    contribute(incoming, Branch.RL, [([0], [y[0]])])
    torch.testing.assert_close(incoming.totals[Branch.RL], sketched(incoming, [y[0], *zeros[1:]]))


def test_gradients_in_parts_add_up(incoming):
    """Parameter 1 comes twice, once beside a parameter that is new."""
    x, y = gradients(1), gradients(2)
    contribute(incoming, Branch.RL, [([0, 1], x[:2]), ([1, 3], [y[1], x[3]])])
    whole = sketched(incoming, [x[0], x[1] + y[1], x[2], x[3]])
    torch.testing.assert_close(incoming.totals[Branch.RL], whole, rtol=1e-6, atol=1e-6)


def test_an_abandoned_contribution_leaves_nothing(incoming):
    x, y = gradients(1), gradients(2)
    incoming.begin()
    incoming.read(Branch.SFT, [0], [x[0]], ONE)  # and an exception
    contribute(incoming, Branch.SFT, [([1], [y[1]])])
    zeros = [torch.zeros(n) for n in NUMELS]
    torch.testing.assert_close(incoming.totals[Branch.SFT], sketched(incoming, [zeros[0], y[1], *zeros[2:]]))


@pytest.mark.parametrize("running", [False, True])
def test_norms_of_a_lossless_ledger(running):
    ledger = Ledger(NUMELS, torch.device("cpu"), lossless=True, running=running)
    x, y = gradients(1), gradients(2)
    y[1][5] = float("inf")
    scales = {Branch.SFT: torch.tensor(0.5), Branch.RL: torch.tensor(3.0)}
    contribute(ledger, Branch.SFT, [([0, 1, 2, 3], x)], scales[Branch.SFT])
    found = sums(ledger, Branch.SFT)
    squares = 0.25 * sum(t.double().square().sum() for t in x)
    torch.testing.assert_close(found[[0, 3]], torch.stack([squares, squares]), rtol=1e-6, atol=0)
    assert found[[1, 2, 4, 5]].tolist() == [0.0] * 4
    contribute(ledger, Branch.RL, [([0, 1, 2, 3], y)], scales[Branch.RL])
    assert sums(ledger, *Branch)[2] == 1
    ledger.clear()
    assert not sums(ledger).any()


@pytest.mark.parametrize("lossless", [True, False])
def test_running_sums_in_parts_make_one_difference(lossless, monkeypatch):
    """A parameter's running sum is read twice in a contribution (nested passes): what counts is the last."""
    monkeypatch.setattr("gac.observe.ledger.SMALLEST_SKETCH", 2048)
    ledger, whole = (Ledger(NUMELS, torch.device("cpu"), lossless=lossless, running=True) for _ in range(2))
    x, y = gradients(1), gradients(2)
    for k, more in enumerate((x, y)):
        halfway = [0.5 * k * t for t in x]
        end = [t if k == 0 else a + t for a, t in zip(x, more, strict=True)]
        contribute(ledger, Branch.RL, [([1, 0], [halfway[1], end[0]]), ([1, 3], [end[1], end[3]])])
        contribute(whole, Branch.RL, [([0, 1, 3], [end[0], end[1], end[3]])])
    assert torch.equal(ledger.both_totals, whole.both_totals)
    torch.testing.assert_close(ledger.powers(), whole.powers(), rtol=1e-13, atol=0)
    ledger.begin()
    ledger.read(Branch.RL, [0], [x[0]], ONE)  # and an exception
    assert torch.equal(ledger.both_totals, whole.both_totals)
    contribute(ledger, Branch.RL, [([3], [end[3]])])
    assert ledger.powers()[2] == 0


def test_known_running_sums_are_not_part_of_a_contribution(monkeypatch):
    monkeypatch.setattr("gac.observe.ledger.SMALLEST_SKETCH", 2048)
    for lossless in (True, False):
        ledger = Ledger(NUMELS, torch.device("cpu"), lossless=lossless, running=True)
        x, y = gradients(1), gradients(2)
        ledger.know([1, 0], [x[1], x[0]])
        contribute(ledger, Branch.SFT, [([0, 1, 3], [x[0] + y[0], x[1], y[3]])])
        power = sum(t.double().square().sum() for t in (y[0], y[3]))
        torch.testing.assert_close(ledger.powers()[0], power, rtol=1e-6 if lossless else 0.2, atol=0)
        ledger.know([], [])
        assert not ledger.previous.any()


@pytest.mark.parametrize("kind", ["direct", "lossless", "running", "incoming"])
def test_a_contribution_is_nothing_but_the_operations(kind, monkeypatch):
    """No sum, product or memset beside them: each would be a launch."""

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            names.append(function.name())
            return function(*args, **(kwargs or {}))

    monkeypatch.setattr("gac.observe.ledger.SMALLEST_SKETCH", 2048)
    lossless, running = kind in ("direct", "lossless"), kind in ("lossless", "running")
    ledger = Ledger(NUMELS, torch.device("cpu"), lossless=lossless, running=running)
    add, read, end, both = (f"gac_kernels::{n}_into_" for n in ("accumulate", "sketch", "absorb", "absorb_sketch"))
    expected = {"direct": [add] * 2, "lossless": [add], "running": [both], "incoming": [read, read, end]}[kind]
    x = gradients(1)
    for branch in (*Branch, Branch.SFT):
        names: list[str] = []
        with Seen():
            contribute(ledger, branch, [([2, 3], x[2:]), ([0, 1], x[:2])])
        assert names == expected


LAUNCHES = """
import math, sys
import torch
import gac.observe.ledger, gac.observe.observer, gac.observe.pending
from gac.statistics import Branch
from gac_kernels.triton import launch as starting

count = 0
launch = starting.launch
def counted(*args, **constants):
    global count
    count += 1
    launch(*args, **constants)
starting.launch = counted

BUCKET = gac.observe.pending.BUCKET_BYTES = gac.observe.pending.RUNNING_BUCKET_BYTES = 8192
gac.observe.ledger.SMALLEST_SKETCH = 2048
torch.manual_seed(0)
model = torch.nn.Sequential(*(torch.nn.Linear(32, 32) for _ in range(6)))
size = sum(p.numel() * p.element_size() for p in model.parameters())
for lossless, running in ((True, False), (True, True), (False, True), (False, False)):
    model.zero_grad(set_to_none=True)
    observer = gac.observe.observer.Observer(model.named_parameters(), lossless=lossless, running=running, seed=0)
    observer.enter(Branch.SFT, torch.tensor(1.0))
    for _ in range(3):
        count = 0
        model(torch.randn(4, 32)).square().sum().backward()
        observer.finish()
        print(count, 2 * math.ceil(size / BUCKET) + 1)
    observer.leave(failed=False)
    ledger = observer.ledgers[0]
    assert all(ledger.powers() > 0) and ledger.nonfinite() == 0
    observer.remove()
"""


@pytest.mark.slow
def test_launches_of_a_backward_pass():
    """At most two for each bucket and one more: with 128 MiB buckets ceil(bytes / 64 MiB) + 2."""
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("GAC_", "PYTEST_"))}
    environment |= {"TRITON_INTERPRET": "1", "GAC_BACKEND": "triton", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", LAUNCHES], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    counts = [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
    assert len(counts) == 12
    assert [count for count, _ in counts[3:9]] == [2] * 6  # running sums are read at the end
    assert all(4 < count <= most for count, most in counts[:3] + counts[9:]), counts


@pytest.mark.parametrize("kind", ["direct", "lossless", "incoming", "running"])
def test_a_contribution_that_was_given_up_leaves_the_modules_alone(kind):
    """A backward pass raised after some gradients were read: the next contribution takes its place in the book."""
    numels, modules = [2000, 3000], [0, 1]
    lossless, running = kind in ("direct", "lossless"), kind in ("lossless", "running")
    options = {"lossless": lossless, "running": running, "modules": modules, "module_count": 2}
    gradients = [torch.full((n,), 1.0 + k) for k, n in enumerate(numels)]
    one, found = torch.tensor(1.0), []
    for given_up in (False, True):
        ledger = Ledger(numels, torch.device("cpu"), **options)
        ledger.by_module = True
        if given_up and kind != "direct":  # what the exact estimator has added stays: its step counts as broken
            ledger.begin()
            ledger.read(Branch.SFT, [0], [5 * gradients[0]], one)
        elif given_up:
            ledger.begin()
        for factor in (1.0, 2.0):
            ledger.begin()
            ledger.read(Branch.SFT, [0, 1], [factor * g for g in gradients], one)
            ledger.end(Branch.SFT, one)
        found.append(ledger.module_powers())
    assert found[1].shape == (2, 2)
    assert torch.equal(found[0], found[1])

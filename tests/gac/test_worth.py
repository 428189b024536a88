"""Products of a step's gradients with earlier ones, through a mixer, against autograd in float64."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import gac
from gac.laws.gac import GacLaw
from gac.observe.temporal import DECAY
from gac.statistics.worth import WORTH
from tests.gac.distributed.processes import on_ranks

MICRO_BATCHES = 2
BRANCHES = {"sft": 1.0, "rl": -0.5}
PAIRS = [(now, before) for now in BRANCHES for before in BRANCHES]


def new_model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 12), torch.nn.Tanh(), torch.nn.Linear(12, 1))


def batch(step: int, branch: str, micro: int, rank: int = 0) -> torch.Tensor:
    seed = 1000 * step + 100 * rank + 10 * micro + (branch == "rl")
    return torch.randn(8, 6, generator=torch.Generator().manual_seed(seed))


def loss_of(model, branch: str, x: torch.Tensor) -> torch.Tensor:
    return (model(x) - BRANCHES[branch]).square().mean() / MICRO_BATCHES


def true_gradient(model, step: int, branch: str, world: int = 1) -> torch.Tensor:
    """The branch's gradient of the step in float64, unweighted, mean over ranks."""
    double = copy.deepcopy(model).double()
    losses = (
        loss_of(double, branch, batch(step, branch, m, rank).double())
        for rank in range(world)
        for m in range(MICRO_BATCHES)
    )
    gradients = torch.autograd.grad(sum(losses) / world, list(double.parameters()))
    return torch.cat([g.reshape(-1) for g in gradients])


class Truth:
    """Moving means and products by their definition."""

    def __init__(self) -> None:
        self.seen: dict[str, list[tuple[int, torch.Tensor]]] = {branch: [] for branch in BRANCHES}

    def products(self, step: int, gradients: dict[str, torch.Tensor]) -> list[float]:
        """Those of a step, which is then one of the seen."""
        found = []
        for now, before in PAIRS:
            weights = [DECAY ** (step - t) for t, _ in self.seen[before]]
            # the newest of two measurements further apart has the weight of all steps between them
            gaps = [t - (self.seen[before][k - 1][0] if k else t - 1) for k, (t, _) in enumerate(self.seen[before])]
            weights = [w * (1 - DECAY**gap) for w, gap in zip(weights, gaps, strict=True)]
            if now not in gradients or not weights:
                found.append(math.nan)
                continue
            mean = sum(w * g for w, (_, g) in zip(weights, self.seen[before], strict=True)) / sum(weights)
            found.append(float(gradients[now] @ mean))
        for branch, gradient in gradients.items():
            self.seen[branch].append((step, gradient))
        return found


def close(found, wanted, scale: float) -> None:
    """float32 gradients of some 100 elements: 1e-5 of the lengths' product."""
    for a, b in zip(found, wanted, strict=True):
        assert math.isnan(a) == math.isnan(b), (found, wanted)
        assert math.isnan(b) or abs(a - b) <= 1e-5 * scale, (found, wanted)


def one_step(model, mixer, optimizer, step: int, branches=tuple(BRANCHES), *, rank: int = 0, broken=False) -> None:
    for branch in branches:
        with getattr(mixer, branch)():
            for micro in range(MICRO_BATCHES):
                loss = loss_of(model, branch, batch(step, branch, micro, rank))
                mixer.backward(loss * float("inf") if broken and micro == 0 else loss)
    if not broken:
        optimizer.step()
    mixer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("law", ["aim", "gac"])
@pytest.mark.parametrize(("estimator", "interval"), [("exact", 1), ("sketch", 1), ("exact", 3)])
def test_against_autograd(monkeypatch, law, estimator, interval):
    """Weights divided out, absent branches, steps that are not measured or not finite; in torch and on numbers."""
    monkeypatch.setattr(GacLaw, "measures_worth", True)
    model, truth, compared = new_model(), Truth(), 0
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    mixer = gac.patch(model, law=law, estimator=estimator, interval=interval)
    for step in range(14):
        branches = ("rl",) if step == 6 else tuple(BRANCHES)
        broken = step == 9
        gradients = {branch: true_gradient(model, step, branch) for branch in branches}
        one_step(model, mixer, optimizer, step, branches, broken=broken)
        latest = mixer._measurement.worth.latest
        assert mixer.statistics is None or latest is not None
        if step % interval:
            assert latest is None
            continue
        wanted = truth.products(step, {} if broken else gradients)
        scale = max(float(g @ g) for g in gradients.values())
        close(latest.values.tolist(), wanted, scale)
        compared += sum(map(math.isfinite, wanted))
    assert compared > 9
    assert float(mixer.mu) != 0.5


def test_errors_are_those_of_successive_differences(monkeypatch):
    """The same in torch and on numbers."""
    monkeypatch.setattr(GacLaw, "measures_worth", True)
    found = []
    for why in (None, "for this test"):
        monkeypatch.setattr("gac.ending.why_in_torch", lambda law, device, why=why: why)
        model = new_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        mixer = gac.patch(model, law="gac", interval=1)
        rows = []
        for step in range(8):
            one_step(model, mixer, optimizer, step)
            rows.append(mixer._measurement.worth.latest.errors)
        mixer.unpatch()
        found.append(torch.stack(rows))
    assert torch.isfinite(found[0][2:]).all()
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=0, equal_nan=True)


def test_laws_that_do_not_ask_keep_nothing():
    model = new_model()
    mixer = gac.patch(model, interval=1)
    one_step(model, mixer, torch.optim.SGD(model.parameters(), lr=0.1), 0)
    assert mixer._measurement.worth is None
    assert "worth" not in mixer.state_dict()


def test_a_product_is_unbiased_given_the_parameters():
    """Fresh data at the same parameters: the mean of ``<G_r, M_s>`` is ``<g_r, M_s>``, within 4 standard errors."""
    model = new_model()
    means = true_gradient(model, 0, "sft")
    drawn = torch.stack([true_gradient(model, step, "rl") for step in range(1, 101)])
    many = torch.stack([true_gradient(model, step, "rl") for step in range(1000, 1300)]).mean(0)
    products = drawn @ means
    error = float(products.std() / len(products) ** 0.5)
    assert abs(float(products.mean() - many @ means)) < 4 * error * (1 + 100 / 300) ** 0.5


def test_overshooting_counts():
    """A step beyond the minimum was worth less than nothing, which a step's own gradients cannot see."""
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(model.weight, 1.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.8)  # of 1/2 w^2: the step goes from 1 to -0.8
    mixer = gac.patch(model, law="aim", interval=1)
    own = []
    for _ in range(2):
        for branch in BRANCHES:
            with getattr(mixer, branch)():
                for _ in range(2):
                    mixer.backward(model(torch.ones(1, 1)).square().sum() / 4)
        optimizer.step()
        mixer.step()
        optimizer.zero_grad()
        own.append(float(mixer.statistics.norm_r2 - mixer.statistics.sigma_r2))
    assert own[1] > 0
    assert float(mixer._measurement.worth.latest.values[3]) == pytest.approx(-0.8, rel=1e-5)


def test_a_state_goes_on_to_the_bit():
    def new():
        model = new_model()
        return model, gac.patch(model, law="aim", interval=1, momentum=0.9), torch.optim.SGD(model.parameters(), lr=0.0)

    model, mixer, optimizer = new()
    for step in range(9):
        if step == 5:
            saved = copy.deepcopy(mixer.state_dict())
        one_step(model, mixer, optimizer, step)
    again, other, its = new()
    other.load_state_dict(saved)
    for step in range(5, 9):
        one_step(again, other, its, step)
    assert torch.equal(mixer._measurement.worth.latest.values, other._measurement.worth.latest.values)
    assert torch.equal(mixer.mu, other.mu)
    for name, value in mixer.controller.law.state.items():
        torch.testing.assert_close(other.controller.law.state[name], value, rtol=0, atol=0, equal_nan=True)
    with pytest.raises(ValueError, match="worth"):
        other.load_state_dict({name: value for name, value in saved.items() if name != "worth"})


def on_one_rank(rank: int, world: int) -> dict[str, list]:
    """What replicas and shards find in four steps at the same parameters."""
    found = {}
    for kind in ("ddp", "fsdp"):
        model = new_model()
        if kind == "ddp":
            model = DistributedDataParallel(model)
        else:
            fully_shard(model, mesh=init_device_mesh("cpu", (world,)))
        mixer = gac.patch(model, law="aim", estimator="exact" if kind == "ddp" else "sketch", interval=1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        rows = []
        for step in range(4):
            one_step(model, mixer, optimizer, step, rank=rank)
            assert math.isfinite(float(mixer.mu))  # waits for the step
            rows.append(mixer._measurement.worth.latest.values.tolist())
        found[kind] = rows
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return on_ranks(2, tmp_path_factory.mktemp("worth"), on_one_rank, preload=__name__, seconds=120)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_ranks_find_what_one_process_would(ranks, kind):
    model, truth = new_model(), Truth()
    for step, (one, other) in enumerate(zip(ranks[0][kind], ranks[1][kind], strict=True)):
        assert repr(one) == repr(other)
        gradients = {branch: true_gradient(model, step, branch, world=2) for branch in BRANCHES}
        close(one, truth.products(step, gradients), max(float(g @ g) for g in gradients.values()))


def test_names():
    assert [f"worth_{now[0]}{before[0]}" for now, before in PAIRS] == list(WORTH)


def test_metrics_show_the_aim():
    model = new_model()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    with gac.patch(model, law="aim", interval=1) as mixer:
        for step in range(12):
            one_step(model, mixer, optimizer, step)
        metrics = mixer.metrics(wait=True)
        state = mixer.controller.law.state
        assert mixer.controller.law.momentum == 0.9
    for name in ("alpha", "alpha_se", "share", "trust"):
        assert metrics[name] == float(state[name])
    assert metrics["mu_raw"] == float(state["raw"])
    assert metrics["share"] != 0.5
    assert "alpha" not in gac.patch(new_model()).metrics()

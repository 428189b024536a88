"""``metric="optimizer"``: statistics of gradients divided by Adam's ``sqrt(v_hat) + eps``, against autograd."""

from __future__ import annotations

import math

import pytest
import torch

import gac
from gac.observe import optimizer_space
from gac.observe.optimizer_space import WARM_UP, SecondMoments
from gac_kernels import reference
from tests.gac.models import VOCABULARY, rl_loss, sft_loss, tiny_model, tokens
from tests.gac.truth import statistics

NUMBERS = ("sigma_s2", "sigma_r2", "delta_g2", "distance2", "norm_s2", "norm_r2", "dot")

OPTIMIZERS = {
    "AdamW": lambda p, **o: torch.optim.AdamW(p, lr=1e-3, **o),
    "Adam, amsgrad": lambda p, **o: torch.optim.Adam(p, lr=1e-3, amsgrad=True, betas=(0.9, 0.9), **o),
    "AdamW, foreach": lambda p, **o: torch.optim.AdamW(p, lr=1e-3, foreach=True, betas=(0.8, 0.95), **o),
    "AdamW, fused": lambda p, **o: torch.optim.AdamW(p, lr=1e-3, fused=True, **o),
    "NAdam": lambda p, **o: torch.optim.NAdam(p, lr=1e-3, **o),
}


def denominators(optimizer, parameters, *, eps_factor=lambda correction: 1.0) -> list[torch.Tensor | None]:
    """``sqrt(v_hat) + eps`` of each parameter from the optimizer's state, in float64; None where there is none.

    Infinity where ``v`` is 0: those elements count as 0.
    """
    group = optimizer.param_groups[0]
    found = []
    for p in parameters:
        state = optimizer.state.get(p)
        if not state:
            found.append(None)
            continue
        v = state["max_exp_avg_sq"] if group.get("amsgrad") else state["exp_avg_sq"]
        correction = 1.0 - group["betas"][1] ** float(state["step"])
        found.append((v.double() / correction).sqrt() + group["eps"] * eps_factor(correction))
        found[-1].masked_fill_(v == 0, math.inf)
    return found


def contributions(losses, parameters, denominators) -> list[torch.Tensor]:
    """Flat gradients by torch.autograd.grad, divided; zeros where a parameter has no gradient or no moments."""
    found = []
    for loss in losses:
        gradients = torch.autograd.grad(loss(), parameters, allow_unused=True)
        parts = [
            torch.zeros_like(p, dtype=torch.float64) if g is None or d is None else g.double() / d
            for p, g, d in zip(parameters, gradients, denominators, strict=True)
        ]
        found.append(torch.cat([part.flatten() for part in parts]))
    return found


def assert_equal(found: gac.Statistics, truth: dict[str, float], *, rel: float) -> None:
    """``delta_g2`` and ``dot`` are differences of numbers as large as the norms: they get those as their scale."""
    scale = truth["norm_s2"] + truth["norm_r2"]
    for name in NUMBERS:
        loose = 0.1 * rel * scale if name in ("delta_g2", "dot") else 0.0
        assert float(getattr(found, name)) == pytest.approx(truth[name], rel=rel, abs=loose), name


def branches(model, seed: int, n_s: int = 2, n_r: int = 3, factor: float = 1.0, vocabulary: int = VOCABULARY):
    """Losses of one step's micro-batches, as functions. Of the vocabulary the first ``vocabulary`` tokens occur."""
    sft = [lambda b=b: factor * sft_loss(model, b % vocabulary) / n_s for b in tokens(n_s, seed)]
    rl = [lambda b=b: factor * rl_loss(model, b % vocabulary) / n_r for b in tokens(n_r, seed + 1000)]
    return sft, rl


def warm(optimizer, steps: int = WARM_UP - 1) -> None:
    """Steps on random gradients, of the size that the models of these tests have."""
    generator = torch.Generator().manual_seed(99)
    for _ in range(steps):
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = 0.01 * torch.randn(p.shape, generator=generator)
        optimizer.step()
    optimizer.zero_grad()


def backward(mixer, sft, rl) -> None:
    for branch, losses in ((mixer.sft, sft), (mixer.rl, rl)):
        with branch():
            for loss in losses:
                mixer.backward(loss())


@pytest.mark.parametrize("estimator", ["exact", "sketch"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_statistics_are_those_of_the_divided_gradients(name, estimator):
    """The step in which the optimizer takes its tenth is not measured, the next is."""
    model = tiny_model()
    parameters = list(model.parameters())
    optimizer = OPTIMIZERS[name](parameters)
    warm(optimizer)
    with gac.patch(model, estimator=estimator, optimizer=optimizer, metric="optimizer") as mixer:
        for step in range(4):
            sft, rl = branches(model, step)
            if step:
                divisors = denominators(optimizer, parameters)
                truth = statistics(*(contributions(losses, parameters, divisors) for losses in (sft, rl)))
            backward(mixer, sft, rl)
            optimizer.step()
            optimizer.zero_grad()
            if step == 0:
                assert mixer.statistics is None
                assert math.isnan(mixer.metrics(wait=True)["sigma_s2"])
            else:
                assert_equal(mixer.statistics, truth, rel=1e-5 if estimator == "exact" else 1e-4)


def test_a_sketch_that_loses_something(monkeypatch):
    """With colliding elements: the numbers of the sketched vectors ``S (x / (sqrt(v_hat) + eps))``, by the oracle."""
    monkeypatch.setattr("gac.observe.ledger.SMALLEST_SKETCH", 4096)
    model = tiny_model()
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    warm(optimizer)
    with gac.patch(model, estimator="sketch", optimizer=optimizer, metric="optimizer") as mixer:
        layout = mixer._observer.ledgers[0].layout
        assert not layout.lossless
        for step in range(3):
            sft, rl = branches(model, step)
            if step:
                divisors, sketched = denominators(optimizer, parameters), []
                for x in contributions(sft, parameters, divisors) + contributions(rl, parameters, divisors):
                    out = torch.zeros(layout.size, dtype=torch.float64)
                    reference.sketch(list(x.split(layout.numels)), out, layout=layout)
                    sketched.append(out)
                truth = statistics(sketched[: len(sft)], sketched[len(sft) :])
            backward(mixer, sft, rl)
            optimizer.step()
            optimizer.zero_grad()
        assert_equal(mixer.statistics, truth, rel=1e-4)


@pytest.mark.parametrize("device_counts", [False, True], ids=["steps on the host", "steps on the device"])
def test_where_eps_matters(device_counts, monkeypatch):
    """Gradients so small that eps is half of the denominator.

    On the host it is Adam's ``sqrt(v_hat) + eps``; where the count of steps stays on the device, ``eps`` counts
    ``1/sqrt(1 - beta2^t)`` times.
    """
    if device_counts:
        monkeypatch.setattr(optimizer_space, "_on_host", lambda step: None)
    model = tiny_model()
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, eps=1e-2)
    warm(optimizer)
    with gac.patch(model, estimator="exact", optimizer=optimizer, metric="optimizer") as mixer:
        for step in range(3):
            sft, rl = branches(model, step, factor=0.1)
            if step:
                factor = (lambda c: 1 / math.sqrt(c)) if device_counts else (lambda c: 1.0)
                divisors = denominators(optimizer, parameters, eps_factor=factor)
                truth = statistics(*(contributions(losses, parameters, divisors) for losses in (sft, rl)))
                divisors = denominators(optimizer, parameters, eps_factor=lambda c: 1e-9)
                without = statistics(*(contributions(losses, parameters, divisors) for losses in (sft, rl)))
            backward(mixer, sft, rl)
            optimizer.step()
            optimizer.zero_grad()
        assert without["sigma_s2"] > 1.2 * truth["sigma_s2"], "the comparison means something"
        assert_equal(mixer.statistics, truth, rel=1e-5)


def layers(seed: int = 0):
    torch.manual_seed(seed)
    return torch.nn.ModuleDict({"shared": torch.nn.Linear(8, 8), "late": torch.nn.Linear(8, 8)})


@pytest.mark.parametrize("estimator", ["exact", "sketch"])
def test_parameters_that_joined_late(estimator):
    """A layer used from the third step on counts once it has taken ten, by its own number of steps."""
    model = layers()
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    generator = torch.Generator().manual_seed(0)

    def loss(use_late: bool):
        x = torch.randn(4, 8, generator=generator)

        def compute():
            hidden = model["shared"](x)
            return (model["late"](hidden) if use_late else hidden).square().mean()

        return compute

    with gac.patch(model, estimator=estimator, optimizer=optimizer, metric="optimizer") as mixer:
        for step in range(WARM_UP + 5):
            sft, rl = [loss(step >= 2) for _ in range(2)], [loss(False) for _ in range(2)]
            divisors = denominators(optimizer, parameters)
            if step < WARM_UP + 2:
                divisors[2:] = None, None
            truth = statistics(*(contributions(losses, parameters, divisors) for losses in (sft, rl)))
            backward(mixer, sft, rl)
            optimizer.step()
            optimizer.zero_grad()
            if step < WARM_UP:
                assert mixer.statistics is None
            else:
                assert_equal(mixer.statistics, truth, rel=1e-5 if estimator == "exact" else 1e-4)
        steps = [float(optimizer.state[p]["step"]) for p in parameters]
        assert steps == [WARM_UP + 5] * 2 + [WARM_UP + 3] * 2


def test_the_mixer_may_step_first():
    """``mixer.step()`` before ``optimizer.step()``, the optimizer only followed."""
    results = []
    for mixer_first in (False, True):
        model = tiny_model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        warm(optimizer)
        with gac.patch(model, estimator="exact", metric="optimizer", law="fixed", mu=0.5) as mixer:
            mixer.follow(optimizer)
            for step in range(4):
                backward(mixer, *branches(model, step))
                for action in (mixer.step, optimizer.step) if mixer_first else (optimizer.step, mixer.step):
                    action()
                optimizer.zero_grad()
            results.append({name: float(getattr(mixer.statistics, name)) for name in NUMBERS})
    assert results[1] == pytest.approx(results[0], rel=1e-6)


@pytest.mark.parametrize("estimator", ["exact", "sketch"])
def test_a_token_that_occurs_for_the_first_time(estimator):
    """The row of an untied embedding that has had no gradient yet is left out; divided by eps alone it would be all."""
    model = tiny_model(tied=False)
    parameters = list(model.parameters())
    row = model.get_input_embeddings().weight
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    with gac.patch(model, estimator=estimator, optimizer=optimizer, metric="optimizer") as mixer:
        for step in range(WARM_UP + 1):
            new = step == WARM_UP
            sft, rl = branches(model, step, vocabulary=VOCABULARY if new else VOCABULARY - 1)
            if new:
                divisors = denominators(optimizer, parameters)
                truth, by_eps = (
                    statistics(*(contributions(losses, parameters, d) for losses in (sft, rl)))
                    for d in (divisors, [d.where(d.isfinite(), torch.tensor(1e-8)) for d in divisors])
                )
            backward(mixer, sft, rl)
            if new:
                assert (optimizer.state[row]["exp_avg_sq"] == 0).sum() == row.shape[1]
                assert row.grad[-1].abs().min() > 0
            optimizer.step()
            optimizer.zero_grad()
        print(f"norm_s2 {float(mixer.statistics.norm_s2):.3g}, divided by eps {by_eps['norm_s2']:.3g}")
        assert by_eps["norm_s2"] > 1e6 * truth["norm_s2"]
        assert_equal(mixer.statistics, truth, rel=1e-5 if estimator == "exact" else 1e-4)


def test_lone_contributions():
    """N = 1, through time: on gradients whose distribution stands still, the noise in Adam's space.

    512 weights of deviations from 0.1 to 10, with means as large. ``v_hat`` is known from the state, so the truth of
    every step is too: the mean ratio over 250 steps is 1 within 4 standard errors.
    """
    torch.manual_seed(0)
    size, first, last = 512, 150, 400
    model = torch.nn.Linear(size, 1, bias=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.99))
    deviation = torch.logspace(-1, 1, size)
    ratios = []
    with gac.patch(model, estimator="exact", optimizer=optimizer, metric="optimizer", law="fixed") as mixer:
        for step in range(last):
            for branch in (mixer.sft, mixer.rl):
                with branch():
                    mixer.backward((model.weight * (torch.randn(1, size) + 1.0) * deviation).sum())
            if step >= first:
                divisor = denominators(optimizer, list(model.parameters()))[0]
            optimizer.step()
            optimizer.zero_grad()
            if step >= first:
                true = float((deviation / divisor).square().sum())
                ratios.append(float(mixer.statistics.sigma_s2) / true)
        assert mixer.metrics(wait=True)["estimator"] == "exact+time"
    ratios = torch.tensor(ratios)
    error = float(ratios.std()) / math.sqrt(len(ratios) / 2)  # neighbours share the mean that they are compared with
    print(f"mean ratio {float(ratios.mean()):.4f} +- {error:.4f}")
    assert abs(float(ratios.mean()) - 1) < 4 * error


def test_what_it_changes():
    """A loud part decides in the gradients' space; in Adam's every element has the same say.

    100 loud elements (30 times) in which rollouts have 4 times the noise of demonstrations, 300 quiet ones the other
    way round, no signal. The closed form at alpha = 0.5 is ``sigma_r2 / (sigma_s2 + sigma_r2)``. ``v`` is the mean
    square of the mixed gradient: with half weights, an element of noises 1 and 4 has 5/4, and counts 4/5 and 16/5.
    """
    scale = torch.cat([torch.full((100,), 30.0), torch.ones(300)])
    deviations = [
        scale * torch.cat([torch.full((100,), a), torch.full((300,), b)]) for a, b in ((1.0, 2.0), (2.0, 1.0))
    ]
    found = {}
    for metric in ("gradient", "optimizer"):
        torch.manual_seed(0)
        model = torch.nn.Linear(400, 1, bias=False)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
        noises = []
        with gac.patch(model, estimator="exact", optimizer=optimizer, metric=metric, law="fixed", mu=0.5) as mixer:
            for step in range(200):
                for branch, deviation in zip((mixer.sft, mixer.rl), deviations, strict=True):
                    with branch():
                        for _ in range(2):
                            mixer.backward((model.weight * torch.randn(1, 400) * deviation).sum() / 2**0.5)
                optimizer.step()
                optimizer.zero_grad()
                if step >= 100:
                    noises.append([float(mixer.statistics.sigma_s2), float(mixer.statistics.sigma_r2)])
        sigma_s2, sigma_r2 = torch.tensor(noises).mean(0).tolist()
        found[metric] = sigma_r2 / (sigma_s2 + sigma_r2)
    expected = {
        "gradient": (100 * 900 * 4 + 300) / (100 * 900 * 5 + 300 * 5),
        "optimizer": (100 * 16 + 300 * 4) / (100 * (4 + 16) + 300 * (16 + 4)),
    }
    print(f"mu {found}, expected {expected}")
    # relative errors of mean noises over 100 steps: sqrt(2 / (100 * 100)) = 1.4% and less
    assert found == pytest.approx(expected, rel=0.04)


class TestRefused:
    @pytest.mark.parametrize("make", [lambda p: torch.optim.SGD(p, lr=0.1), torch.optim.Adagrad])
    def test_other_optimizers(self, make):
        model = layers()
        optimizer = make(model.parameters())
        with pytest.raises(TypeError, match=rf"Adam family.*got {type(optimizer).__name__}"):
            gac.patch(model, optimizer=optimizer, metric="optimizer")

    @pytest.mark.parametrize(
        ("change", "match"), [({"eps": 1e-6}, r"one eps.*1e-08.*1e-06"), ({"betas": (0.9, 0.95)}, r"one beta2.*0\.95")]
    )
    def test_groups_that_differ(self, change, match):
        model = layers()
        groups = [{"params": model["shared"].parameters()}, {"params": model["late"].parameters(), **change}]
        optimizer = torch.optim.AdamW(groups)
        with pytest.raises(ValueError, match=match):
            gac.patch(model, optimizer=optimizer, metric="optimizer")

    def test_a_group_added_later(self):
        model = layers()
        optimizer = torch.optim.AdamW(model["shared"].parameters(), eps=1e-8)
        warm(optimizer)
        with gac.patch(model, metric="optimizer") as mixer:
            mixer.follow(optimizer)
            for last in (False, True):
                for branch in (mixer.sft, mixer.rl):
                    with branch():
                        mixer.backward(model["shared"](torch.randn(2, 8)).sum())
                optimizer.step()
                if last:
                    optimizer.add_param_group({"params": model["late"].parameters(), "eps": 1e-6})
                    with pytest.raises(ValueError, match="one eps"):
                        mixer.step()
                else:
                    mixer.step()

    def test_states_of_another_kind(self):
        parameter = torch.nn.Parameter(torch.ones(3))
        optimizer = torch.optim.AdamW([parameter])
        moments = SecondMoments(optimizer)
        assert not moments.ready
        assert moments.of(parameter) is None
        optimizer.state[parameter] = {"step": torch.tensor(1.0), "state2": torch.zeros(3, dtype=torch.uint8)}
        with pytest.raises(TypeError, match=r"exp_avg_sq.*AdamW has .*state2"):
            moments.of(parameter)
        optimizer.state[parameter] = {"exp_avg_sq": torch.zeros(3)}
        with pytest.raises(TypeError, match=r'"step".*AdamW has none'):
            _ = moments.ready


def test_an_optimizer_that_nobody_named_lends_its_moments():
    """The first that steps the model is followed: nothing is measured before, the same as with ``follow`` after."""
    found = []
    for named in (True, False):
        model = tiny_model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        with gac.patch(model, estimator="exact", metric="optimizer", law="fixed", mu=0.5) as mixer:
            if named:
                mixer.follow(optimizer)
            measured = []
            for step in range(WARM_UP + 2):
                backward(mixer, *branches(model, step))
                optimizer.step()
                mixer.step()
                optimizer.zero_grad()
                measured.append(mixer.statistics is not None)
            found.append((measured, {name: float(getattr(mixer.statistics, name)) for name in NUMBERS}))
    assert found[0] == found[1]
    assert found[0][0] == [False] * WARM_UP + [True] * 2


def test_an_optimizer_is_no_name_of_a_metric():
    model = layers()
    with pytest.raises(ValueError, match=r"unknown metric 'Adam'.*mixer\.follow"):
        gac.patch(model, metric=torch.optim.Adam(model.parameters()))

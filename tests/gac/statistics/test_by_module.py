"""Statistics by module: each is its definition, and they add up to the whole model's."""

from __future__ import annotations

import pytest
import torch

import gac
from gac.observe.module_names import group_parameters
from gac.observe.observer import Observer
from gac.statistics import COLUMNS
from tests.gac.models import rl_loss, sft_loss, tiny_model, tokens
from tests.gac.truth import statistics

MODES = {
    "direct": {"estimator": "exact"},
    "running": {"estimator": "sketch"},
    "running, colliding": {"estimator": "sketch", "buckets": 4096},
    "incoming": {"estimator": "sketch", "incoming": True},
    "incoming, colliding": {"estimator": "sketch", "incoming": True, "buckets": 4096},
}
COUNTS = (120, 30, 350)
"""Tokens of the SFT contributions, where they are told."""


@pytest.fixture(params=MODES)
def estimator(request, monkeypatch) -> str:
    """Puts ``gac.patch`` into a mode; incoming gradients are otherwise read on several ranks alone."""
    mode = MODES[request.param]
    monkeypatch.setattr("gac.observe.ledger.SMALLEST_SKETCH", mode.get("buckets", 65_536))
    if mode.get("incoming"):
        monkeypatch.setattr("gac.measurement.Observer", lambda *args, **options: Observer(*args, **options | INCOMING))
    return mode["estimator"]


INCOMING = {"running": False}


def losses(model, step: int, weighted: bool):
    """The loss functions and token counts of a step's contributions."""
    counts = [n / sum(COUNTS) for n in COUNTS] if weighted else [1 / 3] * 3
    sft = [lambda b=b, w=w: w * sft_loss(model, b) for b, w in zip(tokens(3, step), counts, strict=True)]
    rl = [lambda b=b: rl_loss(model, b) / 2 for b in tokens(2, step + 100)]
    return sft, rl


def run(model, *, steps: int, weighted: bool = False, follow=None, **options):
    """The mixer after some steps, at parameters that stay."""
    found = []
    with gac.patch(model, law="fixed", **options) as mixer:
        if follow is not None:
            mixer.follow(follow)
        for step in range(steps):
            sft, rl = losses(model, step, weighted)
            with mixer.sft():
                for loss, count in zip(sft, COUNTS, strict=True):
                    mixer.backward(loss(), tokens=count if weighted else None)
            with mixer.rl():
                for loss in rl:
                    mixer.backward(loss())
            mixer.step()
            model.zero_grad()
            found.append((mixer.statistics, mixer.modules))
    return found


def scale(found: gac.Statistics) -> float:
    return float(found.norm_s2 + found.norm_r2)


@pytest.mark.parametrize("weighted", [False, True], ids=["alike", "tokens"])
def test_modules_add_up(estimator, weighted):
    """To 1e-6 of the whole model's numbers, which are those of a step that is not taken apart."""
    model = tiny_model()
    (_, _), (whole, modules) = run(model, steps=2, weighted=weighted, estimator=estimator, report_interval=1)
    (_, _), (plain, nothing) = run(model, steps=2, weighted=weighted, estimator=estimator, report_interval=None)
    assert nothing is None
    assert modules.step == 2
    assert modules.whole is not None
    for name, total in zip(COLUMNS, modules.total().tolist(), strict=True):
        for number in (float(getattr(whole, name)), float(getattr(plain, name))):
            assert total == pytest.approx(number, rel=1e-6, abs=1e-6 * scale(whole)), name


@pytest.mark.parametrize("weighted", [False, True], ids=["alike", "tokens"])
def test_each_module_is_its_definition(weighted):
    """Against autograd in float64, module by module."""
    model = tiny_model("llama", tied=False)
    names, parameters = zip(*model.named_parameters(), strict=True)
    labels, module_of = group_parameters(names)
    sft, rl = losses(model, 0, weighted)
    by_loss = [[torch.autograd.grad(loss(), parameters) for loss in branch] for branch in (sft, rl)]
    [(_, modules)] = run(model, steps=1, weighted=weighted, estimator="exact", report_interval=1)
    assert modules.labels == tuple(labels)
    w = torch.tensor(COUNTS, dtype=torch.float64) / sum(COUNTS)
    for number, label in enumerate(labels):
        own = [k for k, module in enumerate(module_of) if module == number]
        x_s, x_r = ([torch.cat([g[k].double().flatten() for k in own]) for g in branch] for branch in by_loss)
        truth = statistics(x_s, x_r)
        if weighted:
            power = sum(float(x.square().sum() / v) for x, v in zip(x_s, w, strict=True))
            truth["sigma_s2"] = (power - truth["norm_s2"]) / 2
            truth["delta_g2"] = truth["distance2"] - truth["sigma_s2"] - truth["sigma_r2"]
        found = modules.module(label)
        size = truth["norm_s2"] + truth["norm_r2"]
        for name in COLUMNS:
            assert found[name] == pytest.approx(truth[name], rel=1e-5, abs=1e-5 * size), (label, name)


def test_report_interval(estimator):
    """Every third measured step; with ``interval=2`` that is every sixth optimizer step."""
    found = run(tiny_model(), steps=12, estimator=estimator, interval=2, report_interval=3)
    steps = [None if modules is None else modules.step for _, modules in found]
    assert steps == [None] * 4 + [5] * 6 + [11] * 2
    measured = [statistics is not None for statistics, _ in found]
    assert measured == [True, False] * 6


def test_in_the_space_of_the_optimizer():
    model = tiny_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(10):
        for p in model.parameters():
            p.grad = 0.01 * torch.randn(p.shape, generator=generator)
        optimizer.step()
    optimizer.zero_grad()
    [(whole, modules)] = run(model, steps=1, follow=optimizer, estimator="exact", metric="optimizer", report_interval=1)
    for name, total in zip(COLUMNS, modules.total().tolist(), strict=True):
        assert total == pytest.approx(float(getattr(whole, name)), rel=1e-6, abs=1e-6 * scale(whole)), name
    [(plain, _)] = run(model, steps=1, estimator="exact", report_interval=1)
    assert float(whole.sigma_s2) != pytest.approx(float(plain.sigma_s2), rel=0.5)


def test_a_branch_that_is_missing():
    """Its numbers, and those of both, are unknown in every module; the other's are there."""
    model = tiny_model()
    with gac.patch(model, estimator="exact", report_interval=1) as mixer:
        with mixer.sft():
            for batch in tokens(2, 0):
                mixer.backward(sft_loss(model, batch))
        mixer.step()
        values = dict(zip(COLUMNS, mixer.modules.values.T, strict=True))
        assert values["sigma_s2"].isfinite().all()
        for name in ("sigma_r2", "delta_g2", "distance2", "norm_r2", "dot"):
            assert values[name].isnan().all()


@pytest.mark.parametrize("alternate", [False, True])
def test_a_step_of_mixed_losses_is_not_taken_apart(alternate):
    """It is measured by tokens, which say nothing of modules: absent, not zeros that a report would average."""
    model = tiny_model()
    with gac.patch(model, law="fixed", report_interval=1) as mixer:
        for step in range(4):
            sft, rl = losses(model, step, False)
            if alternate and step % 2:
                with mixer.sft():
                    [mixer.backward(loss()) for loss in sft]
                with mixer.rl():
                    [mixer.backward(loss()) for loss in rl]
            else:
                mixer.mixed_loss(sft_loss=sum(x() for x in sft), rl_loss=sum(x() for x in rl)).backward()
                mask, expert = torch.ones(4, 3), torch.arange(4) < 2
                mixer.observe_tokens(-mask, torch.tensor([1.0, -1.0, 1.0, -1.0]), mask, expert)
            mixer.step()
            assert mixer.statistics is not None
            if not alternate:
                assert mixer.modules is None
            model.zero_grad()
        kept = list(mixer._measurement.modules)
        assert [m.step for m in kept] == ([2, 4] if alternate else [])
        assert all((m.values[:, COLUMNS.index("norm_s2")] > 0).any() for m in kept)
        assert all(m.whole.norm_s2.isfinite() for m in kept)

"""One hook instead of one for each parameter: the same numbers, and nothing lost when somebody runs passes himself."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import gac
from gac.observe.hooks import Guided


class Model(torch.nn.Module):
    def __init__(self, *, tied=False, frozen=False, checkpointed=None):
        super().__init__()
        torch.manual_seed(0)
        self.embed = torch.nn.Embedding(7, 6)
        self.blocks = torch.nn.ModuleList(torch.nn.Linear(6, 6) for _ in range(3))
        self.aside = torch.nn.Linear(6, 2)
        self.head = torch.nn.Linear(6, 7, bias=False)
        if tied:
            self.head.weight = self.embed.weight
        if frozen:
            self.embed.requires_grad_(False)
        self.checkpointed = checkpointed

    def forward(self, seed, *, through="head"):
        tokens = torch.randint(0, 7, (4, 5), generator=torch.Generator().manual_seed(seed))
        x = self.embed(tokens)
        for block in self.blocks:
            step = lambda x, block=block: torch.tanh(block(x)) + x
            x = step(x) if self.checkpointed is None else checkpoint(step, x, use_reentrant=self.checkpointed)
        if through == "aside":
            return self.aside(x.detach()).square().mean()
        return torch.nn.functional.cross_entropy(self.head(x).flatten(0, 1), tokens.flatten())


def hooks_of(mixer):
    return mixer._observer._hooks.count


def train(mixer, model, steps, *, run=None):
    """Statistics after each step; ``run(mixer, model, step, k)`` makes a pass, by default the mixer does."""
    run = run or (lambda mixer, model, step, k: mixer.backward(model(100 * step + k)))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    found = []
    for step in range(steps):
        for branch, first in ((mixer.sft, 0), (mixer.rl, 10)):
            with branch():
                for k in range(3):
                    run(mixer, model, step, first + k)
        optimizer.step()
        mixer.step()
        statistics = mixer.statistics
        found.append([] if statistics is None else [*statistics.stacked().tolist(), float(mixer.mu)])
        optimizer.zero_grad()
    return found


def both(monkeypatch, *, run=None, steps=6, model=None, expect=1, **options):
    """Runs with a hook on every parameter, then as it comes; returns the skipped steps of both."""
    options = {"estimator": "sketch", "interval": 1} | options
    found, skipped = [], []
    for light in (False, True):
        with monkeypatch.context() as patch:
            if not light:
                patch.setattr(Guided, "step_ended", lambda self: None)
            net = Model(**(model or {}))
            with gac.patch(net, **options) as mixer:
                found.append(train(mixer, net, steps, run=run))
                skipped.append(mixer.metrics()["skipped"])
                handles = hooks_of(mixer)
    assert (handles == 1) if expect == 1 else (handles > 1), handles
    broken = gac.Statistics.names().index("nonfinite")
    for hooked, alone in zip(*found, strict=True):
        if hooked and hooked[broken]:  # what is left of such a step is nothing that counts
            hooked, alone = hooked[-1:], alone[-1:]
        torch.testing.assert_close(torch.tensor(alone), torch.tensor(hooked), rtol=1e-12, atol=0, equal_nan=True)
    return skipped


@pytest.mark.parametrize(
    ("model", "options", "hooks"),
    [
        ({}, {}, 1),
        ({"tied": True}, {}, 1),
        ({"frozen": True}, {}, 1),
        ({"checkpointed": False}, {}, 1),
        ({"checkpointed": True}, {}, 2),  # passes within passes: hooks stay
        ({}, {"report_interval": 2}, 1),
        ({}, {"metric": "optimizer", "steps": 14}, 1),  # which measures once the optimizer has taken some
        ({}, {"estimator": "exact"}, 2),  # gradients are taken as they arrive
    ],
)
def test_the_same_numbers(monkeypatch, model, options, hooks):
    assert both(monkeypatch, model=model, expect=hooks, **options) == [0.0, 0.0]


def test_a_compiled_model(monkeypatch):
    def run(mixer, model, step, k):
        if not hasattr(model, "fast"):
            object.__setattr__(model, "fast", torch.compile(model, backend="aot_eager"))
        mixer.backward(model.fast(100 * step + k % 2))

    assert both(monkeypatch, run=run, steps=3) == [0.0, 0.0]


def test_hooks_are_not_put_on_and_off():
    """With an interval, every measured step would pay for that."""
    model = Model()
    with gac.patch(model, estimator="sketch", interval=3) as mixer:
        train(mixer, model, 2)
        assert hooks_of(mixer) == 0
        train(mixer, model, 1)
        assert hooks_of(mixer) == 1


def test_hooks_of_others_stay_where_ours_come_and_go():
    """Those that were there before, that came while ours were on, and that came while they were off."""
    model, seen = Model(), []
    parameter = model.head.weight

    def add(name):
        first = parameter.register_hook(lambda _: seen.append(name))
        second = parameter.register_post_accumulate_grad_hook(lambda _: seen.append(f"{name} accumulated"))
        return first, second

    kept, expected = [add("before")], ["before", "before accumulated"]
    with gac.patch(model, estimator="exact", interval=2, report_interval=None) as mixer:
        for step in range(8):
            if step in (2, 3):  # ours are on, then off
                kept.append(add(f"at {step}"))
                expected += [f"at {step}", f"at {step} accumulated"]
            for branch in (mixer.sft, mixer.rl):
                with branch():
                    seen.clear()
                    mixer.backward(model(step))
                    assert sorted(seen) == sorted(expected)
            assert (hooks_of(mixer) > 1) == (step % 2 == 0)
            model.zero_grad()
            mixer.step()
            assert (float(mixer.metrics()["n_s"]) == 1) == (step % 2 == 0)
            if step == 5:
                for handle in kept.pop():
                    handle.remove()
                del expected[-2:]
        while kept:
            for handle in kept.pop():
                handle.remove()
        for step in range(2):  # nobody's but ours again
            for branch in (mixer.sft, mixer.rl):
                with branch():
                    mixer.backward(model(step))
            mixer.step()
        assert all(p._backward_hooks for p in model.parameters())
    for p in model.parameters():
        assert p._backward_hooks is None
        assert not p._post_accumulate_grad_hooks


def test_a_parameter_that_was_frozen_is_named_when_hooks_come_again():
    model = Model()
    with gac.patch(model, estimator="exact", interval=2, report_interval=None) as mixer:
        for step in range(2):
            with mixer.sft():
                mixer.backward(model(step))
            if step == 0:
                mixer.step()
        model.head.weight.requires_grad_(False)
        with pytest.raises(RuntimeError, match="doesn't require gradient"):
            mixer.step()


@pytest.mark.parametrize("step_of", [1, 3])
def test_a_pass_of_somebody_else_meets_the_sentinel_and_is_measured(monkeypatch, step_of):
    def run(mixer, model, step, k):
        if step == step_of and k == 11:
            (mixer.weight * model(100 * step + k)).backward()
        else:
            mixer.backward(model(100 * step + k))

    assert both(monkeypatch, run=run, expect=2) == [0.0, 0.0]


def test_a_pass_that_misses_the_sentinel_costs_its_step_and_brings_hooks_back():
    def run(mixer, model, step, k):
        if step == 2 and k == 12:
            (mixer.weight * model(step, through="aside")).backward()
        else:
            mixer.backward(model(100 * step + k))

    model = Model()
    with gac.patch(model, estimator="sketch", interval=1) as mixer:
        train(mixer, model, 5, run=run)
        assert mixer.metrics()["skipped"] == 1
        assert hooks_of(mixer) > 1


def test_clipping_and_scaling_and_clearing_in_between(monkeypatch):
    def run(mixer, model, step, k):
        mixer.backward(model(100 * step + k))
        if k in (1, 12):
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        if k == 2 and step % 2:
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(0.5)
        if k == 10 and step == 3:
            model.zero_grad(set_to_none=step % 2 == 0)

    assert both(monkeypatch, run=run) == [0.0, 0.0]


def test_passes_of_another_model_in_between(monkeypatch):
    """They have numbers too; clipping beside them cannot be told from a pass that missed the sentinel."""
    critic = torch.nn.Linear(3, 1)

    def run(mixer, model, step, k):
        mixer.backward(model(100 * step + k))
        critic(torch.ones(1, 3)).sum().backward()

    assert both(monkeypatch, run=run) == [0.0, 0.0]


def test_a_guided_pass_that_raises(monkeypatch):
    def fails(gradient):
        raise ValueError("in the middle")

    def run(mixer, model, step, k):
        if step == 3 and k == 1:
            handle = model.blocks[0].weight.register_hook(fails)
            with pytest.raises(ValueError, match="in the middle"):
                mixer.backward(model(100 * step + k))
            handle.remove()
        else:
            mixer.backward(model(100 * step + k))

    assert both(monkeypatch, run=run) == [1.0, 1.0]


def test_a_pass_outside_a_branch_is_refused_all_the_same():
    model = Model()
    with gac.patch(model, estimator="sketch", interval=1) as mixer:
        train(mixer, model, 2)
        assert hooks_of(mixer) == 1
        with pytest.raises(RuntimeError, match="outside a branch"):
            model(1).backward()


def test_passes_aside_are_no_part_of_the_step(monkeypatch):
    def run(mixer, model, step, k):
        mixer.backward(model(100 * step + k))

    found = []
    for light in (False, True):
        with monkeypatch.context() as patch:
            if not light:
                patch.setattr(Guided, "step_ended", lambda self: None)
            model = Model()
            with gac.patch(model, estimator="sketch", interval=1) as mixer:
                train(mixer, model, 3, run=run)
                with mixer.aside():
                    model(5).backward()
                model.zero_grad()
                found.append(torch.tensor(train(mixer, model, 2, run=run)))
                assert (hooks_of(mixer) == 1) is light
    torch.testing.assert_close(*found, rtol=1e-12, atol=0, equal_nan=True)


def test_repatching_and_unpatching_take_every_hook_off():
    model = Model()
    mixer = gac.patch(model, estimator="sketch", interval=1)
    train(mixer, model, 2)
    mixer.repatch()
    train(mixer, model, 2)
    mixer.unpatch()
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters() if p._post_accumulate_grad_hooks)

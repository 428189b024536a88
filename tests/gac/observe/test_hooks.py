"""One hook that tells, instead of all: the same numbers, and nothing lost when somebody runs passes himself."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import gac
from gac.observe.hooks import Guided
from gac.observe.ledger import Ledger


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


ESTIMATORS = pytest.mark.parametrize("estimator", ["sketch", "exact"])


def hooks_of(mixer):
    return mixer._observer._hooks.count


def is_light(mixer):
    """Whether only the sentinel's hook is told whose pass it is in."""
    return mixer._observer._hooks.sentinel is not None


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


def both(monkeypatch, *, run=None, steps=6, model=None, light=True, **options):
    """Runs with all hooks on every parameter, then as it comes, to the bit where gradients are taken as they arrive;
    ``light``: what it comes to in the end. Returns the skipped steps of both."""
    options = {"estimator": "sketch", "interval": 1} | options
    found, skipped = [], []
    for may_be in (False, True):
        with monkeypatch.context() as patch:
            if not may_be:
                patch.setattr(Guided, "step_ended", lambda self: None)
            net = Model(**(model or {}))
            with gac.patch(net, **options) as mixer:
                found.append(train(mixer, net, steps, run=run))
                skipped.append(mixer.metrics()["skipped"])
                assert is_light(mixer) is (light and may_be)
    rtol = 0 if options["estimator"] == "exact" else 1e-12
    broken = gac.Statistics.names().index("nonfinite")
    for hooked, alone in zip(*found, strict=True):
        if hooked and hooked[broken]:  # what is left of such a step is nothing that counts
            hooked, alone = hooked[-1:], alone[-1:]
        torch.testing.assert_close(torch.tensor(alone), torch.tensor(hooked), rtol=rtol, atol=0, equal_nan=True)
    return skipped


@ESTIMATORS
@pytest.mark.parametrize(
    ("model", "options", "light"),
    [
        ({}, {}, True),
        ({"tied": True}, {}, True),
        ({"frozen": True}, {}, True),
        ({"checkpointed": False}, {}, True),
        ({"checkpointed": True}, {}, False),  # passes within passes: hooks stay
        ({}, {"report_interval": 2}, True),
        ({}, {"metric": "optimizer", "steps": 14}, True),  # which measures once the optimizer has taken some
    ],
)
def test_the_same_numbers(monkeypatch, estimator, model, options, light):
    assert both(monkeypatch, model=model, light=light, estimator=estimator, **options) == [0.0, 0.0]


def test_gradients_beyond_a_bucket_are_read_on_the_way(monkeypatch):
    """Where nothing reads them before the pass is over, all of them would have to be kept."""
    monkeypatch.setattr("gac.observe.pending.BUCKET_BYTES", 4 * 100)
    assert both(monkeypatch, light=False, estimator="exact") == [0.0, 0.0]


def test_sparse_gradients(monkeypatch):
    def run(mixer, model, step, k):
        model.embed.sparse = True
        mixer.backward(model(100 * step + k))

    monkeypatch.setattr(torch.optim, "Adam", torch.optim.SGD)  # which takes them
    assert both(monkeypatch, run=run, estimator="exact") == [0.0, 0.0]


@ESTIMATORS
def test_a_compiled_model(monkeypatch, estimator):
    def run(mixer, model, step, k):
        if not hasattr(model, "fast"):
            object.__setattr__(model, "fast", torch.compile(model, backend="aot_eager"))
        mixer.backward(model.fast(100 * step + k % 2))

    assert both(monkeypatch, run=run, steps=3, estimator=estimator) == [0.0, 0.0]


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


@pytest.mark.parametrize("frozen_at", [0, 2])
def test_a_parameter_that_is_frozen_and_thaws(monkeypatch, frozen_at):
    """Hooks that it had stay on it; none can be put on while it is frozen."""

    def run(mixer, model, step, k):
        model.blocks[0].requires_grad_(not frozen_at <= step < 4)
        mixer.backward(model(100 * step + k))

    assert both(monkeypatch, run=run, steps=8, estimator="exact") == [0.0, 0.0]


@ESTIMATORS
@pytest.mark.parametrize("step_of", [1, 3])
def test_a_pass_of_somebody_else_meets_the_sentinel_and_is_measured(monkeypatch, estimator, step_of):
    def run(mixer, model, step, k):
        if step == step_of and k == 11:
            (mixer.weight * model(100 * step + k)).backward()
        else:
            mixer.backward(model(100 * step + k))

    assert both(monkeypatch, run=run, light=False, estimator=estimator) == [0.0, 0.0]


@ESTIMATORS
def test_a_pass_that_misses_the_sentinel_costs_its_step_and_brings_hooks_back(estimator):
    def run(mixer, model, step, k):
        if step == 2 and k == 12:
            (mixer.weight * model(step, through="aside")).backward()
        else:
            mixer.backward(model(100 * step + k))

    model = Model()
    with gac.patch(model, estimator=estimator, interval=1) as mixer:
        train(mixer, model, 5, run=run)
        assert mixer.metrics()["skipped"] == 1
        assert not is_light(mixer)


@pytest.mark.parametrize("since", [0, 3])
@pytest.mark.parametrize("after", [False, True])
def test_gradients_that_are_only_asked_for_are_no_contribution(monkeypatch, since, after):
    """``torch.autograd.grad`` runs the hooks of incoming gradients, too."""

    def run(mixer, model, step, k):
        if after:
            mixer.backward(model(100 * step + k))
        if step >= since and k in (1, 12):
            torch.autograd.grad(model(k), list(model.blocks.parameters()))
        if not after:
            mixer.backward(model(100 * step + k))

    assert both(monkeypatch, run=run, estimator="exact") == [0.0, 0.0]


def test_gradients_that_are_asked_for_inside_a_pass_cost_its_step():
    """Which of two gradients was accumulated, hooks that ask nothing cannot tell."""
    model = Model()

    def ask():
        with torch.enable_grad():
            torch.autograd.grad(model(5), list(model.blocks.parameters()))

    def run(mixer, model, step, k):
        loss = model(100 * step + k)
        if step == 3 and k == 1:
            x = torch.ones(2, 6, requires_grad=True)
            x.register_hook(lambda _: ask())
            loss = loss + x.sum()
        mixer.backward(loss)

    with gac.patch(model, estimator="exact", interval=1) as mixer:
        train(mixer, model, 5, run=run)
        assert mixer.metrics()["skipped"] == 1
        assert not is_light(mixer)


def test_a_parameter_that_comes_twice_in_a_pass(monkeypatch):
    """As in re-entrant checkpoints that share a weight. What was added as it came cannot be squared as a sum: it costs
    the step, and the hooks are back; where nothing is added before the pass ends, it is a sum."""

    def run(mixer, model, step, k):
        loss = model(100 * step + k)
        if step == 3 and k == 11:
            x = torch.ones(2, 6, requires_grad=True)
            for _ in range(2):
                x = checkpoint(lambda x: torch.tanh(model.blocks[0](x)) + x, x, use_reentrant=True)
            loss = loss + x.square().mean()
        mixer.backward(loss)

    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "begin_arriving", lambda self, *_: False)
        assert both(patch, run=run, estimator="exact") == [0.0, 0.0]
    if adds():
        model = Model()
        with gac.patch(model, estimator="exact", interval=1) as mixer:
            train(mixer, model, 5, run=run)
            assert mixer.metrics()["skipped"] == 1
            assert not is_light(mixer)


def adds():
    """Whether gradients are added as they arrive."""
    ledger = Ledger((3,), torch.device("cpu"), lossless=True, running=False)
    return ledger.sums_of_arriving([]) is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{"report_interval": None}, {"report_interval": 2}])
def test_what_is_added_as_it_arrives_is_what_one_call_adds(monkeypatch, dtype, options):
    """To the bit; in steps that are taken apart, too."""
    found = []
    for apart in (False, True):
        with monkeypatch.context() as patch:
            calls = []
            if apart:
                patch.setattr(Ledger, "begin_arriving", lambda self, *_: False)
            patch.setattr(Ledger, "read", noting(calls, Ledger.read))
            model = Model().to(dtype)
            with gac.patch(model, estimator="exact", interval=1, **options) as mixer:
                numbers = train(mixer, model, 6)
                assert len(calls) == (6 if adds() and not apart else 36)  # those of the first step
                assert is_light(mixer)
                report = [taken.values for taken in mixer._measurement.modules]
            found.append((numbers, report))
    (numbers, report), (others, their_report) = found
    assert repr(numbers) == repr(others)  # NaN among them
    assert len(report) == len(their_report) == (3 if options["report_interval"] else 0)
    for one, other in zip(report, their_report, strict=True):
        assert torch.equal(one.nan_to_num(-1.0), other.nan_to_num(-1.0))


def noting(calls, method):
    def noted(self, *arguments, **options):
        calls.append(arguments)
        return method(self, *arguments, **options)

    return noted


def test_gradients_that_are_not_plain_come_to_one_call(monkeypatch):
    """A sparse one, beside others that are added as they arrive."""
    found = []
    for apart in (False, True):
        with monkeypatch.context() as patch:
            if apart:
                patch.setattr(Ledger, "begin_arriving", lambda self, *_: False)
            model = Model()
            model.embed = torch.nn.Embedding(7, 6, sparse=True)
            with gac.patch(model, estimator="exact", interval=1, law="fixed", mu=0.5) as mixer:
                for step in range(4):
                    for branch, first in ((mixer.sft, 0), (mixer.rl, 10)):
                        with branch():
                            for k in range(3):
                                mixer.backward(model(100 * step + first + k))
                    model.zero_grad()
                    mixer.step()
                    found.append(mixer.statistics.stacked())
                assert mixer.metrics()["skipped"] == 0
    for one, other in zip(found[:4], found[4:], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-13, atol=0, equal_nan=True)


@pytest.mark.parametrize("between", [False, True])
@ESTIMATORS
def test_a_pass_of_somebody_else_that_writes_elsewhere_first(monkeypatch, estimator, between):
    """Where gradients are taken as they arrive, it is measured; not where a pass before it may have left them there."""
    critic = torch.nn.Linear(3, 1)

    def run(mixer, model, step, k):
        if step == 2 and k == 11:
            loss = model(100 * step + k)  # before what is met last, and so goes back first
            loss = loss + model(100 * step + k, through="aside")
            if between:
                critic(torch.ones(1, 3)).sum().backward()
            (mixer.weight * loss).backward()
        else:
            mixer.backward(model(100 * step + k))

    if estimator == "exact" and not between:
        assert both(monkeypatch, run=run, light=False, estimator=estimator) == [0.0, 0.0]
        return
    model = Model()
    with gac.patch(model, estimator=estimator, interval=1) as mixer:
        train(mixer, model, 5, run=run)
        assert mixer.metrics()["skipped"] == 1
        assert not is_light(mixer)


@ESTIMATORS
def test_clipping_and_scaling_and_clearing_in_between(monkeypatch, estimator):
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

    assert both(monkeypatch, run=run, estimator=estimator) == [0.0, 0.0]


@ESTIMATORS
def test_passes_of_another_model_in_between(monkeypatch, estimator):
    """They have numbers too; clipping beside them cannot be told from a pass that missed the sentinel."""
    critic = torch.nn.Linear(3, 1)

    def run(mixer, model, step, k):
        mixer.backward(model(100 * step + k))
        critic(torch.ones(1, 3)).sum().backward()

    assert both(monkeypatch, run=run, estimator=estimator) == [0.0, 0.0]


@ESTIMATORS
def test_a_guided_pass_that_raises(monkeypatch, estimator):
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

    assert both(monkeypatch, run=run, estimator=estimator) == [1.0, 1.0]


@ESTIMATORS
def test_a_pass_outside_a_branch_is_refused_all_the_same(estimator):
    model = Model()
    with gac.patch(model, estimator=estimator, interval=1) as mixer:
        train(mixer, model, 2)
        assert is_light(mixer)
        with pytest.raises(RuntimeError, match="outside a branch"):
            model(1).backward()


@ESTIMATORS
def test_passes_aside_are_no_part_of_the_step(monkeypatch, estimator):
    def run(mixer, model, step, k):
        mixer.backward(model(100 * step + k))

    found = []
    for light in (False, True):
        with monkeypatch.context() as patch:
            if not light:
                patch.setattr(Guided, "step_ended", lambda self: None)
            model = Model()
            with gac.patch(model, estimator=estimator, interval=1) as mixer:
                train(mixer, model, 3, run=run)
                with mixer.aside():
                    model(5).backward()
                model.zero_grad()
                found.append(torch.tensor(train(mixer, model, 2, run=run)))
                assert is_light(mixer) is light
    torch.testing.assert_close(*found, rtol=1e-12, atol=0, equal_nan=True)


@ESTIMATORS
def test_repatching_and_unpatching_take_every_hook_off(estimator):
    model = Model()
    mixer = gac.patch(model, estimator=estimator, interval=1)
    train(mixer, model, 2)
    mixer.repatch()
    train(mixer, model, 2)
    mixer.unpatch()
    assert not any(p._backward_hooks for p in model.parameters())
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters() if p._post_accumulate_grad_hooks)

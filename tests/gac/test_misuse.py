"""What users do to a patched model beside training it: right, or refused by name. docs/misuse.md has the table."""

from __future__ import annotations

import functools
import gc
import sys
import threading
import warnings

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import gac
from gac.observe.optimizer_space import WARM_UP
from gac.observe.passes import outermost_call
from gac.silence import SILENT_STEPS

ESTIMATORS = ["exact", "sketch"]
MICRO_BATCHES = 3


def mlp(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))


def inputs(branch: str) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed({"sft": 1, "rl": 2}[branch])
    return [torch.randn(6, 8, generator=generator) for _ in range(MICRO_BATCHES)]


def loss(model: nn.Module, x: torch.Tensor, branch: str) -> torch.Tensor:
    return (model(x) - {"sft": 1.0, "rl": -1.0}[branch]).square().mean() / MICRO_BATCHES


def step(model, mixer, between=lambda: None, how="mixer"):
    for branch in ("sft", "rl"):
        with getattr(mixer, branch)():
            for x in inputs(branch):
                if how == "mixer":
                    mixer.backward(loss(model, x, branch))
                else:
                    (mixer.weight * loss(model, x, branch)).backward()
                between()


def truth(model: nn.Module) -> list[float]:
    """sigma_s2, sigma_r2 and distance2 of a step, by plain autograd in float64."""
    import copy

    model = copy.deepcopy(model).double()
    parameters = [p for p in model.parameters() if p.requires_grad]
    rows = {}
    for branch in ("sft", "rl"):
        found = [torch.autograd.grad(loss(model, x.double(), branch), parameters) for x in inputs(branch)]
        rows[branch] = torch.stack([torch.cat([g.flatten() for g in one]) for one in found])
    n = MICRO_BATCHES
    noise = [n / (n - 1) * float(x.square().sum() - x.sum(0).square().sum() / n) for x in rows.values()]
    return [*noise, float((rows["sft"].sum(0) - rows["rl"].sum(0)).square().sum())]


def assert_right(mixer, expected):
    """All sums of these models are lossless: what is left is float32's rounding of gradients and their differences."""
    got = [float(getattr(mixer.statistics, name)) for name in ("sigma_s2", "sigma_r2", "distance2")]
    assert got == pytest.approx(expected, rel=1e-4)
    assert [float(mixer.statistics.n_s), float(mixer.statistics.n_r)] == [MICRO_BATCHES] * 2


def clip(model):
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)


def scale(model):
    for p in model.parameters():
        p.grad.mul_(0.5)


def clear(model):
    model.zero_grad(set_to_none=True)


def zero(model):
    model.zero_grad(set_to_none=False)


def replace(model):
    for p in model.parameters():
        p.grad = torch.ones_like(p)


def one_of_them(model):
    model[2].bias.grad.add_(3.0)


CHANGES = [clip, scale, clear, zero, replace, one_of_them]


# ------------------------------------------------------------------------------------------- gradients of others


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("change", CHANGES)
def test_gradients_changed_after_every_micro_batch(change, estimator):
    model = mlp()
    expected = truth(model)
    mixer = gac.patch(model, estimator=estimator, report_interval=None)
    for _ in range(2):
        step(model, mixer, lambda: change(model))
        mixer.step()
        assert_right(mixer, expected)


@pytest.mark.parametrize("change", CHANGES)
def test_gradients_changed_between_plain_passes_are_refused_or_right(change):
    model = mlp()
    expected = truth(model)
    mixer = gac.patch(model, estimator="exact")
    step(model, mixer, lambda: change(model), how="weight")
    mixer.step()
    assert_right(mixer, expected)
    mixer.unpatch()
    model.zero_grad()
    mixer = gac.patch(model, estimator="sketch")
    with pytest.raises(RuntimeError, match=r"gradients were changed between two backward passes.*'2.bias'|'0.weight'"):
        step(model, mixer, lambda: change(model), how="weight")


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("how", ["mixer", "weight"])
def test_gradients_changed_between_branches(change, how):
    model = mlp()
    expected = truth(model)
    mixer = gac.patch(model, estimator="sketch")
    for branch in ("sft", "rl"):
        with getattr(mixer, branch)():
            for x in inputs(branch):
                mixer.backward(loss(model, x, branch)) if how == "mixer" else (
                    mixer.weight * loss(model, x, branch)
                ).backward()
        change(model)
    mixer.step()
    assert_right(mixer, expected)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("how", ["mixer", "weight"])
@pytest.mark.parametrize("interval", [1, 2])
def test_gradients_that_are_never_cleared(estimator, how, interval):
    model = mlp()
    expected = truth(model)
    mixer = gac.patch(model, estimator=estimator, interval=interval, report_interval=1)
    for number in range(4):
        step(model, mixer, how=how)
        mixer.step()
        if number % interval == 0:
            assert_right(mixer, expected)


def test_gradients_that_were_there_before_the_patch():
    model = mlp()
    expected = truth(model)
    for p in model.parameters():
        p.grad = torch.full_like(p, 7.0)
    mixer = gac.patch(model, estimator="sketch")
    step(model, mixer)
    mixer.step()
    assert_right(mixer, expected)


def test_gradients_aside_need_no_clearing():
    model = mlp()
    expected = truth(model)
    mixer = gac.patch(model, estimator="sketch")
    for _ in range(2):
        step(model, mixer)
        with mixer.aside():
            (100 * model(torch.ones(2, 8)).sum()).backward()
        mixer.step()
        assert_right(mixer, expected)


def test_running_sums_in_the_space_of_the_optimizer_look_again_too():
    """Second moments of 1 everywhere make both spaces one."""
    results = []
    for change in (lambda model: None, clip):
        model = mlp()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.0, betas=(0.9, 0.5))
        mixer = gac.patch(model, estimator="sketch", metric="optimizer")
        mixer.follow(optimizer)
        for _ in range(WARM_UP + 2):
            step(model, mixer, functools.partial(change, model))
            for p in model.parameters():  # whatever the branches left: the same second moments in both runs
                p.grad = torch.ones_like(p)
            optimizer.step()
            mixer.step()
            optimizer.zero_grad()
        results.append([float(getattr(mixer.statistics, n)) for n in ("sigma_s2", "sigma_r2", "distance2")])
    assert results[0] == pytest.approx(results[1], rel=1e-4)
    assert results[0][2] > 0


def test_gradients_are_kept_no_longer_than_the_step():
    import weakref

    model = mlp()
    mixer = gac.patch(model, estimator="sketch")
    step(model, mixer)
    mixer.step()
    kept = [weakref.ref(p.grad) for p in model.parameters()]
    clear(model)
    gc.collect()
    assert [ref() for ref in kept] == [None] * 4


# ------------------------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_loss_without_its_weight_is_refused(estimator):
    model = mlp()
    mixer = gac.patch(model, estimator=estimator)
    float(mixer.mu)  # logging it weights nothing
    with mixer.sft(), pytest.raises(RuntimeError, match=r"whose weight nobody has read.*mixer.backward\(loss\)"):
        loss(model, inputs("sft")[0], "sft").backward()


def test_the_weight_of_the_other_branch_is_refused():
    model = mlp()
    mixer = gac.patch(model)
    with mixer.sft():
        weight = mixer.weight
        (weight * loss(model, inputs("sft")[0], "sft")).backward()
    with mixer.rl(), pytest.raises(RuntimeError, match="rl branch, whose weight nobody has read"):
        (weight * loss(model, inputs("rl")[0], "rl")).backward()


@pytest.mark.parametrize(
    "weighted",
    [lambda w, x: w * x, lambda w, x: x * w, lambda w, x: (w * x) / 2 + 1, lambda w, x: (x.unsqueeze(0) * w).mean()],
)
def test_a_loss_with_a_weight_is_refused_by_backward(weighted):
    model = mlp()
    mixer = gac.patch(model)
    with mixer.sft():
        weight = mixer.weight
        with pytest.raises(ValueError, match=r"weight of the sft branch already.*of the sft branch: pass the loss"):
            mixer.backward(weighted(weight, loss(model, inputs("sft")[0], "sft")))
    with mixer.rl(), pytest.raises(ValueError, match=r"weight of the sft branch already.*of the rl branch"):
        mixer.backward(weighted(weight, loss(model, inputs("rl")[0], "rl")))
    assert all(p.grad is None for p in model.parameters())


def test_weights_in_other_forms_are_taken():
    model = mlp()
    expected = truth(model)
    mixer = gac.patch(model)
    forms = [lambda: float(mixer.weight), lambda: mixer.weight.double(), lambda: mixer.mu]
    with mixer.sft():
        for x, form in zip(inputs("sft"), forms, strict=True):
            (form() * loss(model, x, "sft")).backward()
    with mixer.rl():
        for x, form in zip(inputs("rl"), [*forms[:2], lambda: 1 - mixer.mu], strict=True):
            (form() * loss(model, x, "rl")).backward()
    mixer.step()
    assert_right(mixer, expected)


def test_tokens_may_be_told_pass_by_pass_in_branches_entered_again():
    model = mlp()
    results = []
    for again in (False, True):
        mixer = gac.patch(model)
        for branch in ("sft", "rl"):
            if again:
                for k, x in enumerate(inputs(branch)):
                    with getattr(mixer, branch)():
                        mixer.backward(loss(model, x, branch), tokens=k + 1.0)
            else:
                with getattr(mixer, branch)():
                    for k, x in enumerate(inputs(branch)):
                        mixer.backward(loss(model, x, branch), tokens=k + 1.0)
        mixer.step()
        results.append([float(mixer.statistics.sigma_s2), float(mixer.statistics.sigma_r2)])
        with mixer.sft():
            mixer.backward(loss(model, inputs("sft")[0], "sft"), tokens=2.0)
            with pytest.raises(ValueError, match="told their tokens and some not"):
                mixer.backward(loss(model, inputs("sft")[1], "sft"))
        with mixer.sft(), pytest.raises(ValueError, match="told their tokens and some not"):
            (mixer.weight * loss(model, inputs("sft")[1], "sft")).backward()
        mixer.unpatch()
        clear(model)
    assert results[0] == pytest.approx(results[1], rel=1e-6)


# ---------------------------------------------------------------------------------------------- what is watched


def unfreeze(model):
    model[0].requires_grad_(True)
    return "'0.weight'"


def exchange(model):
    model[2] = nn.Linear(16, 4)
    return "'2.weight', '2.bias'"


def widen(model):
    model[2].bias = nn.Parameter(torch.zeros(4))
    return "'2.bias'"


def resize(model):
    model[2].weight.data = torch.zeros(4, 32)
    return "'2.weight'"


def extend(model):
    model.append(nn.Linear(4, 4))
    return "'3.weight', '3.bias'"


def nested(model):
    model[1] = nn.Sequential(nn.Tanh(), nn.Linear(16, 16, bias=False))
    return "'1.1.weight'"


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("change", [unfreeze, exchange, widen, resize, extend, nested])
def test_parameters_that_are_not_watched_are_named_within_a_step(change, estimator):
    model = mlp()
    model[0].requires_grad_(False)
    mixer = gac.patch(model, estimator=estimator, law="gac", half_life=4)
    for _ in range(3):
        step(model, mixer)
        mixer.step()
        clear(model)
    before = {k: v.clone() for k, v in mixer.controller.law.state.items()}
    names = change(model)
    with pytest.raises(RuntimeError, match=f"became trainable.*{names}.*mixer.repatch"):
        mixer.sft().__enter__()
    if change is resize:
        model[2].in_features, model[0].out_features = 32, 32
        model[0].weight.data, model[0].bias.data = torch.randn(32, 8), torch.zeros(32)
    mixer.repatch()
    assert mixer.controller.steps == 3
    state = mixer.controller.law.state
    assert all(torch.allclose(v, before[k], rtol=0, atol=0, equal_nan=True) for k, v in state.items())
    expected = truth(model)
    step(model, mixer)
    mixer.step()
    assert_right(mixer, expected)
    assert mixer.metrics(wait=True)["step"] == 3


def test_what_is_frozen_tied_or_taken_away_needs_no_word():
    model = mlp()
    mixer = gac.patch(model)
    model[0].requires_grad_(False)
    step(model, mixer)
    mixer.step()
    assert_right(mixer, truth(model))
    clear(model)
    model.append(nn.Tanh())  # no parameters
    model[2].bias = None
    step(model, mixer)
    mixer.step()
    model.tied = nn.Linear(16, 4, bias=False)
    model.tied.weight = model[2].weight
    del model.tied
    clear(model)
    step(model, mixer)
    mixer.step()
    assert_right(mixer, truth(model))


def test_repatch_follows_the_same_optimizer_and_changes_nothing_where_it_cannot():
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.8, 0.99))
    mixer = gac.patch(model, optimizer=optimizer)
    step(model, mixer)
    with pytest.raises(RuntimeError, match="middle of an optimizer step"):
        mixer.repatch()
    optimizer.step()
    assert mixer.controller.steps == 1
    with mixer.sft(), pytest.raises(RuntimeError, match=r"mixer.repatch\(\) inside"):
        mixer.repatch()
    frozen = [p.requires_grad_(False) for p in model.parameters()]
    with pytest.raises(ValueError, match="no trainable parameters"):
        mixer.repatch()
    for p in frozen:
        p.requires_grad_(True)
    optimizer.zero_grad()
    mixer.repatch()
    assert mixer.controller.law.momentum == 0.8
    step(model, mixer)
    optimizer.step()
    assert mixer.controller.steps == 2
    with pytest.raises(RuntimeError, match="patched already"):
        gac.patch(model)


# --------------------------------------------------------------------------------------------------- broken passes


def explode(gradient):
    raise OverflowError("in backward")


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("how", ["mixer", "weight"])
def test_a_pass_that_raises_and_is_caught_makes_the_step_broken(estimator, last, how):
    model = mlp()
    mixer = gac.patch(model, estimator=estimator)
    mu = float(mixer.mu)

    def broken():
        hidden = model[1](model[0](inputs("sft")[0]))
        hidden.register_hook(explode)  # after the last layer's parameters have their gradients
        value = (model[2](hidden) - 1).square().mean()
        with pytest.raises(OverflowError):
            mixer.backward(value) if how == "mixer" else (mixer.weight * value).backward()

    with mixer.sft():
        for k, x in enumerate(inputs("sft")):
            if k == 1 and not last:
                broken()
            (mixer.weight * loss(model, x, "sft")).backward()
        if last:
            broken()
    with mixer.rl():
        for x in inputs("rl"):
            mixer.backward(loss(model, x, "rl"))
    mixer.step()
    numbers = mixer.metrics(wait=True)
    assert (numbers["n_s"], numbers["n_r"]) == (MICRO_BATCHES, MICRO_BATCHES)
    assert numbers["skipped"] == 1  # half a gradient is in the sums
    assert float(mixer.mu) == mu
    clear(model)
    expected = truth(model)
    step(model, mixer)
    mixer.step()
    assert_right(mixer, expected)


class Checkpointed(nn.Module):
    """Everything that trains lies inside re-entrant checkpoints, as the adapters of a frozen model do."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.head.requires_grad_(False)

    def forward(self, x):
        if self.head.weight.dtype is torch.float64:
            return self.head(self.two(self.one(x).tanh()).tanh())
        x = x.detach().requires_grad_()
        for layer in (self.one, self.two):
            x = checkpoint(lambda t, layer=layer: layer(t).tanh(), x, use_reentrant=True)
        return self.head(x)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("how", ["mixer", "weight"])
def test_passes_whose_hooks_all_run_inside_reentrant_checkpoints_are_counted(estimator, how):
    model = Checkpointed()
    expected = truth(model)
    mixer = gac.patch(model, estimator=estimator)
    for _ in range(2):
        step(model, mixer, how=how)
        mixer.step()
        assert_right(mixer, expected)
        clear(model)


def test_a_call_of_the_engine_is_found_from_other_threads():
    found = {}
    x = torch.ones(3, requires_grad=True)
    caller = threading.get_ident()

    def look():
        found["other"] = outermost_call(caller)

    def hook(gradient):
        found["own"] = outermost_call()
        thread = threading.Thread(target=look)
        thread.start()
        thread.join()

    y = x * 2
    y.register_hook(hook)
    y.sum().backward()
    assert found["own"] is found["other"] is not None
    assert outermost_call() is None


def test_steps_under_inference_mode():
    model = mlp()
    expected = truth(model)
    mixer = gac.patch(model, report_interval=1)
    for _ in range(2):
        step(model, mixer)
        with torch.inference_mode():
            mixer.step(kl=torch.tensor(0.1))
            mu = mixer.mu
        assert not mu.is_inference()
        assert_right(mixer, expected)
        clear(model)


def test_a_mixer_that_nobody_holds_leaves_nothing_behind():
    model = mlp()
    from torch.optim.optimizer import _global_optimizer_post_hooks

    gc.collect()
    before = len(_global_optimizer_post_hooks)
    gac.patch(model)
    gc.collect()
    loss(model, inputs("sft")[0], "sft").backward()
    assert len(_global_optimizer_post_hooks) == before
    mixer = gac.patch(model)
    mixer.repatch()
    del mixer
    gc.collect()
    loss(model, inputs("sft")[0], "sft").backward()
    assert len(_global_optimizer_post_hooks) == before


# --------------------------------------------------------------------------------------------- several of something


def test_actor_and_critic_go_by_their_own_optimizers():
    actor, critic = mlp(0), mlp(1)
    expected = truth(actor), truth(critic)
    mixers = [gac.patch(m, estimator="sketch", name=n) for m, n in ((actor, None), (critic, "critic"))]
    optimizers = [
        torch.optim.AdamW(actor.parameters(), lr=0.0, weight_decay=0.0, betas=(0.7, 0.9)),
        torch.optim.SGD(critic.parameters(), lr=0.0, momentum=0.5),
    ]
    for _ in range(2):
        for model, mixer in zip((actor, critic), mixers, strict=True):
            step(model, mixer)
        for optimizer, mixer in zip(optimizers, mixers, strict=True):
            optimizer.step()
            mixer.step()
            optimizer.zero_grad()
        for mixer, right in zip(mixers, expected, strict=True):
            assert_right(mixer, right)
    assert [m.controller.law.momentum for m in mixers] == [0.7, 0.5]
    own, other = (mixer.metrics(wait=True) for mixer in mixers)
    assert [f"critic/{name}" for name in own] == list(other)
    assert own["step"] == other["critic/step"] == 1
    with pytest.raises(ValueError, match="name must be a text"):
        gac.patch(mlp(), name=3)


def assert_all_the_same(found: gac.Statistics) -> None:
    """SFT's contributions have no noise but what ``n`` roundings of each element of their fp32 total leave."""
    n = float(found.n_s)
    assert float(found.sigma_s2) <= 2 * n * 2**-24 / (n - 1) * float(found.norm_s2)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_threads_take_turns(estimator):
    model = mlp()
    mixer = gac.patch(model, estimator=estimator)
    errors = []

    def work():
        try:
            for _ in range(20):
                mixer.backward(loss(model, inputs("sft")[0], "sft"))
        except BaseException as error:
            errors.append(error)

    with mixer.sft():
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    with mixer.rl():
        mixer.backward(loss(model, inputs("rl")[0], "rl"))
        mixer.backward(loss(model, inputs("rl")[1], "rl"))
    mixer.step()
    assert not errors
    assert float(mixer.statistics.n_s) == 80
    assert_all_the_same(mixer.statistics)


AT_ONCE = "two backward passes of a branch at once"


def backward_by(mixer, kind, value):
    if kind == "plain":
        (mixer.weight * value).backward()
    else:
        mixer.backward(value)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize(("first", "second"), [("plain", "plain"), ("plain", "mixer"), ("mixer", "plain")])
def test_plain_passes_beside_those_of_another_thread_are_refused(first, second, estimator):
    """A plain pass is never refused for what begins later, and what is refused leaves no wrong numbers."""
    model = mlp()
    mixer = gac.patch(model, estimator=estimator)
    inside, go_on = threading.Event(), threading.Event()
    errors = []

    def slow(gradient):
        inside.set()
        go_on.wait(10)

    def work():
        hidden = model[1](model[0](inputs("sft")[0]))
        hidden.register_hook(slow)
        try:
            backward_by(mixer, first, model[2](hidden).sum())
        except RuntimeError as error:
            errors.append(error)

    with mixer.sft():
        thread = threading.Thread(target=work)
        thread.start()
        inside.wait(10)
        with pytest.raises(RuntimeError, match=AT_ONCE):
            backward_by(mixer, second, loss(model, inputs("sft")[1], "sft"))
        go_on.set()
        thread.join()
    step(model, mixer)
    mixer.step()
    assert not errors
    # a pass of mixer.backward is refused before it begins; a plain one when it has written a gradient
    assert mixer.metrics(wait=True)["skipped"] == (second == "plain")


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_an_error_in_another_thread_is_no_pass_under_way(estimator):
    """Its thread has ended, or does something else: the step is broken, and later passes are not refused."""
    model = mlp()
    mixer = gac.patch(model, estimator=estimator)

    def work():
        hidden = model[1](model[0](inputs("sft")[0]))
        hidden.register_hook(lambda gradient: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            (mixer.weight * model[2](hidden).sum()).backward()

    with mixer.sft():
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        (mixer.weight * loss(model, inputs("sft")[1], "sft")).backward()
    mixer.step()
    assert mixer.metrics(wait=True)["skipped"] == 1


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_passes_of_many_threads_are_refused_or_right(estimator):
    model = mlp()
    mixer = gac.patch(model, estimator=estimator, report_interval=1)
    errors, start = [], threading.Barrier(3)

    def work(kind):
        start.wait()
        try:
            for _ in range(3):
                backward_by(mixer, kind, loss(model, inputs("sft")[0], "sft"))
        except RuntimeError as error:
            errors.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # threads take over anywhere
    try:
        for number in range(20):
            errors.clear()
            kinds = ("plain", "mixer", "plain" if number % 2 else "mixer")
            with mixer.sft():
                threads = [threading.Thread(target=work, args=(kind,)) for kind in kinds]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()
            mixer.step()
            # what a refused pass has left of its gradient is a change for the plain pass that follows
            assert all(AT_ONCE in str(e) or "gradients were changed" in str(e) for e in errors), errors
            found = mixer.statistics
            if float(found.nonfinite) == 0:  # else the step is dropped
                assert errors or float(found.n_s) == 9
                assert_all_the_same(found)
            clear(model)
    finally:
        sys.setswitchinterval(interval)


# ------------------------------------------------------------------------------------------------- silent branches


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_branch_whose_gradient_is_zero_is_named_once(estimator):
    model = mlp()
    mixer = gac.patch(model, estimator=estimator)

    def one(factor):
        for branch, size in (("sft", 1.0), ("rl", factor)):
            with getattr(mixer, branch)():
                for x in inputs(branch):
                    mixer.backward(size * loss(model, x, branch))
        mixer.step()
        clear(model)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(SILENT_STEPS - 1):
            one(0.0)
        assert mixer.metrics()["silent_r"] == 1
        one(1.0)  # a step that trains: counted from the beginning
        for _ in range(SILENT_STEPS - 1):
            one(0.0)
    one(0.0)
    with pytest.warns(UserWarning, match="gradient of the RL branch was exactly 0 in 5 measured steps"):
        numbers = mixer.metrics(wait=True)
    assert (numbers["silent_s"], numbers["silent_r"]) == (0, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        one(0.0)
        assert mixer.metrics(wait=True)["silent_r"] == 1
        one(1.0)
        assert mixer.metrics(wait=True)["silent_r"] == 0


def test_float16_gradients_that_underflow_are_said():
    model = mlp().half()
    mixer = gac.patch(model)

    def train():
        for _ in range(SILENT_STEPS + 1):
            for branch, size in (("sft", 1e-8), ("rl", 1.0)):
                with getattr(mixer, branch)():
                    for x in inputs(branch):
                        mixer.backward(size * loss(model, x.half(), branch).float())
            mixer.step()
            clear(model)

    with pytest.warns(UserWarning, match="SFT branch was exactly 0.*float16 without a scaler"):
        train()


def test_a_branch_whose_loss_never_reaches_backward_is_named():
    model = mlp()
    mixer = gac.patch(model)

    def train():
        for _ in range(SILENT_STEPS):
            with mixer.sft():
                loss(model, inputs("sft")[0], "sft").item()  # logged, and that is all
            with mixer.rl():
                for x in inputs("rl"):
                    mixer.backward(loss(model, x, "rl"))
            mixer.step()
            clear(model)

    with pytest.warns(UserWarning, match="inside the SFT branch reached a watched parameter in 5 measured steps"):
        train()


@pytest.mark.parametrize("number", [-1, 1.5, True])
def test_a_step_that_is_no_number_of_a_step_is_refused(number):
    with pytest.raises(ValueError, match="step must be a whole number from 0 on"):
        gac.Controller("gac").update(None, step=number)


# ---------------------------------------------------------------------------------------------------- accumulation


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize(("power", "said"), [(0, False), (1, False), (2, True)])
def test_a_loss_divided_twice_by_the_accumulation_is_said(estimator, power, said):
    """Steps of 2 and of 6 micro-batches; the loss of each is divided by their number once, twice or not at all."""
    model = mlp()
    mixer = gac.patch(model, estimator=estimator, report_interval=None)
    generator = torch.Generator().manual_seed(0)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for number in range(60):
            count = 6 if number % 5 == 4 else 2  # the last window of an epoch
            for branch, division in (("sft", power), ("rl", 1)):
                with getattr(mixer, branch)():
                    for _ in range(count):
                        x = torch.randn(6, 8, generator=generator)
                        mixer.backward(loss(model, x, branch) * MICRO_BATCHES / count**division)
            mixer.step()
            clear(model)
        mixer.metrics(wait=True)
    found = [str(warning.message) for warning in seen if "divided by the accumulation twice" in str(warning.message)]
    assert len(found) == said
    assert all("SFT branch shrink with the power -2" in text or "power -1.9" in text for text in found)

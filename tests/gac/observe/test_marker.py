"""``mixer.weigh``: passes that somebody else runs tell their begin and end, and need no hook on every parameter."""

import pytest
import torch

import gac
from tests.gac.observe.test_hooks import Model, both, hooks_of, train


def weighed(mixer, model, step, k):
    mixer.weigh(model(100 * step + k)).backward()


def plain(mixer, model, step, k):
    (mixer.weight * model(100 * step + k)).backward()


def numbers(run, *, steps=6, model=None, **options):
    net = Model(**(model or {}))
    with gac.patch(net, **({"estimator": "sketch", "interval": 1} | options)) as mixer:
        return train(mixer, net, steps, run=run), mixer.metrics()["skipped"], hooks_of(mixer)


def assert_alike(first, second):
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(torch.tensor(a), torch.tensor(b), rtol=1e-12, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("model", "options", "alone"),
    [
        ({}, {}, True),
        ({"tied": True, "frozen": True}, {}, True),
        ({"checkpointed": False}, {}, True),
        ({"checkpointed": True}, {}, False),
        ({}, {"estimator": "exact"}, False),
        ({}, {"estimator": "sequence"}, False),
        ({}, {"interval": 2}, True),
    ],
)
def test_the_same_numbers_as_a_plain_pass(model, options, alone):
    expected, _, hooks = numbers(plain, model=model, **options)
    found, skipped, left = numbers(weighed, model=model, **options)
    assert_alike(found, expected)
    assert skipped == 0
    if options.get("estimator") == "sequence":
        return
    assert hooks > 1 or options.get("interval") == 2
    assert (left <= 1) == alone or options.get("interval") == 2


def test_one_hook_is_left_as_after_backward(monkeypatch):
    assert both(monkeypatch, run=weighed) == [0, 0]


def test_gradients_are_those_of_a_weighted_loss():
    gradients = []
    for run in (weighed, plain):
        net = Model()
        with gac.patch(net, interval=1) as mixer:
            for branch in (mixer.sft, mixer.rl):
                with branch():
                    run(mixer, net, 0, 1)
            gradients.append([None if p.grad is None else p.grad.clone() for p in net.parameters()])
    for a, b in zip(*gradients, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


def test_a_divided_loss_and_a_compiled_model():
    divided = lambda mixer, model, step, k: (mixer.weigh(model(100 * step + k)) / 4).backward()
    as_ever = lambda mixer, model, step, k: (mixer.weight * model(100 * step + k) / 4).backward()
    assert_alike(numbers(divided)[0], numbers(as_ever)[0])

    def compiled(mixer, model, step, k):
        inner = torch.compile(model, backend="aot_eager")
        mixer.weigh(inner(100 * step + k)).backward()

    assert_alike(numbers(compiled, steps=3)[0], numbers(weighed, steps=3)[0])


def test_two_losses_in_one_pass_are_one_contribution():
    def two(mixer, model, step, k):
        (mixer.weigh(model(100 * step + k)) + mixer.weigh(model(100 * step + 50 + k))).backward()

    def one(mixer, model, step, k):
        (mixer.weight * (model(100 * step + k) + model(100 * step + 50 + k))).backward()

    for a, b in zip(numbers(two, steps=2)[0], numbers(one, steps=2)[0], strict=True):  # rounded in another order
        torch.testing.assert_close(torch.tensor(a), torch.tensor(b), rtol=1e-4, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("steps", [1, 5])  # with hooks on every parameter, and with one
@pytest.mark.parametrize("through", ["head", "aside"])
def test_what_runs_before_the_mark_is_measured_or_costs_the_step(steps, through):
    """A term beside the weighed loss, made after it, is taken back first."""

    def beside(mixer, model, step, k):
        loss = mixer.weigh(model(100 * step + k))
        (loss + 0.5 * model(100 * step + 50 + k, through=through)).backward()

    def as_ever(mixer, model, step, k):
        (mixer.weight * model(100 * step + k) + 0.5 * model(100 * step + 50 + k, through=through)).backward()

    found = []
    for last in (beside, as_ever):
        run = lambda mixer, model, step, k, last=last: (last if step == steps - 1 else weighed)(mixer, model, step, k)
        found.append(numbers(run, steps=steps))
    if found[0][1] == 0:
        assert_alike([found[0][0][-1]], [found[1][0][-1]])
    else:
        assert through == "aside"
        assert steps > 1  # a pass that does not meet the lone hook


def test_gradients_that_are_clipped_in_between():
    def clipped(mixer, model, step, k):
        weighed(mixer, model, step, k)
        if k % 10 == 1:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)

    def guided(mixer, model, step, k):
        mixer.backward(model(100 * step + k))
        if k % 10 == 1:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)

    found, skipped, _ = numbers(clipped, steps=2)
    assert_alike(found[:1], numbers(guided, steps=1)[0])  # with hooks it looks again
    assert skipped == 1  # with one it cannot tell who wrote, and brings the others back
    assert numbers(clipped, steps=4)[1] == 1


def test_a_pass_that_raises_is_no_contribution_and_the_next_one_is():
    net = Model()
    with gac.patch(net, estimator="sketch", interval=1) as mixer:
        train(mixer, net, 3, run=weighed)
        with mixer.sft():
            weighed(mixer, net, 9, 0)
            handle = net.embed.weight.register_hook(lambda _: 1 / 0)  # when the others have theirs
            with pytest.raises(ZeroDivisionError):
                weighed(mixer, net, 9, 1)
            handle.remove()
            weighed(mixer, net, 9, 2)
        net.zero_grad()
        with mixer.rl():
            weighed(mixer, net, 9, 1)
        mixer.step()
        assert mixer.metrics()["skipped"] == 1
        net.zero_grad()
        train(mixer, net, 2, run=weighed)
        assert mixer.metrics()["skipped"] == 1
        assert mixer.statistics.n_s == 3


def test_a_branch_that_has_been_left():
    net = Model()
    with gac.patch(net, interval=1) as mixer:
        with mixer.sft():
            loss = mixer.weigh(net(1))
            mixer.backward(net(2))
        with (
            mixer.rl(),
            pytest.raises(RuntimeError, match="weighted for the sft branch is taken back in the rl branch"),
        ):
            loss.backward()
    net = Model()
    with gac.patch(net, interval=1) as mixer:
        with mixer.sft():
            loss = mixer.weigh(net(1))
        with pytest.raises(RuntimeError, match="taken back outside a branch"):
            loss.backward()
        with pytest.raises(RuntimeError, match="weigh outside a branch"):
            mixer.weigh(net(1))


def test_losses_that_cannot_be_weighed():
    net = Model()
    with gac.patch(net, interval=1) as mixer, mixer.sft():
        with pytest.raises(TypeError, match="loss must be a scalar tensor, got float"):
            mixer.weigh(1.0)
        with pytest.raises(TypeError, match=r"loss must be a scalar tensor, got \(2,\)"):
            mixer.weigh(torch.zeros(2))
        with pytest.raises(ValueError, match="has the weight of the sft branch already"):
            mixer.backward(mixer.weigh(net(1)))
        with pytest.raises(ValueError, match="tokens must be finite"):
            mixer.weigh(net(1), tokens=-1)


def test_tokens():
    found = []
    for run in (
        lambda mixer, model, k: mixer.weigh(model(k), tokens=k + 1.0).backward(),
        lambda mixer, model, k: mixer.backward(model(k), tokens=k + 1.0),
    ):
        net = Model()
        with gac.patch(net, interval=1) as mixer:
            for branch in (mixer.sft, mixer.rl):
                with branch():
                    for k in range(3):
                        run(mixer, net, k)
            mixer.step()
            found.append(mixer.statistics.stacked().tolist())
    assert_alike(found[:1], found[1:])


def test_a_step_that_is_not_measured():
    net = Model()
    with gac.patch(net, interval=2) as mixer:
        train(mixer, net, 1, run=weighed)
        with mixer.sft():
            loss = mixer.weigh(net(1))
            assert "Mark" not in loss.grad_fn.name()
            loss.backward()
        mixer.step()

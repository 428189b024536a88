"""gac.patch leaves training as it was, sees every contribution, and refuses wrong use."""

from __future__ import annotations

import copy
import gc
import itertools
import math
import weakref

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import gac
from gac.metrics import NAMES, StepMetrics
from gac.observe import pending
from tests.gac.models import ARCHITECTURES, rl_loss, sft_loss, tiny_model, tokens

ESTIMATORS = ["exact", "sketch"]


def run(model, mixer, *, steps: int, weights=None, n_s: int = 2, n_r: int = 2):
    """Trains with a mixer, or by hand with the weights given; returns gradients of each step and the weights."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    gradients, used = [], []
    for step in range(steps):
        sft, rl = tokens(n_s, 10 + step), tokens(n_r, 50 + step)
        if mixer is None:
            w_s, w_r = weights[step]
            for b in sft:
                (w_s * (sft_loss(model, b) / n_s)).backward()
            for b in rl:
                (w_r * (rl_loss(model, b) / n_r)).backward()
        else:
            with mixer.sft():
                w_s = mixer.weight
                for b in sft:
                    mixer.backward(sft_loss(model, b) / n_s)
            with mixer.rl():
                w_r = mixer.weight
                for b in rl:
                    (mixer.weight * (rl_loss(model, b) / n_r)).backward()
            used.append((w_s, w_r))
        gradients.append([None if p.grad is None else p.grad.clone() for p in model.parameters()])
        optimizer.step()
        if mixer is not None:
            mixer.step()
        optimizer.zero_grad()
    return gradients, used


def same(a, b) -> bool:
    return all((x is None and y is None) or torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize(
    ("family", "tied", "dtype"),
    [(*a, torch.float32) for a in ARCHITECTURES] + [("qwen2", True, torch.bfloat16), ("llama", False, torch.float64)],
)
def test_gradients_and_parameters_are_bitwise_those_of_the_weighted_loss(family, tied, dtype, estimator):
    patched, plain = (tiny_model(family, tied=tied, dtype=dtype) for _ in range(2))
    keys = list(patched.state_dict())
    with gac.patch(patched, estimator=estimator, cap=0.2) as mixer:
        gradients, weights = run(patched, mixer, steps=3)
        assert list(patched.state_dict()) == keys
    assert float(weights[2][0]) != float(weights[0][0]), "mu must have moved for the comparison to mean something"
    expected, _ = run(plain, None, steps=3, weights=weights)
    assert all(same(g, e) for g, e in zip(gradients, expected, strict=True))
    assert same(patched.parameters(), plain.parameters())


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_outputs_are_unchanged_and_unpatch_leaves_no_trace(estimator):
    model = tiny_model()
    batch = tokens(1, 0)[0]
    before = model(input_ids=batch).logits
    attributes = {name: set(vars(m)) for name, m in model.named_modules()}
    forward = model.forward
    mixer = gac.patch(model, estimator=estimator)
    assert torch.equal(model(input_ids=batch).logits, before)
    mixer.unpatch()
    mixer.unpatch()  # a second time does nothing
    assert model.forward == forward
    assert {name: set(vars(m)) for name, m in model.named_modules()} == attributes
    for p in model.parameters():
        assert not p._backward_hooks
        assert not p._post_accumulate_grad_hooks
    sft_loss(model, batch).backward()  # outside a branch: no error any more
    with pytest.raises(RuntimeError, match="unpatched"):
        mixer.sft().__enter__()
    with gac.patch(model):
        pass  # patching again works


def test_the_mixer_is_freed():
    model = tiny_model()
    mixer = gac.patch(model)
    reference = weakref.ref(mixer)
    mixer.unpatch()
    del mixer
    gc.collect()
    assert reference() is None


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_frozen_and_unused_parameters(estimator):
    model = tiny_model()
    for p in model.model.layers[0].parameters():
        p.requires_grad_(False)
    model.unused = torch.nn.Parameter(torch.ones(7))
    with gac.patch(model, estimator=estimator) as mixer:
        gradients, _ = run(model, mixer, steps=2)
        assert math.isfinite(float(mixer.statistics.delta_g2))
    assert any(g is None for g in gradients[0])


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_parameter_that_only_one_branch_uses(estimator):
    """Its contributions to the other branch are zero, also after a step in which it had one."""
    torch.manual_seed(0)
    shared, only_s = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)
    model = torch.nn.ModuleDict({"shared": shared, "only_s": only_s})
    with gac.patch(model, estimator=estimator) as mixer:
        for _ in range(2):
            model.zero_grad()
            xs = [torch.randn(4, 8) for _ in range(4)]
            with mixer.sft():
                for x in xs[:2]:
                    mixer.backward(only_s(shared(x)).square().mean())
            with mixer.rl():
                for x in xs[2:]:
                    mixer.backward(shared(x).square().mean())
            rl_grad = torch.autograd.grad(sum(shared(x).square().mean() for x in xs[2:]), list(shared.parameters()))
            mixer.step()
            truth = sum(float(g.double().square().sum()) for g in rl_grad)
            assert float(mixer.statistics.norm_r2) == pytest.approx(truth, rel=1e-4)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("explicit", [True, False], ids=["mixer.backward", "loss.backward"])
def test_gradient_checkpointing_counts_each_backward_once(estimator, reentrant, explicit):
    model = tiny_model()
    reference = tiny_model()
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    results = []
    for m in (model, reference):
        with gac.patch(m, estimator=estimator) as mixer:
            for branch, loss, seed in ((mixer.sft, sft_loss, 1), (mixer.rl, rl_loss, 2)):
                with branch():
                    for b in tokens(3, seed):
                        if explicit:
                            mixer.backward(loss(m, b))
                        else:
                            (mixer.weight * loss(m, b)).backward()
            mixer.step()
            results.append(mixer.statistics)
    checkpointed, plain = results
    assert float(checkpointed.n_s) == float(plain.n_s) == 3
    assert float(checkpointed.n_r) == 3
    for name in ("sigma_s2", "sigma_r2", "distance2", "norm_s2"):
        assert float(getattr(checkpointed, name)) == pytest.approx(float(getattr(plain, name)), rel=1e-4), name


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_tied_weight_inside_reentrant_checkpoints(estimator):
    """The weight gets two gradients in one backward pass; together they are one contribution."""
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(6, 6))
    model = torch.nn.ParameterDict({"w": weight})
    xs = [torch.randn(3, 6, requires_grad=True) for _ in range(2)]

    def loss(x):
        hidden = checkpoint(lambda t: (t @ weight).tanh(), x, use_reentrant=True)
        return (hidden @ weight).square().mean()

    truth = [torch.autograd.grad(((x @ weight).tanh() @ weight).square().mean(), weight)[0].double() for x in xs]
    with gac.patch(model, estimator=estimator, law="fixed", mu=1.0) as mixer:
        with mixer.sft():
            for x in xs:
                (mixer.weight * loss(x)).backward()
        mixer.step()
        found = mixer.statistics
    assert float(found.n_s) == 2
    expected = 2 * float(sum((g - sum(truth) / 2).square().sum() for g in truth))
    assert float(found.sigma_s2) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_small_buckets_change_nothing(estimator, monkeypatch):
    found = []
    for size in (2**27, 4096):
        monkeypatch.setattr(pending, "bucket_bytes", lambda size=size, **_: size)
        model = tiny_model()
        with gac.patch(model, estimator=estimator) as mixer:
            run(model, mixer, steps=1, n_s=3)
            found.append(float(mixer.statistics.sigma_s2))
    assert found[0] == pytest.approx(found[1], rel=1e-6)


@pytest.mark.parametrize(("estimator", "calls"), [("exact", "many"), ("sketch", "one")])
def test_running_sums_need_no_small_buckets(estimator, calls, monkeypatch):
    """What hooks keep is handed over early; what ``p.grad`` keeps anyway may wait for one call."""
    monkeypatch.setattr(pending, "BUCKET_BYTES", 4096)
    model, found = tiny_model(), []
    with gac.patch(model, estimator=estimator) as mixer:
        ledger = mixer._observer.ledgers[0]
        monkeypatch.setattr(ledger, "read", lambda *args, read=ledger.read: (found.append(1), read(*args)))
        with mixer.sft():
            mixer.backward(sft_loss(model, tokens(1, 0)[0]))
    assert len(found) == 1 if calls == "one" else len(found) > 10


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_autograd_grad_is_no_contribution(estimator):
    model = tiny_model()
    with gac.patch(model, estimator=estimator) as mixer:
        torch.autograd.grad(sft_loss(model, tokens(1, 0)[0]), list(model.parameters()))  # outside a branch: fine
        with mixer.sft():
            for b in tokens(2, 1):
                torch.autograd.grad(sft_loss(model, b), list(model.parameters()))
                mixer.backward(sft_loss(model, b))
        with mixer.rl():
            mixer.backward(rl_loss(model, tokens(1, 2)[0]))
        mixer.step()
        assert float(mixer.statistics.n_s) == 2
        norm2 = float(mixer.statistics.norm_s2)
    fresh = tiny_model()
    sum(sft_loss(fresh, b) for b in tokens(2, 1)).backward()
    assert norm2 == pytest.approx(sum(float(p.grad.square().sum()) for p in fresh.parameters()), rel=1e-4)


@pytest.mark.slow
@pytest.mark.slow
def test_compiled_models():
    model = tiny_model()
    compiled = torch.compile(model, backend="aot_eager")
    reference = tiny_model()
    results = []
    for m, callee in ((model, compiled), (reference, reference)):
        with gac.patch(callee, estimator="exact") as mixer:
            for branch, loss, seed in ((mixer.sft, sft_loss, 1), (mixer.rl, rl_loss, 2)):
                with branch():
                    for b in tokens(2, seed):
                        mixer.backward(loss(callee, b))
            mixer.step()
            results.append(float(mixer.statistics.sigma_s2))
        assert all(p.grad is not None for p in m.parameters())
    assert results[0] == pytest.approx(results[1], rel=1e-4)


def test_lora():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        tiny_model(), peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    )
    with gac.patch(model) as mixer:
        assert mixer.estimator == "exact"
        gradients, _ = run(model, mixer, steps=2)
        assert math.isfinite(float(mixer.statistics.sigma_s2))
        adapters = [p for p in model.parameters() if p.requires_grad]
        assert sum(p.numel() for p in adapters) == sum(mixer._observer.ledgers[0].layout.numels)
    assert sum(g is not None for g in gradients[0]) == len(adapters)


def test_sparse_gradients():
    model = torch.nn.Embedding(10, 4, sparse=True)
    with gac.patch(model, estimator="sketch") as mixer:
        with mixer.sft():
            mixer.backward(model(torch.tensor([1, 1, 3])).square().sum())
        mixer.step()
        row = model.weight.detach().double()
        truth = float((4 * row[1]).square().sum() + (2 * row[3]).square().sum())
        assert float(mixer.statistics.norm_s2) == pytest.approx(truth, rel=1e-5)


def test_auto_chooses_by_size(monkeypatch):
    model = tiny_model()
    with gac.patch(model) as mixer:
        assert mixer.estimator == "exact"
    monkeypatch.setattr("gac.observe.choice.EXACT_BYTES", 1000)
    with gac.patch(model) as mixer:
        assert mixer.estimator == "sketch"
    for p in model.parameters():
        p.requires_grad_(False)
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(48))
    with gac.patch(model) as mixer:
        assert mixer.estimator == "exact", "few of many parameters: cheap next to the model"


def test_interval_measures_every_kth_step_and_the_law_goes_on():
    model = tiny_model()
    with gac.patch(model, interval=3, law="gac", prior=lambda step: 0.1 + 0.01 * step) as mixer:
        measured, hooked, mus = [], [], [float(mixer.mu)]
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        for step in range(7):
            hooked.append(any(p._post_accumulate_grad_hooks for p in model.parameters()))
            with mixer.sft():
                for b in tokens(2, step):
                    mixer.backward(sft_loss(model, b))
            with mixer.rl():
                for b in tokens(2, step + 20):
                    mixer.backward(rl_loss(model, b))
            optimizer.step()
            mixer.step()
            optimizer.zero_grad()
            measured.append(mixer.statistics is not None)
            mus.append(float(mixer.mu))
        assert measured == [True, False, False, True, False, False, True]
        assert hooked == measured, "a step that is not measured has no hooks"
        assert all(a != b for a, b in itertools.pairwise(mus)), "the prior moves mu in every step"


@pytest.mark.parametrize("law", ["gac", "paper"], ids=["ends in the library", "ends in torch"])
def test_metrics_of_the_newest_measured_step(law):
    model = tiny_model()
    with gac.patch(model, law=law, interval=3) as mixer:
        assert mixer.metrics(measured=True) == {}
        of_measured = {}
        for step in range(6):
            run(model, mixer, steps=1)
            newest = mixer.metrics()
            assert newest["step"] == step
            assert math.isnan(newest["norm_s2"]) == (step % 3 > 0)
            if step % 3 == 0:
                of_measured = newest
            found = mixer.metrics(measured=True)
            assert found["step"] == step // 3 * 3
            assert repr(found) == repr(of_measured), "of this step whatever came since"
        state = mixer.state_dict()
        run(model, mixer, steps=1)
        mixer.load_state_dict(state)
        run(model, mixer, steps=1)
        assert mixer.metrics(measured=True)["step"] == 6, "also where a run goes back"


def test_numbers_of_an_earlier_step_are_whole_while_those_of_the_newest_are_on_their_way():
    """As on a GPU, with a budget that has left out the steps between."""

    class NotYet:
        def query(self):
            return False

    found = StepMetrics(torch.device("cpu"))
    numbers = [2.0 if name in ("n_s", "n_r") else 1.0 for name in NAMES]
    found.publish_numbers(0, numbers, seconds=0.5, estimator="sketch", overhead=0.1)
    found.publish_numbers(7, numbers, seconds=0.7, estimator="sketch", overhead=0.1)
    mirror = found._mirror
    tag, host, _ = mirror._slots[1]
    mirror._slots[1] = tag, host, NotYet()
    for measured in (False, True):
        known = found.latest(wait=False, measured=measured)
        assert (known["step"], known["seconds"], known["norm_s2"]) == (0, 0.5, 1.0)
    found.publish_numbers(9, numbers, seconds=0.9, estimator="sketch", overhead=0.1)
    assert found.latest(wait=False)["step"] == 9


def test_optimizer_hook_steps_the_mixer():
    model = tiny_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gac.patch(model, optimizer=optimizer) as mixer:
        with mixer.sft():
            for b in tokens(2, 0):
                mixer.backward(sft_loss(model, b))
        optimizer.step()
        assert float(mixer.statistics.n_s) == 2
    assert not optimizer._optimizer_step_post_hooks


def test_a_missing_branch_keeps_what_was_known():
    model = tiny_model()
    with gac.patch(model) as mixer:
        run(model, mixer, steps=2)
        raw = mixer.metrics()["mu_raw"]
        for step in range(3):
            with mixer.sft():
                for b in tokens(2, 90 + step):
                    mixer.backward(sft_loss(model, b))
            mixer.step()
            model.zero_grad()
            metrics = mixer.metrics()
            assert math.isnan(metrics["delta_g2"])
            assert math.isnan(metrics["sigma_r2"])
            assert math.isfinite(metrics["sigma_s2"])
            assert math.isfinite(metrics["mu_raw"])
        assert metrics["mu_raw"] != raw, "the SFT noise was still followed"


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nonfinite_gradients_are_counted_and_change_nothing(estimator, value):
    model = tiny_model()
    with gac.patch(model, estimator=estimator, half_life=2.0) as mixer:
        run(model, mixer, steps=2)
        mu, law = float(mixer.mu), {k: v.clone() for k, v in mixer.controller.law.state.items()}
        with mixer.sft():
            mixer.backward(sft_loss(model, tokens(1, 0)[0]))
            mixer.backward(sft_loss(model, tokens(1, 1)[0]) * value)
        with mixer.rl():
            mixer.backward(rl_loss(model, tokens(1, 2)[0]))
        mixer.step()
        model.zero_grad()
        assert float(mixer.statistics.nonfinite) > 0
        assert float(mixer.mu) == mu
        assert mixer.metrics()["skipped"] == 1
        for name in ("sums", "squares"):
            assert torch.equal(mixer.controller.law.state[name], law[name])
        run(model, mixer, steps=1)  # and the next step is healthy again
        assert float(mixer.statistics.nonfinite) == 0
        assert math.isfinite(float(mixer.statistics.sigma_s2))
        assert mixer.metrics()["skipped"] == 1


@pytest.mark.parametrize("caught", ["outside the branch", "inside the branch"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_an_exception_in_backward_spoils_only_its_step(estimator, caught):
    class Break(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            raise ArithmeticError("planted")

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    with gac.patch(model, estimator=estimator) as mixer:
        broken = lambda: model[1](Break.apply(model[0](torch.randn(2, 4)))).sum()
        if caught == "outside the branch":
            with pytest.raises(ArithmeticError), mixer.sft():
                mixer.backward(broken())
        else:
            with mixer.sft():
                with pytest.raises(ArithmeticError):
                    mixer.backward(broken())
                mixer.backward(model(torch.randn(2, 4)).sum())
            assert mixer._observer.seen.counts["sft"] == 1, "the two passes are not taken for one"
        mixer.step()
        assert float(mixer.statistics.nonfinite) > 0
        model.zero_grad()
        with mixer.sft():
            for _ in range(2):
                mixer.backward(model(torch.randn(2, 4)).square().sum())
        mixer.step()
        assert float(mixer.statistics.nonfinite) == 0
        assert float(mixer.statistics.n_s) == 2


def test_state_dict_round_trip(tmp_path):
    model = tiny_model()
    with gac.patch(model, estimator="sketch") as mixer:
        run(model, mixer, steps=3, n_r=1)  # n_r = 1 uses the moving mean
        torch.save(mixer.state_dict(), tmp_path / "mixer.pt")
        weights = copy.deepcopy(model.state_dict())
        run(model, mixer, steps=2, n_r=1)
        expected = mixer.metrics()
    model.load_state_dict(weights)
    with gac.patch(model, estimator="sketch") as mixer:
        mixer.load_state_dict(torch.load(tmp_path / "mixer.pt", weights_only=True))
        run(model, mixer, steps=2, n_r=1)
        found = mixer.metrics()
    for metrics in (expected, found):
        del metrics["seconds"]
    assert str(found) == str(expected), "to the last digit; as text, since NaN is not equal to itself"
    with gac.patch(model, law="fixed") as mixer, pytest.raises(ValueError, match="law 'gac'"):
        mixer.load_state_dict(torch.load(tmp_path / "mixer.pt", weights_only=True))


def test_handed_out_weights_keep_their_values():
    model = tiny_model()
    with gac.patch(model, prior=0.1, prior_weight=1.0) as mixer:
        _, used = run(model, mixer, steps=3)
        values = [float(w_s) for w_s, _ in used]
    assert values == pytest.approx([0.5, 0.48, 0.46])


def test_a_gradient_that_a_hook_takes_away():
    """The exact estimator reads gradients as they arrive; the sketch reads sums, and says whose is gone."""
    inputs = torch.randn(4, 4, 8, generator=torch.Generator().manual_seed(0))
    found = []
    for cleared in (False, True):
        torch.manual_seed(1)
        model = torch.nn.Linear(8, 8)
        with gac.patch(model, estimator="exact") as mixer:
            if cleared:
                model.weight.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
            for branch, batches in ((mixer.sft, inputs[:2]), (mixer.rl, inputs[2:])):
                with branch():
                    for batch in batches:
                        mixer.backward(model(batch).square().mean())
            mixer.step()
            found.append(mixer.statistics)
    for name in ("sigma_s2", "sigma_r2", "distance2"):
        assert torch.equal(getattr(found[0], name), getattr(found[1], name))

    told = pytest.raises(RuntimeError, match="parameter 'weight' was cleared during the backward")
    with gac.patch(model, estimator="sketch") as mixer, told, mixer.sft():
        mixer.backward(model(inputs[0]).square().mean())


class TestWrongUse:
    def test_backward_outside_a_branch(self):
        model = tiny_model()
        with gac.patch(model) as mixer:
            with pytest.raises(RuntimeError, match=r"inside `with mixer\.sft"):
                mixer.backward(sft_loss(model, tokens(1, 0)[0]))
            with pytest.raises(RuntimeError, match="outside a branch"):
                sft_loss(model, tokens(1, 0)[0]).backward()
            with pytest.raises(RuntimeError, match="belongs to a branch"):
                _ = mixer.weight

    def test_a_branch_entered_twice(self):
        with gac.patch(tiny_model()) as mixer, mixer.sft():
            for branch in (mixer.sft, mixer.rl):
                with pytest.raises(RuntimeError, match="leave the first branch"), branch():
                    pass
            with pytest.raises(RuntimeError, match="leave the branch first"):
                mixer.step()

    def test_step_with_nothing_observed(self):
        model = tiny_model()
        with gac.patch(model) as mixer:
            with pytest.raises(RuntimeError, match="nothing observed"):
                mixer.step()
            twin = copy.deepcopy(model)
            with mixer.sft():
                mixer.backward(sft_loss(twin, tokens(1, 0)[0]))
            with pytest.raises(RuntimeError, match="deepcopy"):
                mixer.step()

    def test_state_dict_in_the_middle_of_a_step(self):
        model = tiny_model()
        with gac.patch(model) as mixer:
            with mixer.sft():
                mixer.backward(sft_loss(model, tokens(1, 0)[0]))
            with pytest.raises(RuntimeError, match="middle of an optimizer step"):
                mixer.state_dict()

    def test_patching_twice(self):
        model = tiny_model()
        with gac.patch(model), pytest.raises(RuntimeError, match="patched already"):
            gac.patch(torch.nn.ModuleList([model]))

    @pytest.mark.parametrize(
        ("options", "error", "match"),
        [
            ({"law": "gacc"}, ValueError, "known: .*gac.*Did you mean 'gac'"),
            ({"law": "fixed", "mu": 1.5}, ValueError, r"mu must be in \[0, 1\], got 1.5"),
            ({"law": "fixed", "mu": "half"}, TypeError, "mu must be a number"),
            ({"half_lives": 3}, TypeError, "no option half_lives; it has: half_life"),
            ({"half_life": -1}, ValueError, "half_life"),
            ({"mu_min": 0.9, "mu_max": 0.1}, ValueError, "mu_min must not exceed mu_max"),
            ({"alpha": 2.0}, ValueError, "alpha"),
            ({"start": 0.99}, ValueError, "start"),
            ({"prior": {"warmup": 1}}, TypeError, "keys"),
            ({"estimator": "psychic"}, ValueError, "known: auto, sketch, exact"),
            ({"interval": 0}, ValueError, "interval"),
            ({"optimizer": object()}, TypeError, "optimizer"),
        ],
    )
    def test_options(self, options, error, match):
        with pytest.raises(error, match=match):
            gac.patch(tiny_model(), **options)

    def test_models(self):
        model = tiny_model()
        for p in model.parameters():
            p.requires_grad_(False)
        with pytest.raises(ValueError, match="no trainable parameters"):
            gac.patch(model)
        with pytest.raises(TypeError, match=r"must be a torch.nn.Module"):
            gac.patch([])
        with pytest.raises(ValueError, match="meta device"):
            gac.patch(torch.nn.Linear(2, 2, device="meta"))

    def test_loss(self):
        with gac.patch(tiny_model()) as mixer, mixer.sft(), pytest.raises(TypeError, match="loss must be a tensor"):
            mixer.backward(1.0)


@pytest.mark.parametrize("estimator", ["exact", "sketch"])
def test_tokens_of_one_contribution_are_its_own(estimator):
    """Also after one that raised: those that follow count for what the branch was entered with."""

    def explode(gradient):
        raise OverflowError("in backward")

    model = torch.nn.Linear(3, 2)
    with gac.patch(model, estimator=estimator) as mixer:
        with mixer.sft(tokens=2.0):
            mixer.backward(model(torch.ones(1, 3)).sum(), tokens=6.0)
            mixer.backward(model(torch.ones(1, 3)).sum())
            out = model(torch.ones(1, 3))
            out.register_hook(explode)
            with pytest.raises(OverflowError):
                mixer.backward(out.sum(), tokens=5.0)
            with pytest.raises(ValueError, match="not negative"):
                mixer.backward(model(torch.ones(1, 3)).sum(), tokens=-1.0)
            mixer.backward(model(torch.ones(1, 3)).sum())
        assert [c.tokens for c in mixer._observer.seen.contributions] == [6.0, 2.0, 2.0]

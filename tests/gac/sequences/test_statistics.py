"""Statistics of sequences against float64 gradients of one row at a time, where the sketch loses nothing.

The models are so narrow that no side of a layer is wider than 64: with ``sketch_size=64`` each map is the identity, and
what is left of a difference is rounding.
"""

from __future__ import annotations

import contextlib
import gc
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import gac
from tests.gac.models import ARCHITECTURES, tiny_model
from tests.gac.sequences.truth import Batch, assert_close, expected, losses, mixed, row_gradients, row_losses
from tests.gac.truth import statistics


def small(family="qwen2", *, tied=True, seed=0):
    return tiny_model(family, tied=tied, width=12 if family == "gpt2" else 16, seed=seed)


def patched(model, *, mu=0.3, **options):
    return gac.patch(model, estimator="sequence", sketch_size=64, law="fixed", mu=mu, **options)


def run(mixer, model, *batches, **told):
    for batch in batches:
        with mixer.batch(is_expert=batch.is_expert, **told):
            mixer.mixed_loss(**losses(model, batch)).backward()
    mixer.step()
    return mixer.statistics


@pytest.mark.parametrize(("family", "tied"), ARCHITECTURES)
def test_one_mixed_pass(family, tied):
    model, batch = small(family, tied=tied), mixed()
    wanted = expected(model, [batch])
    mixer = patched(model)
    assert mixer.coverage.share == 1
    assert mixer.coverage.unseen == []
    assert_close(run(mixer, model, batch), wanted)


@pytest.mark.parametrize(("family", "tied"), ARCHITECTURES)
def test_gradients_are_bit_for_bit_those_of_an_unpatched_model(family, tied):
    model, batch = small(family, tied=tied), mixed()
    parts = losses(model, batch)
    mu = torch.tensor(0.3)
    (mu * parts["sft_loss"] + (1 - mu) * parts["rl_loss"]).backward()
    before = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    run(patched(model), model, batch)
    for want, p in zip(before, model.parameters(), strict=True):
        assert torch.equal(want, p.grad)


def test_several_batches_of_a_step():
    model = small()
    batches = [mixed(6, 8, seed=1), mixed(4, 5, seed=2), mixed(2, 12, seed=3)]
    wanted = expected(model, batches)
    mixer = patched(model)
    assert_close(run(mixer, model, *batches), wanted)


def test_several_backward_passes_over_one_batch():
    """Two losses, two passes: a row's gradient is the sum of both."""
    model, batch = small(), mixed()
    wanted = expected(model, [batch])
    mixer = patched(model)
    with mixer.batch(is_expert=batch.is_expert):
        parts = losses(model, batch)
        loss = mixer.mixed_loss(**parts)
        (0.25 * loss).backward(retain_graph=False)
        (0.75 * mixer.mixed_loss(**losses(model, batch))).backward()
    mixer.step()
    assert_close(mixer.statistics, wanted)


def test_a_second_pass_over_one_graph_is_named():
    """What a layer saw is let go with its pass: a graph that is kept for another one is not measured again."""
    model, batch = small(), mixed()
    mixer = patched(model)

    def twice():
        with mixer.batch(is_expert=batch.is_expert):
            loss = mixer.mixed_loss(**losses(model, batch))
            loss.backward(retain_graph=True)
            loss.backward()

    with pytest.warns(UserWarning, match="cannot be told"):
        twice()
    mixer.step()


def test_groups_are_one_contribution():
    model, batch = small(), mixed(8)
    groups = [-1, 3, 3, 5, -1, 5, 3, 5]
    wanted = expected(model, [batch], groups)
    mixer = patched(model)
    assert_close(run(mixer, model, batch, groups=torch.tensor(groups)), wanted)


def test_tokens_weigh_rows():
    """Losses that are sums over tokens, divided by those of the step: rows count by their tokens."""
    model, batch = small(), mixed(6)
    tokens = torch.tensor([3.0, 1.0, 2.0, 5.0, 4.0, 1.0])
    weighted = Batch(batch.ids, batch.is_expert, batch.weights * tokens)
    gradients = row_gradients(model, weighted)
    mixer = patched(model)
    found = run(mixer, model, weighted, tokens=tokens)
    for branch, sigma in ((True, found.sigma_s2), (False, found.sigma_r2)):
        own = [k for k in range(6) if bool(batch.is_expert[k]) is branch]
        share = tokens[own] / tokens[own].sum()
        total = torch.stack([gradients[k] for k in own]).sum(0)
        power = sum(float(gradients[k].square().sum()) / float(w) for k, w in zip(own, share, strict=True))
        want = (power - float(total.square().sum())) / (len(own) - 1)
        assert float(sigma) == pytest.approx(want, rel=1e-3)


def test_rows_of_no_tokens_count_for_nothing():
    model, batch = small(), mixed(6)
    last = int(batch.is_expert.nonzero()[-1])
    weights = batch.weights.clone()
    weights[last] = 0.0
    batch = Batch(batch.ids, batch.is_expert, weights)
    tokens = torch.ones(6)
    tokens[last] = 0.0
    kept = [k for k in range(6) if k != last]
    wanted = expected(model, [batch[kept]])
    mixer = patched(model)
    assert_close(run(mixer, model, batch, tokens=tokens), wanted)


class Packed(nn.Module):
    """Reads sequences that lie end to end in one row; nothing mixes tokens of different sequences."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(48, 16)
        self.norm = nn.LayerNorm(16)
        self.up = nn.Linear(16, 40)
        self.down = nn.Linear(40, 16, bias=False)
        self.head = nn.Linear(16, 48, bias=False)

    def forward(self, ids):
        x = self.embed(ids)
        x = x + self.down(torch.tanh(self.up(self.norm(x))))
        return self.head(x)


def packed_losses(model, ids, lengths):
    logp = model(ids).log_softmax(-1)[0]
    ends = torch.tensor(lengths).cumsum(0).tolist()
    return torch.stack(
        [
            -logp[end - n : end - 1].gather(-1, ids[0, end - n + 1 : end, None]).mean()
            for n, end in zip(lengths, ends, strict=True)
        ]
    )


@pytest.mark.parametrize("how", ["lengths", "cu_seqlens", "position_ids"])
def test_packed_sequences(how):
    model, lengths = Packed(), [5, 9, 2, 7]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 48, (1, sum(lengths) + 3), generator=generator)  # three tokens of padding
    is_expert = torch.tensor([True, False, True, False])
    weights = torch.tensor([0.5, 0.7, 0.5, -0.2])
    mixer = patched(model)
    ends = torch.tensor(lengths).cumsum(0)
    told = {
        "lengths": lengths,
        "cu_seqlens": torch.cat([torch.zeros(1).long(), ends]),
        "position_ids": torch.cat([torch.arange(n) for n in lengths] + [torch.zeros(3).long()])[None],
    }
    with mixer.batch(is_expert=is_expert, **{how: told[how]}):
        weighted = packed_losses(model, ids, lengths) * weights
        mixer.mixed_loss(sft_loss=weighted[is_expert].sum(), rl_loss=weighted[~is_expert].sum()).backward()
    mixer.step()
    parameters = list(model.parameters())
    gradients = []
    with mixer.aside():
        for k in range(4):
            loss = weights[k] * packed_losses(model, ids, lengths)[k]
            gradients.append(torch.cat([g.double().flatten() for g in torch.autograd.grad(loss, parameters)]))
    wanted = statistics(*([g for g, e in zip(gradients, is_expert, strict=True) if e == b] for b in (True, False)))
    assert_close(mixer.statistics, wanted)


@pytest.mark.parametrize("guided", [True, False])
def test_branch_wise_passes_equal_one_mixed_pass(guided):
    model, batch = small(), mixed(8)
    mixer = patched(model)
    found = run(mixer, model, batch)
    for is_expert, branch in ((True, mixer.sft), (False, mixer.rl)):
        own = batch[batch.is_expert == is_expert]
        with branch():
            for part in (own[:3], own[3:]):
                loss = (row_losses(model, part.ids) * part.weights).sum()
                if guided:
                    mixer.backward(loss)
                else:
                    (mixer.weight * loss).backward()
    mixer.step()
    assert_close(mixer.statistics, {name: float(getattr(found, name)) for name in ("sigma_s2", "sigma_r2", "dot",
        "delta_g2", "distance2", "norm_s2", "norm_r2", "n_s", "n_r")})  # fmt: skip


def test_a_branch_of_weight_zero():
    model, batch = small(), mixed()
    mixer = patched(model, mu=0.0)
    found = run(mixer, model, batch)
    wanted = expected(model, [batch]) if mixer.unpatch() is None else {}
    assert float(found.n_s) == 0
    assert torch.isnan(found.sigma_s2)
    assert float(found.sigma_r2) == pytest.approx(wanted["sigma_r2"], rel=1e-4)


def test_a_batch_without_demonstrations():
    model, batch = small(), mixed(6)
    own = batch[~batch.is_expert]
    mixer = patched(model)
    with mixer.batch(is_expert=own.is_expert):
        loss = (row_losses(model, own.ids) * own.weights).sum()
        mixer.mixed_loss(sft_loss=torch.zeros(()), rl_loss=loss).backward()
    mixer.step()
    found = mixer.statistics
    assert float(found.n_s) == 0
    assert float(found.n_r) == 3
    assert torch.isnan(found.distance2)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_non_finite_sequences_are_counted(poison):
    model, batch = small(), mixed()
    weights = batch.weights.clone()
    weights[2] = poison
    mixer = patched(model)
    mu = float(mixer.mu)
    found = run(mixer, model, Batch(batch.ids, batch.is_expert, weights))
    assert float(found.nonfinite) == 1
    assert float(mixer.mu) == mu
    assert float(mixer.metrics(wait=True)["skipped"]) == 1
    model.zero_grad()
    assert_close(run(mixer, model, batch), expected_of(model, batch, mixer))


def expected_of(model, batch, mixer):
    with mixer.aside():
        return expected(model, [batch])


def adapted(family="qwen2", *, dropout=0.0, **options):
    """LoRA, its second matrices and magnitudes away from where they begin."""
    import peft

    targets = {"qwen2": ["q_proj", "v_proj", "up_proj"], "gpt2": ["c_attn", "c_fc"]}[family]
    config = peft.LoraConfig(
        r=4, target_modules=targets, lora_dropout=dropout, fan_in_fan_out=family == "gpt2", **options
    )
    model = peft.get_peft_model(small(family, tied=False), config)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_()
            elif "magnitude" in name:
                p.mul_(torch.rand_like(p) + 0.5)
    return model


def test_frozen_parameters_and_adapters_alone():
    """LoRA: the layers that are trained are plain linear ones; nothing else is looked at."""
    model, batch = adapted(), mixed()
    wanted = expected(model, [batch])
    mixer = patched(model)
    assert mixer.coverage.share == 1
    assert {layer.kind.value for layer in mixer.coverage.seen} == {"linear"}
    assert_close(run(mixer, model, batch), wanted)


class Same(nn.Module):
    """A dropout that drops nothing, in whose presence PEFT's layer takes the other way."""

    def forward(self, x):
        return 1 * x


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("family", ["qwen2", "gpt2"])
def test_magnitudes_of_dora(family, dropout):
    """With and without biases, weights in either orientation; where there is dropout the layer makes its base anew."""
    model, batch = adapted(family, use_dora=True), mixed()
    if dropout:
        for module in model.modules():
            if hasattr(module, "lora_dropout"):
                module.lora_dropout["default"] = Same()
    model.train()
    wanted = expected(model, [batch])
    mixer = patched(model)
    assert mixer.coverage.share == 1
    assert_close(run(mixer, model, batch), wanted)
    magnitudes = [layer for layer in mixer.coverage.seen if layer.name.endswith("lora_magnitude_vector.default")]
    assert len(magnitudes) == 2 * len({"qwen2": "qvu", "gpt2": "ac"}[family])


def test_magnitudes_under_checkpointing_and_compilation():
    batch = mixed()
    wanted = expected(adapted(use_dora=True), [batch])
    for how in ("checkpointed", "compiled"):
        model = adapted(use_dora=True)
        if how == "checkpointed":
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.train()
        mixer = patched(model)
        if how == "compiled":
            first = next(module for module in model.modules() if hasattr(module, "lora_magnitude_vector"))
            first.compile(backend="aot_eager", dynamic=False)
        assert_close(run(mixer, model, batch), wanted)
        assert mixer.coverage.share == 1, "held against the gradients"


def test_a_layer_of_another_formula_is_no_magnitude():
    from peft.tuners.lora.dora import DoraLinearLayer as Known

    from gac.sequences.magnitudes import magnitudes_of

    class DoraLinearLayer(Known):
        def forward(self, x, **kwargs):
            return 2 * super().forward(x, **kwargs)

    for kind, known in ((Known, True), (DoraLinearLayer, False), (type("Other", (Known,), {}), False)):
        layer = kind(fan_in_fan_out=False)
        layer.weight = nn.Parameter(torch.ones(6))
        assert (magnitudes_of(layer, (6,)) is not None) is known, kind


def test_statistics_by_module_add_up():
    model, batch = small(), mixed()
    mixer = patched(model, report_interval=1)
    found = run(mixer, model, batch)
    total = dict(zip(("sigma_s2", "sigma_r2", "delta_g2", "distance2", "norm_s2", "norm_r2", "dot"),
                     mixer.modules.total().tolist(), strict=True))  # fmt: skip
    for name, value in total.items():
        assert value == pytest.approx(float(getattr(found, name)), rel=1e-4, abs=1e-5), name
    assert "layers.0.attention" in mixer.modules.labels
    assert "layers.0" in str(mixer.report())


def test_interval_leaves_steps_without_hooks():
    model, batch = small(), mixed()
    mixer = patched(model, interval=2)
    assert run(mixer, model, batch) is not None
    assert not any(m._forward_hooks for m in model.modules())
    assert run(mixer, model, batch) is None
    assert any(m._forward_hooks for m in model.modules())
    mixer.unpatch()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_an_error_in_a_pass_breaks_the_step():
    model, batch = small(), mixed()
    mixer = patched(model)

    def fail(gradient):
        raise FloatingPointError("no")

    with contextlib.suppress(FloatingPointError), mixer.batch(is_expert=batch.is_expert):
        parts = losses(model, batch)
        handle = model.model.layers[0].mlp.up_proj.weight.register_hook(fail)
        mixer.mixed_loss(**parts).backward()
    handle.remove()
    mixer.step()
    assert float(mixer.statistics.nonfinite) == 1
    model.zero_grad()
    assert_close(run(mixer, model, batch), expected_of(model, batch, mixer))


def test_bias_alone_and_a_shared_layer():
    """A layer that is called twice adds up; biases without their weights have a place of their own."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(3)
            self.embed = nn.Embedding(48, 12, padding_idx=0)
            self.mix = nn.Linear(12, 12)
            self.norm = nn.RMSNorm(12)
            self.head = nn.Linear(12, 48)
            self.head.weight.requires_grad_(False)

        def forward(self, input_ids):
            x = self.mix(torch.tanh(self.mix(self.embed(input_ids))))
            return SimpleNamespace(logits=self.head(self.norm(x)))

    model, batch = Twice(), mixed()
    wanted = expected(model, [batch])
    mixer = patched(model)
    assert mixer.coverage.share == 1
    assert_close(run(mixer, model, batch), wanted)


def test_device_memory_and_state():
    """Branch sums are what stays; the state of a mixer is that of any other, and a step's signs follow its number."""
    model, batch = small(), mixed()
    mixer = gac.patch(model, estimator="sequence", sketch_size=8, law="gac")
    assert mixer.nbytes == 2 * 4 * mixer.coverage.width
    run(mixer, model, batch)
    model.zero_grad()
    state = mixer.state_dict()
    found = run(mixer, model, batch)
    model.zero_grad()
    mixer.unpatch()
    again = gac.patch(model, estimator="sequence", sketch_size=8, law="gac")
    again.load_state_dict(state)
    repeated = run(again, model, batch)
    assert float(repeated.sigma_s2) == float(found.sigma_s2)
    assert float(again.mu) == float(mixer.mu)


def test_parameters_that_are_frozen_later():
    model, batch = small(tied=False), mixed()
    mixer = patched(model)
    run(mixer, model, batch)
    model.zero_grad()
    model.lm_head.weight.requires_grad_(False)
    mixer.repatch()
    wanted = expected_of(model, batch, mixer)
    assert_close(run(mixer, model, batch), wanted)
    mixer.unpatch()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_mixer_that_is_dropped_takes_its_hooks_along():
    model = small()
    mixer = patched(model)
    assert any(m._forward_hooks for m in model.modules())
    del mixer
    gc.collect()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_batch_without_rows_adds_nothing():
    model, batch = small(), mixed()
    wanted = expected(model, [batch])
    mixer = patched(model)
    with mixer.batch(is_expert=torch.zeros(0, dtype=torch.bool)):
        pass
    assert_close(run(mixer, model, batch), wanted)

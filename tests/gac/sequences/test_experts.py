"""Experts whose weights are stacked, and their routers: against float64 gradients of one row at a time."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import gac
from gac.sequences.experts import experts_of
from gac.sequences.layers import Slot
from gac.sequences.routers import router_of
from gac.sequences.stacked import Stacked
from gac_kernels.kronecker import sign_keys
from tests.gac.models import VOCABULARY
from tests.gac.sequences.truth import assert_close, expected, losses, mixed
from tests.gac.truth import statistics

CONFIGS = {
    "mixtral": ("Mixtral", {"num_local_experts": 3, "intermediate_size": 8}),
    "qwen3": ("Qwen3Moe", {"num_experts": 3, "moe_intermediate_size": 8, "intermediate_size": 8, "head_dim": 8}),
    "gpt-oss": ("GptOss", {"num_local_experts": 3, "intermediate_size": 8, "head_dim": 8}),
}
IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")


def model_of(family, implementation="grouped_mm", *, layers=2):
    """No side of a layer is wider than 64, stacks of experts neither."""
    import transformers

    name, own = CONFIGS[family]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=layers, num_attention_heads=2, num_key_value_heads=1,
        num_experts_per_tok=2, max_position_embeddings=32, tie_word_embeddings=False,
        experts_implementation=implementation, **own,
    )  # fmt: skip
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    with torch.no_grad():
        for p in model.parameters():  # routers of some begin with zeros, as biases do
            p.normal_(0.0, 0.3)
    for name, p in model.named_parameters():
        p.requires_grad_("sinks" not in name)  # numbers of GPT-OSS's attention, which no layer has
    return model


def patched(model, **options):
    options = {"sketch_size": 64} | options
    return gac.patch(model, estimator="sequence", law="fixed", mu=0.3, **options)


def run(mixer, model, batch):
    with mixer.batch(is_expert=batch.is_expert):
        mixer.mixed_loss(**losses(model, batch)).backward()
    mixer.step()
    return mixer.statistics


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("family", CONFIGS)
def test_tokens_are_told_apart_by_routing(family, implementation):
    model, batch = model_of(family, implementation), mixed()
    wanted = expected(model, [batch])
    mixer = patched(model)
    assert mixer.coverage.unseen == []
    assert_close(run(mixer, model, batch), wanted)
    assert mixer.coverage.share == 1, "held against the gradients"


@pytest.mark.parametrize("trained", ["gate_up_proj", "down_proj", "gate.weight"])
def test_parts_that_are_trained_alone(trained):
    model, batch = model_of("qwen3"), mixed()
    for name, p in model.named_parameters():
        p.requires_grad_(trained in name or name == "lm_head.weight")
    wanted = expected(model, [batch])
    mixer = patched(model)
    assert_close(run(mixer, model, batch), wanted)
    assert mixer.coverage.share == 1


@pytest.mark.parametrize("family", ["qwen3", "gpt-oss"])
def test_sketches_of_experts_add_up_to_those_of_the_gradient(family):
    """With signs on both sides, of a share of the layers: rows against ``p.grad``, to rounding."""
    model = model_of(family)
    mixer = patched(model, sketch_size=8, sequences={"layer_share": 0.5, "seed": 3})
    observer, batch = mixer._sequences("the test"), mixed()
    check, found = observer._check, []
    taken = check.unexplained
    check.unexplained = lambda table, signs: found.append((table, signs)) or taken(table, signs)
    run(mixer, model, batch)
    ((table, signs),) = found
    stacked = [slot for slot in mixer.coverage.slots if "experts" in slot.name and signs.weights[slot.number]]
    assert {slot.name.rpartition(".")[2] for slot in stacked} == {"gate_up_proj", "down_proj"}
    for slot in stacked:
        assert slot.shape == (8, 8)
        gained = check._sketch(slot, signs)
        assert float((table[:, slot.offset : slot.offset + slot.size].sum(0) - gained).norm() / gained.norm()) < 1e-5


def test_inner_products_of_stacked_weights_have_no_bias():
    """Over 400 draws of signs, within 4 standard errors; gradients of two experts are alike, and must not meet."""
    generator = torch.Generator().manual_seed(0)
    experts, tall, wide, k = 3, 12, 20, 8
    slot = Slot("w", (k, k), (experts * tall, wide + 1), 0)
    gradient, inputs = (torch.randn(4, n, generator=generator) for n in (tall, wide))
    whose, bounds = [0, 1, 1, 2], torch.tensor([0, 2, 4])  # a sequence of experts 0 and 1, one of 1 and 2
    gradient[3], inputs[3] = gradient[0], inputs[0]
    truth = torch.zeros(2, experts, tall, wide + 1)
    for pair, expert in enumerate(whose):
        truth[pair // 2, expert] += torch.outer(gradient[pair], torch.cat([inputs[pair], torch.ones(1)]))
    found = []
    for seed in range(400):
        keys, out = torch.tensor(sign_keys(seed)), torch.zeros(2, k, k)
        stacked = Stacked(slot, keys, experts=experts, pairs=4, ones=True, dtype=torch.float32)
        for pair, expert in enumerate(whose):
            own = torch.tensor([pair])
            stacked.put(expert, own, gradient[own], stacked.project(inputs[own]))
        stacked.add_to(out, bounds=bounds, longest=2, scale=1.0)
        found.append(torch.stack([(out[0] * out[1]).sum(), out[0].square().sum()]))
    values = torch.stack(found).double()
    wanted = torch.stack([(truth[0] * truth[1]).sum(), truth[0].square().sum()])
    error = values.std(0) / math.sqrt(len(values))
    assert ((values.mean(0) - wanted).abs() < 4 * error).all(), (values.mean(0), wanted, error)


def test_checkpointing_and_packed_sequences():
    batch, model = mixed(), model_of("qwen3")
    wanted = expected(model, [batch])
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    mixer = patched(model)
    assert_close(run(mixer, model, batch), wanted)
    mixer.unpatch()
    layer = model.model.layers[0].mlp  # nothing in it mixes tokens
    x, lengths = torch.randn(1, 9, 16), [4, 2, 3]
    weights = torch.randn(9, 16)
    mixer = patched(layer)
    with mixer.batch(is_expert=[True, False, False], lengths=lengths):
        y = (layer(x)[0] * weights).sum(1)
        mixer.mixed_loss(sft_loss=y[:4].sum(), rl_loss=y[4:].sum()).backward()
    mixer.step()
    gradients = []
    with mixer.aside():
        for begin, end in ((0, 4), (4, 6), (6, 9)):
            found = torch.autograd.grad((layer(x)[0] * weights).sum(1)[begin:end].sum(), list(layer.parameters()))
            gradients.append(torch.cat([g.double().flatten() for g in found]))
    assert_close(mixer.statistics, statistics(gradients[:1], gradients[1:]))


def test_compiled_experts():
    """In compiled code routers are tapped at all of their results, and run again."""
    batch, model = mixed(), model_of("qwen3", layers=1)
    wanted = expected(model, [batch])
    mixer = patched(model)
    model.model.layers[0].mlp.compile(backend="aot_eager", dynamic=False, fullgraph=True)
    for _ in range(2):
        assert_close(run(mixer, model, batch), wanted)
        assert mixer.coverage.share == 1
        model.zero_grad()


def test_experts_of_another_formula_are_named():
    class Halved(nn.Module):
        """Weighs its input, as Llama 4 does."""

        def __init__(self):
            super().__init__()
            self.num_experts, self.act_fn, self.has_gate = 2, nn.SiLU(), False
            self.up_proj, self.down_proj = (nn.Parameter(torch.randn(2, 8, 8)) for _ in range(2))

        def forward(self, x, index, weights):
            out = torch.zeros_like(x)
            for k in range(index.shape[1]):
                up, down = self.up_proj[index[:, k]], self.down_proj[index[:, k]]
                scaled = self.scaled(x, weights[:, k, None])
                h = self.act_fn(torch.einsum("nud,nd->nu", up, scaled))
                out = out + self.weighed(torch.einsum("ndm,nm->nd", down, h), weights[:, k, None])
            return out

        def scaled(self, x, weights):
            return weights * x

        def weighed(self, y, weights):
            return y

    class Plain(Halved):
        scaled, weighed = Halved.weighed, Halved.scaled

    assert experts_of(Halved()) is None
    assert experts_of(Plain()) is not None
    spread = Plain()
    spread._is_expert_parallel = True
    assert experts_of(spread) is None


def test_routers_are_known_by_their_gradient():
    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 5))

        def forward(self, x):
            logits = x @ self.weight.t()
            return logits.softmax(-1).topk(2), logits

    class Twice(Head):
        def forward(self, x):
            logits = x @ self.weight.t()
            return logits, self.weight * 2

    class Cut(Head):
        def forward(self, x):
            return (x @ self.weight.t()).softmax(-1)

    for kind, output in ((Head, 1), (Twice, None), (Cut, None)):
        found = router_of(kind(), torch.Size([3, 5]))
        assert (None if found is None else found.output) == output, kind
    assert router_of(type("Whole", (Head,), {"forward": lambda self, x: x @ self.weight.t()})(), torch.Size([3, 5]))

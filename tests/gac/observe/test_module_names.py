import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gac.observe.module_names import group_parameters
from gac.statistics import COLUMNS, ModuleStatistics, Statistics

DECODER = ["embedding", "layers.0.attention", "layers.0.mlp", "layers.1.attention", "layers.1.mlp", "norm"]


def grouped(model):
    """Labels, and the label of every parameter by name."""
    names = [name for name, _ in model.named_parameters()]
    labels, indices = group_parameters(names)
    return labels, {name: labels[index] for name, index in zip(names, indices, strict=True)}


def build(family, kind="CausalLM", **options):
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{family}Config")(**options)
    made = getattr(transformers, f"{family}For{kind}")  # torch 2.7 cannot import it on the meta device
    with torch.device("meta"):
        model = made(config)
    model.tie_weights()  # transformers 5.0 leaves that out on the meta device
    return model


SMALL = {
    "num_hidden_layers": 2,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "vocab_size": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@pytest.mark.parametrize(
    ("family", "options", "head", "norms"),
    [
        ("Llama", SMALL, True, {"input_layernorm": "attention", "post_attention_layernorm": "mlp"}),
        ("Qwen2", SMALL | {"tie_word_embeddings": True}, False, {"post_attention_layernorm": "mlp"}),
        ("Qwen3", SMALL, True, {"self_attn.q_norm": "attention", "post_attention_layernorm": "mlp"}),
        ("Gemma2", SMALL, False, {"post_attention_layernorm": "attention", "pre_feedforward_layernorm": "mlp"}),
        ("Mixtral", SMALL | {"num_key_value_heads": 2}, True, {"post_attention_layernorm": "mlp"}),
        ("GPTNeoX", SMALL, True, {"input_layernorm": "attention", "post_attention_layernorm": "mlp"}),
        ("OPT", SMALL | {"ffn_dim": 32}, False, {"self_attn_layer_norm": "attention", "final_layer_norm": "mlp"}),
    ],
)
def test_decoders(family, options, head, norms):
    labels, by_name = grouped(build(family, **options))
    assert sorted(labels) == sorted(DECODER + ["head"] * head)
    assert labels[0] == "embedding"
    for norm, block in norms.items():
        found = {label for name, label in by_name.items() if f"layers.1.{norm}." in name}
        assert found == {f"layers.1.{block}"}, norm


def test_gpt2():
    labels, by_name = grouped(build("GPT2", "SequenceClassification", n_layer=2, n_embd=16, n_head=2))
    assert labels == [*DECODER, "head"]
    assert by_name["transformer.wpe.weight"] == "embedding"
    assert by_name["transformer.h.1.ln_1.weight"] == "layers.1.attention"
    assert by_name["transformer.h.1.ln_2.bias"] == "layers.1.mlp"
    assert by_name["transformer.ln_f.weight"] == "norm"


def test_encoder_and_decoder_are_told_apart():
    model = build("T5", "ConditionalGeneration", num_layers=1, d_model=16, d_ff=32, num_heads=2, d_kv=8)
    labels, by_name = grouped(model)
    parts = ("layers.0.attention", "layers.0.mlp", "norm")
    assert labels == ["embedding", *(f"encoder.{p}" for p in parts), *(f"decoder.{p}" for p in parts)]
    layer = "decoder.block.0.layer"
    assert by_name[f"{layer}.1.layer_norm.weight"] == "decoder.layers.0.attention"  # of the cross attention
    assert by_name[f"{layer}.2.layer_norm.weight"] == "decoder.layers.0.mlp"


def test_layers_that_are_not_all_attention():
    names = [
        *(f"model.layers.0.{part}.weight" for part in ("mamba.in_proj", "feed_forward.up_proj", "input_layernorm")),
        *(f"model.layers.1.{part}.weight" for part in ("self_attn.q_proj", "feed_forward.up_proj", "pre_ff_layernorm")),
    ]
    labels, indices = group_parameters(names)
    assert labels == ["layers.0.mamba", "layers.0.mlp", "layers.1.attention", "layers.1.mlp"]
    assert indices == [0, 1, 0, 2, 3, 3]


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "module._orig_mod.", "base_model.model.", "module.base_model.model."]
)
def test_wrappers_change_nothing(prefix):
    names = [name for name, _ in build("Llama", **SMALL).named_parameters()]
    assert group_parameters([prefix + name for name in names]) == group_parameters(names)


def test_lora():
    names = [
        f"base_model.model.model.layers.{layer}.{module}.lora_{side}.default.weight"
        for layer in range(2)
        for module in ("self_attn.q_proj", "self_attn.v_proj", "mlp._checkpoint_wrapped_module.up_proj")
        for side in "AB"
    ]
    labels, indices = group_parameters(names)
    assert labels == ["layers.0.attention", "layers.0.mlp", "layers.1.attention", "layers.1.mlp"]
    assert indices == [0, 0, 0, 0, 1, 1, 2, 2, 2, 2, 3, 3]


def test_unknown_models():
    layers = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
    assert grouped(layers)[0] == ["0", "2"]
    assert grouped(nn.ModuleDict({"net": layers}))[0] == ["net.0", "net.2"]
    assert grouped(nn.Linear(1, 1))[0] == ["weight", "bias"]
    assert group_parameters(["trunk.stem.conv.weight", "trunk.stem.bn.bias", "classifier.weight"]) == (
        ["trunk.stem", "classifier"],
        [0, 0, 1],
    )
    assert grouped(nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2), 2, enable_nested_tensor=False))[0] == [
        "layers.0.attention",
        "layers.0.mlp",
        "layers.1.attention",
        "layers.1.mlp",
    ]


PARTS = st.sampled_from(
    (
        "module",
        "model",
        "layers",
        "layer",
        "h",
        "0",
        "1",
        "12",
        "self_attn",
        "mlp",
        "norm",
        "ln_1",
        "embed",
        "head",
        "w",
    )
)


@settings(max_examples=40)
@given(st.lists(st.one_of(st.lists(PARTS, max_size=7).map(".".join), st.text(max_size=12)), max_size=12))
def test_any_names_are_grouped(names):
    labels, indices = group_parameters(names)
    assert len(indices) == len(names)
    assert sorted(set(indices)) == list(range(len(labels)))
    assert len(set(labels)) == len(labels)
    assert group_parameters(names) == (labels, indices)


def statistics(rows=3, **options):
    values = torch.arange(7.0 * rows).reshape(rows, 7) / 3
    return ModuleStatistics(5, [f"m{k}" for k in range(rows)], values, **options)


def test_columns_and_rows():
    found = statistics()
    assert found.labels == ("m0", "m1", "m2")
    assert torch.equal(found.column("dot"), found.values[:, 6])
    assert found.module("m1") == dict(zip(COLUMNS, found.values[1].tolist(), strict=True))
    assert torch.equal(found.total(), found.values.sum(0))
    with pytest.raises(KeyError, match="known: sigma_s2"):
        found.column("cosine")
    with pytest.raises(KeyError, match="known: m0, m1, m2"):
        found.module("m3")


def test_records_go_through_json():
    whole = Statistics(sigma_s2=1 / 3, norm_s2=2.0, n_s=4, n_r=0)
    found = statistics(whole=whole)
    found.values[2] = math.nan
    found.values[1, 0] = math.inf
    record = json.loads(json.dumps(found.to_record(), allow_nan=False))
    back = ModuleStatistics.from_record(record)
    assert (back.step, back.labels) == (5, found.labels)
    assert back.values.dtype == torch.float64
    expected = found.values.masked_fill(found.values.isinf(), math.nan)
    assert torch.equal(back.values.float().nan_to_num(-1), expected.nan_to_num(-1))  # nine digits hold a float32
    torch.testing.assert_close(back.whole.stacked(), whole.stacked(), rtol=1e-8, atol=0, equal_nan=True)
    assert ModuleStatistics.from_record(statistics().to_record()).whole is None


def test_records_of_other_versions():
    record = statistics(1).to_record()
    record["columns"] = ["norm_s2", "new"]
    record["modules"] = {"m0": [2.0, 7.0]}
    back = ModuleStatistics.from_record(record | {"whole": {"n_s": 2.0, "new": 1.0}})
    assert back.module("m0")["norm_s2"] == 2.0
    assert math.isnan(back.module("m0")["dot"])
    assert float(back.whole.n_s) == 2.0
    with pytest.raises(ValueError, match="lacks columns, modules"):
        ModuleStatistics.from_record({"step": 1})


def test_wrong_values_are_refused():
    with pytest.raises(ValueError, match=r"shape \(2, 7\).*got \(2, 6\)"):
        ModuleStatistics(1, ("a", "b"), torch.zeros(2, 6))
    with pytest.raises(ValueError, match="got list"):
        ModuleStatistics(1, ("a",), [[0.0] * 7])
    with pytest.raises(TypeError, match=r"torch\.int64"):
        ModuleStatistics(1, ("a",), torch.zeros(1, 7, dtype=torch.int64))

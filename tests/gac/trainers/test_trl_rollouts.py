"""TRL's ways of generating, its tools, adapters and kernels: with mu = 0 the run is that of TRL's own trainer."""

import sys
import types

import pytest
import torch
from peft import LoraConfig
from torch import nn
from trl import GRPOTrainer

from gac.tasks.characters import build_character_tokenizer
from tests.gac.trainers.conftest import DEMONSTRATIONS, PROMPTS, tiny_model
from tests.gac.trainers.pairs import history, same, trained, weights, whole_groups

TEMPLATE = (
    "{{ opening }}{% for m in messages %}[{{ m.role }}]{{ m.content }}"
    "{% for call in m.tool_calls or [] %}<call>{{ call.function | tojson }}</call>{% endfor %}"
    "{{ eos_token if m.role == 'assistant' }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
RESPONSE = {
    "defaults": {"role": "assistant"},
    "start_anchor": "[assistant]",
    "fields": {
        "tool_calls": {
            "open": "<call>",
            "close": "</call>",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {"close": "<eos>", "content": "text"},
    },
}


def chat_tokenizer():
    tokenizer = build_character_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def conversation(text):
    return [{"role": "user", "content": text}]


CHATS = {
    "processing_class": chat_tokenizer,
    "prompts": [{"prompt": conversation(row["prompt"])} for row in PROMPTS],
    "reward_funcs": lambda completions, **_: [float(len(c[-1]["content"] or "")) for c in completions],
    "sft_dataset": [
        {"prompt": conversation(row["prompt"]), "completion": [{"role": "assistant", "content": row["completion"]}]}
        for row in DEMONSTRATIONS
    ],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("rollouts")


@pytest.fixture(autouse=True)
def _groups(monkeypatch):
    monkeypatch.setattr("trl.trainer.grpo_trainer.shuffle_sequence_dict", whole_groups)


def assert_runs_as_trls(folder, **options):
    """Returns both trainers."""
    plain, hybrid = (trained(kind, folder, **options) for kind in ("trl", "mu=0"))
    assert same(weights(plain), weights(hybrid))
    assert history(plain) == history(hybrid)
    return plain, hybrid


class Engine:
    """Stands where TRL talks to vLLM: draws completions, and keeps what it was given."""

    made = ()

    def __init__(self, model, mode, **options):
        self.model, self.mode, self.options = model, mode, options
        self.synced, self.asked = [], []
        self.vllm_client = types.SimpleNamespace(
            get_server_info=lambda: {"model_config": {"logprobs_mode": "processed_logprobs"}}
        )
        Engine.made = (*Engine.made, self)

    def sync_weights(self):
        self.synced.append({name: value.detach().clone() for name, value in self.model.named_parameters()})

    def generate(self, prompts, images, num_generations, profiler):
        self.asked.append(prompts)
        generator = torch.Generator().manual_seed(len(self.asked))
        draw = lambda low, high, count: torch.randint(low, high, (count,), generator=generator).tolist()
        completions = [draw(3, 50, 1 + i % 3) for i in range(len(prompts))]
        logprobs = [[[-4.5 - 0.1 * (token % 5)] for token in tokens] for tokens in completions]
        logprobs[0][0] = [None]  # a NaN of vLLM's
        return prompts, completions, logprobs, None


@pytest.mark.parametrize(
    "options",
    [
        {"vllm_mode": "server"},
        {"vllm_mode": "colocate"},
        {"vllm_mode": "colocate", "vllm_importance_sampling_mode": "token_truncate", "loss_type": "vespo"},
        {"vllm_mode": "colocate", "vllm_importance_sampling_correction": False},
    ],
    ids=["server", "colocate", "vespo", "uncorrected"],
)
def test_vllm_gets_the_weights_and_gives_the_rollouts(folder, monkeypatch, options):
    monkeypatch.setattr("trl.trainer.grpo_trainer.VLLMGeneration", Engine)
    monkeypatch.setattr(Engine, "made", ())
    assert_runs_as_trls(folder, use_vllm=True, max_steps=3, **options)
    of_trl, of_hybrid = Engine.made
    assert of_trl.mode == of_hybrid.mode == options["vllm_mode"]
    assert len(of_trl.synced) == len(of_hybrid.synced) == 3
    assert all(same(*pair) for pair in zip(of_trl.synced, of_hybrid.synced, strict=True))
    assert not same(of_hybrid.synced[0], of_hybrid.synced[1])
    assert of_trl.asked == of_hybrid.asked


def test_conversations(folder):
    _, hybrid = assert_runs_as_trls(folder, chat_template_kwargs={"opening": "#"}, **CHATS)
    asked = hybrid._buffered_inputs[0]["prompt_ids"][0]
    assert hybrid.processing_class.decode(asked, skip_special_tokens=True).startswith("#[user]")


def add(a: int, b: int) -> int:
    """Adds two numbers.

    Args:
        a: One.
        b: The other.
    """
    return a + b


def tool_calls(monkeypatch):
    """Options under which every other rollout calls a tool."""
    sample = GRPOTrainer._generate_single_turn

    def with_calls(self, prompt_ids, *args, **kwargs):
        completions, logprobs = sample(self, prompt_ids, *args, **kwargs)
        if len(prompt_ids) == 8:  # the first turn; every other rollout calls
            call = '<call>{"name": "add", "arguments": {"a": 3, "b": 4}}</call>'
            tokens = [*self._tokenizer(call)["input_ids"], self._tokenizer.eos_token_id]
            completions = [tokens if i % 2 else ids for i, ids in enumerate(completions)]
        return completions, logprobs

    def tokenizer():
        made = chat_tokenizer()
        made.response_template = RESPONSE
        return made

    monkeypatch.setattr(GRPOTrainer, "_generate_single_turn", with_calls)
    short = {"max_completion_length": 90, "generation_kwargs": {"max_new_tokens": 4}}
    return CHATS | short | {"processing_class": tokenizer, "tools": [add]}


def test_tools_are_called_and_their_words_carry_no_loss(folder, monkeypatch):
    _, hybrid = assert_runs_as_trls(folder, **tool_calls(monkeypatch))
    assert history(hybrid)[0]["tools/call_frequency"] == 0.5
    assert history(hybrid)[0]["tools/failure_frequency"] == 0
    assert any((part["tool_mask"] == 0).any() for part in hybrid._buffered_inputs)


class Quantised(nn.Linear):
    """A frozen layer of integers and a scale, as bitsandbytes has them: what QLoRA puts adapters on."""

    def __init__(self, layer):
        super().__init__(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        scale = layer.weight.detach().abs().max() / 127
        self.weight = nn.Parameter((layer.weight.detach() / scale).round().to(torch.int8), requires_grad=False)
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().clone(), requires_grad=False)
        self.register_buffer("scale", scale)

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)


def quantised_model():
    model = tiny_model()
    for layer in model.model.layers:
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(layer.self_attn, name, Quantised(getattr(layer.self_attn, name)))
    model.is_loaded_in_4bit = True  # what TRL asks for: adapters become bfloat16
    return model


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_adapters_on_quantised_layers(folder, dora):
    lora = lambda: LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", use_dora=dora)
    options = {"model": quantised_model, "peft_config": lora}
    assert_runs_as_trls(folder, **options)
    hybrid = trained("gac", folder, **options)
    trainable = {name: p for name, p in hybrid.model.named_parameters() if p.requires_grad}
    assert {p.dtype for name, p in trainable.items() if "lora_A" in name} == {torch.bfloat16}
    assert any(module.weight.dtype == torch.int8 for module in hybrid.model.modules() if isinstance(module, Quantised))
    assert hybrid.mixer.metrics()["sigma_s2"] > 0


def test_liger_kernel(folder, monkeypatch):
    given = []

    def patch(model, **config):
        given.append(config)
        norm = model.model.norm
        norm.forward = lambda x: 2 * type(norm).forward(norm, x)

    package = types.ModuleType("liger_kernel")
    package.transformers = types.ModuleType("liger_kernel.transformers")
    package.transformers._apply_liger_kernel_to_instance = patch
    monkeypatch.setitem(sys.modules, "liger_kernel", package)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", package.transformers)
    monkeypatch.setattr("transformers.integrations.liger.is_liger_kernel_available", lambda: True)
    plain, _ = assert_runs_as_trls(folder, use_liger_kernel=True)
    assert given == [{"fused_linear_cross_entropy": False}] * 2
    assert not same(weights(plain), weights(trained("trl", folder)))


@pytest.mark.parametrize("name", ["vllm", "tools", "dora", "entropy"])
def test_one_pass_for_both_branches_gives_the_same(folder, monkeypatch, name):
    """Without Adam, which makes much of gradients that are nothing but rounding."""
    monkeypatch.setattr("trl.trainer.grpo_trainer.VLLMGeneration", Engine)
    options = {
        "vllm": {"use_vllm": True, "vllm_importance_sampling_mode": "token_truncate"},
        "tools": tool_calls(monkeypatch) if name == "tools" else {},
        "dora": {"peft_config": lambda: LoraConfig(r=2, target_modules=["q_proj", "v_proj"], use_dora=True)},
        "entropy": {"top_entropy_quantile": 0.4, "entropy_coef": 0.1},
    }[name] | {"optim": "sgd", "learning_rate": 1.0}
    two, one = (weights(trained(kind, folder, **options)) for kind in ("mu=0", "one pass"))
    for parameter, value in two.items():
        torch.testing.assert_close(one[parameter], value, rtol=1e-4, atol=1e-6)
    start = weights(types.SimpleNamespace(model=tiny_model()))
    assert name == "dora" or max((two[parameter] - start[parameter]).abs().max() for parameter in start) > 1e-3

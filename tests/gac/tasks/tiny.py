"""Tiny pretrained models: a folder with a chat template, and a GGUF file as llama.cpp would write it."""

from pathlib import Path

import numpy as np
import torch

from gac.tasks.characters import build_character_tokenizer
from gac.tasks.models import build_small_model

START, END = "<|im_start|>", "<|im_end|>"
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""Ends a reply with another token than the tokenizer's own, and a line break after it, as many do."""


def save_chat_model(folder: Path, *, template: str | None = TEMPLATE, seed: int = 0) -> Path:
    """A random model of 10 K parameters and its tokenizer, whose end token is not the template's."""
    tokenizer = build_character_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [START, END]})
    tokenizer.chat_template = template
    build_small_model(tokenizer, hidden_size=32, layers=1, heads=2, seed=seed).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_gguf(path: Path) -> dict[str, torch.Tensor]:
    """A GGUF file of a random llama of 20 K parameters, one matrix in Q8_0; returns what its weights stand for.

    Names and shapes are those of transformers; values are exact in bf16 but where they were quantised.
    """
    import gguf
    from transformers import LlamaConfig, LlamaForCausalLM

    tokens = [chr(code) for code in (*range(33, 127), *range(256, 289))] + ["ab", START, END]
    vocabulary, heads, width = len(tokens), 2, 64
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=heads, num_key_value_heads=heads, tie_word_embeddings=True,
    )  # fmt: skip
    weights = {
        name: value.to(torch.bfloat16).float()
        for name, value in LlamaForCausalLM(config).state_dict().items()
        if name != "lm_head.weight"
    }

    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_name("tiny")
    writer.add_context_length(128)
    writer.add_embedding_length(width)
    writer.add_block_count(1)
    writer.add_feed_forward_length(64)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_rope_dimension_count(width // heads)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(vocabulary)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * (vocabulary - 2) + [3, 3])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(vocabulary - 2)
    writer.add_eos_token_id(vocabulary - 1)
    writer.add_pad_token_id(vocabulary - 1)
    writer.add_chat_template(TEMPLATE)
    names = {
        "model.embed_tokens": "token_embd", "model.norm": "output_norm",
        "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }  # fmt: skip
    for name, value in weights.items():
        stem = name.removesuffix(".weight").removeprefix("model.layers.0.")
        array = value.numpy()
        if stem in ("self_attn.q_proj", "self_attn.k_proj"):  # llama.cpp's order of rotary pairs
            array = array.reshape(heads, 2, -1, width).swapaxes(1, 2).reshape(array.shape)
        written = names[stem] if stem.startswith("model.") else f"blk.0.{names[stem]}"
        if stem == "mlp.up_proj":
            blocks = gguf.quants.quantize(array, gguf.GGMLQuantizationType.Q8_0)
            plain = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType.Q8_0)
            weights[name] = torch.from_numpy(plain).to(torch.bfloat16).float()
            writer.add_tensor(f"{written}.weight", blocks, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(f"{written}.weight", np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


def split(path: Path, pieces: int) -> list[Path]:
    """Cuts a file into parts beside it, named as ``split -d`` names them, and removes it."""
    data = path.read_bytes()
    size = -(-len(data) // pieces)
    parts = [path.with_name(f"{path.name}.part{number:02d}") for number in range(pieces)]
    for number, part in enumerate(parts):
        part.write_bytes(data[number * size : (number + 1) * size])
    path.unlink()
    return parts

"""The model and tokenizer of a run: small ones built from a config, or a checkpoint with its own tokenizer."""

from collections.abc import Iterable
from typing import Any


def build_small_model(
    tokenizer: Any, *, hidden_size: int = 96, layers: int = 3, heads: int = 4, max_length: int = 512, seed: int = 0
) -> Any:
    """A Qwen2-architecture causal LM in fp32 on the CPU, about 0.3 M parameters by default, initialised from `seed`.

    The caller's random state is left as it was.
    """
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=8 * hidden_size // 3,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=max_length,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2ForCausalLM(config)
    return model


def load_model(name_or_path: str) -> Any:
    """``(model, tokenizer)`` of a causal LM checkpoint: a local folder or a hub name, in fp32.

    Raises:
        ValueError: it cannot be loaded; the message says what was tried.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, padding_side="left")
        model = AutoModelForCausalLM.from_pretrained(name_or_path, dtype=torch.float32)
    except Exception as error:  # of whichever library reads the files
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"--model {name_or_path!r} is neither a model folder nor a reachable hub name: {reason}"
        ) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


def build_model_and_tokenizer(name_or_path: str | None, texts: Iterable[str], *, seed: int, **sizes: int) -> Any:
    """`load_model` for a name, else a character tokenizer over `texts` and `build_small_model` of `sizes`."""
    if name_or_path:
        return load_model(name_or_path)
    from gac.tasks.characters import build_character_tokenizer

    tokenizer = build_character_tokenizer(texts)
    return build_small_model(tokenizer, seed=seed, **sizes), tokenizer

"""Models: small ones built from a config, and checkpoints with their tokenizers."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from gac.tasks.adapters import ADAPTER_CONFIG, merged, require_peft

UNKNOWN_NAME = "is neither a model folder nor a reachable hub name"


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


def build_small_model_and_tokenizer(texts: Iterable[str], *, seed: int, **sizes: int) -> Any:
    """``(model, tokenizer)``: a character tokenizer over `texts`, and `build_small_model` of `sizes` for it."""
    from gac.tasks.characters import build_character_tokenizer

    tokenizer = build_character_tokenizer(texts)
    return build_small_model(tokenizer, seed=seed, **sizes), tokenizer


def load_model(
    name_or_path: str, *, dtype: Any = None, name: str | None = None, tokenizer_as_saved: bool = True
) -> Any:
    """``(model, tokenizer)`` of a causal LM checkpoint: a local folder or a hub name. LoRA adapters are merged.

    Args:
        name_or_path: what transformers loads.
        dtype: of the weights; default: fp32.
        name: by which the user knows it, for the error.
        tokenizer_as_saved: take a tokenizer that a folder holds whole as it is. transformers 5 takes the class of the
            model's architecture for it, whose own rules then drop what a character tokenizer does with blanks.

    Raises:
        ValueError: it cannot be loaded; the message says what was tried.
        ImportError: adapters without ``peft``.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

    name = name or name_or_path
    load = lambda source: AutoModelForCausalLM.from_pretrained(source, dtype=dtype or torch.float32)
    adapted = Path(name_or_path, ADAPTER_CONFIG).is_file()
    if adapted:
        require_peft(f"--model {name} (LoRA adapters)")
    part = "tokenizer"
    try:
        whole = tokenizer_as_saved and _is_whole(Path(name_or_path))
        kind = PreTrainedTokenizerFast if whole else AutoTokenizer
        tokenizer = kind.from_pretrained(name_or_path, padding_side="left")
        if not {*tokenizer("a 1", add_special_tokens=False)["input_ids"]} - {tokenizer.unk_token_id}:
            raise ValueError("it has no vocabulary")  # transformers 5 makes an empty one where the file is missing
        part = "model"
        model = merged(name_or_path, load) if adapted else load(name_or_path)
    except Exception as error:  # of whichever library reads the files
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        where = f"has no {part} that can be loaded" if Path(name_or_path).is_dir() else UNKNOWN_NAME
        raise ValueError(f"--model {name!r} {where}: {reason}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


def _is_whole(folder: Path) -> bool:
    """Whether a folder's tokenizer is all in its ``tokenizer.json``: its class is the general one."""
    config = folder / "tokenizer_config.json"
    if not config.is_file() or not (folder / "tokenizer.json").is_file():
        return False
    named = json.loads(config.read_text(encoding="utf-8")).get("tokenizer_class")
    return named in ("TokenizersBackend", "PreTrainedTokenizerFast")

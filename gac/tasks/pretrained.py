"""A pretrained model by the name that a user gives: a folder, a hub name or a GGUF file, with its own chat format."""

import os
from pathlib import Path
from typing import Any

from gac.tasks.adapters import add_adapters
from gac.tasks.characters import is_character_tokenizer
from gac.tasks.chat import PLAIN, end_replies
from gac.tasks.gguf_files import default_cache, find_gguf, gguf_folder
from gac.tasks.models import load_model


def load_pretrained(
    name: str,
    *,
    cache: str | Path | None = None,
    chat_template: str | None = None,
    lora: int | None = None,
    device: str = "cpu",
    seed: int = 0,
) -> tuple[Any, Any]:
    """``(model, tokenizer)`` that ask and answer in the model's chat format.

    The tokenizer ends replies as the template does. A tokenizer of characters, as `gac train` makes one, has no chat
    format and needs none.

    Args:
        name: a model folder (of LoRA adapters too, which are merged), a hub name, or what `find_gguf` takes.
        cache: where GGUF files are converted to; default: `default_cache`.
        chat_template: file with a Jinja template instead of the tokenizer's own; ``"none"`` for plain text.
        lora: rank of adapters, which then are all that is trained; default: all weights are.
        device: where it will be trained. Weights are fp32, for autocast to bf16 on a GPU; frozen ones bf16 there.
        seed: of the adapters.

    Raises:
        ValueError: it cannot be loaded or has no chat format; the message names ``--model`` and says what to do.
        ImportError: a GGUF file without ``gguf``, or adapters without ``peft``.
    """
    import torch

    files = find_gguf(name)
    if not files and not Path(name).expanduser().is_dir() and _is_path(name):
        raise ValueError(f"--model {name}: there is no such file or folder")
    source = gguf_folder(files, Path(cache or default_cache()).expanduser()) if files else os.path.expanduser(name)
    dtype = torch.bfloat16 if lora and device == "cuda" else torch.float32
    model, tokenizer = load_model(str(source), dtype=dtype, name=name)
    if chat_template == PLAIN:
        tokenizer.chat_template = None
    elif chat_template is not None:
        tokenizer.chat_template = Path(chat_template).expanduser().read_text(encoding="utf-8")
    if tokenizer.chat_template:
        try:
            end_replies(model, tokenizer)
        except ValueError as error:
            raise ValueError(
                f"--model {name}: {error}; give another with --chat-template FILE, or --chat-template {PLAIN} to ask "
                "in plain text"
            ) from error
    elif chat_template != PLAIN and not is_character_tokenizer(tokenizer):
        raise ValueError(
            f"--model {name} has no chat template, so that nothing says how it is asked; give one with --chat-template "
            f"FILE, or --chat-template {PLAIN} to ask in plain text"
        )
    return (add_adapters(model, rank=lora, seed=seed) if lora else model), tokenizer


def _is_path(name: str) -> bool:
    """Whether a name is meant as a path and not as one of a hub, which is ``name`` or ``owner/name``."""
    return name.startswith((".", "/", "~")) or os.path.isabs(name) or name.count("/") > 1 or name.endswith(".gguf")

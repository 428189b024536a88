"""Greedy accuracy on held-out problems, batched, with the KV cache."""

import contextlib
from collections.abc import Sequence
from typing import Any

from gac.tasks.chat import chat_match
from gac.tasks.problems import exact_match


@contextlib.contextmanager
def inference_mode_of(model: Any) -> Any:
    """The model in eval mode with its cache on, without gradients; restores both afterwards."""
    import torch

    training, use_cache = model.training, model.config.use_cache
    model.eval()
    model.config.use_cache = True
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)
        model.config.use_cache = use_cache


def encode_prompts(tokenizer: Any, prompts: Sequence[Any]) -> dict[str, Any]:
    """Left-padded tensors of plain or conversational prompts."""
    side, tokenizer.padding_side = tokenizer.padding_side, "left"
    try:
        if prompts and not isinstance(prompts[0], str):
            ids = tokenizer.apply_chat_template(list(prompts), add_generation_prompt=True, tokenize=False)
            return tokenizer(ids, padding=True, add_special_tokens=False, return_tensors="pt")
        return tokenizer(list(prompts), padding=True, return_tensors="pt", return_token_type_ids=False)
    finally:
        tokenizer.padding_side = side


def _end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Every token that ends a rollout, as TRL takes them: the tokenizer's, and those that the model declares."""
    known = model.generation_config.eos_token_id
    known = [] if known is None else [known] if isinstance(known, int) else list(known)
    return known if tokenizer.eos_token_id in known else [tokenizer.eos_token_id, *known]


def generate_greedily(
    model: Any, tokenizer: Any, prompts: Sequence[Any], *, max_new_tokens: int, batch_size: int = 256
) -> list[str]:
    """Greedy completions as text, in the order of `prompts`. Draws no random number."""
    from transformers import GenerationConfig

    settings = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=_end_tokens(model, tokenizer),
    )
    texts: list[str] = []
    with inference_mode_of(model):
        for begin in range(0, len(prompts), batch_size):
            batch = encode_prompts(tokenizer, prompts[begin : begin + batch_size]).to(model.device)
            tokens = model.generate(**batch, generation_config=settings)
            texts += tokenizer.batch_decode(tokens[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return texts


def accuracy(
    model: Any, tokenizer: Any, rows: Sequence[dict[str, Any]], *, max_new_tokens: int, batch_size: int = 256
) -> float:
    """Share of `rows` (``prompt``, ``answer``) that greedy decoding answers exactly; see `exact_match_reward`."""
    if not rows:
        raise ValueError("accuracy: no held-out problems to evaluate on")
    texts = generate_greedily(
        model, tokenizer, [row["prompt"] for row in rows], max_new_tokens=max_new_tokens, batch_size=batch_size
    )
    right = (
        exact_match(text, row["answer"]) if isinstance(row["prompt"], str) else chat_match(text, row["answer"])
        for text, row in zip(texts, rows, strict=True)
    )
    return sum(right) / len(rows)

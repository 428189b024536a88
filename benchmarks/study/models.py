"""Three sizes of one architecture (Qwen2, character tokenizer), built from configs."""

import dataclasses
from collections.abc import Iterable
from typing import Any

WARM_START_BATCH = 64
"""Demonstrations in a step of a warm start, whatever the size."""


@dataclasses.dataclass(frozen=True)
class Size:
    """Width and depth of a model, and the learning rate of its warm start."""

    hidden_size: int
    layers: int
    warm_start_lr: float


SIZES = {
    "small": Size(112, 2, 1e-3),  # 0.3 M parameters
    "medium": Size(192, 3, 1e-3),  # 1.3 M
    "large": Size(320, 4, 5e-4),  # 4.9 M
}


def build(size: str, texts: Iterable[str], seed: int) -> tuple[Any, Any]:
    """``(model, tokenizer)`` of a size, fp32 on the CPU; the tokenizer knows the characters of `texts`."""
    from gac.tasks.models import build_small_model_and_tokenizer

    chosen = SIZES[size]
    return build_small_model_and_tokenizer(texts, seed=seed, hidden_size=chosen.hidden_size, layers=chosen.layers)

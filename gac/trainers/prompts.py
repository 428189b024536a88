"""Demonstrations that belong to prompts: from rows of the training set to tensors beside the rollouts."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from gac.losses import IGNORE_INDEX
from gac.trainers.demonstrations import DemonstrationBatch, encode_pair, pad_demonstrations

COLUMN = "demonstration"
"""Column of `train_dataset`: what should follow the prompt, as text or as a message list; None where there is none."""

_IDS, _LABELS, _LENGTH = "gac_demo_ids", "gac_demo_labels", "gac_demo_length"

TOKENS = "gac_demo_tokens"
"""0-dim: what the supervised loss of the whole generation batch, over all ranks, is divided by."""


def require_column(dataset: Any, law: str) -> None:
    """Raises ValueError when a data set that names its columns has no demonstrations."""
    columns = getattr(dataset, "column_names", None)
    if columns is not None and COLUMN not in columns:
        raise ValueError(
            f"law={law!r} takes demonstrations from the prompts: train_dataset needs a column {COLUMN!r} (text, or "
            f"messages, or None for prompts that are left to RL alone); it has {sorted(columns)}"
        )


def has_demonstration(row: Mapping[str, Any]) -> bool:
    """Whether a row of the training set has one."""
    return bool(row.get(COLUMN))


def encode_demonstration(tokenizer: Any, row: Mapping[str, Any], **template: Any) -> tuple[list[int], list[int]]:
    """Tokens of a row's prompt and of its demonstration; `template` is for ``apply_chat_template``."""
    return encode_pair(tokenizer, row["prompt"], row[COLUMN], f"train_dataset column {COLUMN!r}", **template)


def with_labels(
    prompt: list[int], completion: list[int], *, completion_only: bool, max_length: int | None
) -> tuple[list[int], list[int]]:
    """Token ids and labels of a prompt and its demonstration, cut to `max_length` tokens."""
    labels = ([IGNORE_INDEX] * len(prompt) if completion_only else prompt) + completion
    return (prompt + completion)[:max_length], labels[:max_length]


def beside_rollouts(demonstrations: Sequence[tuple[list[int], list[int]] | None], pad: int) -> dict[str, torch.Tensor]:
    """CPU tensors with a row for each rollout, which follow the rollouts through shuffling, splitting and saving.

    Args:
        demonstrations: one for each rollout; None for those without, which are most.
        pad: token that fills up rows.
    """
    batch = pad_demonstrations([row or ((), ()) for row in demonstrations], pad)
    lengths = torch.tensor([len(row[0]) if row else 0 for row in demonstrations], dtype=torch.int64)
    return {_IDS: batch.input_ids, _LABELS: batch.labels, _LENGTH: lengths}


def demonstrations_of(rollouts: Mapping[str, Any], pad: int) -> DemonstrationBatch:
    """What a micro-batch of rollouts brings along; a row without labels when that is nothing."""
    lengths = rollouts[_LENGTH].cpu()
    rows = lengths.nonzero().squeeze(1)
    if not len(rows):
        return pad_demonstrations([], pad)
    width = int(lengths.max())
    attention_mask = (torch.arange(width) < lengths[rows, None]).to(torch.int64)
    ids, labels = (rollouts[name].cpu()[rows, :width] for name in (_IDS, _LABELS))
    return DemonstrationBatch(ids, attention_mask, labels)

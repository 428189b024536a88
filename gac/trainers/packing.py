"""Demonstrations one after the other in a row, instead of a row each with padding. Needs TRL and transformers."""

import inspect
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from datasets import Dataset
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from trl import pack_dataset

from gac.losses import IGNORE_INDEX
from gac.trainers.demonstrations import DemonstrationBatch, DemonstrationCollator


class PackedCollator:
    """Turns indices of packs into a `DemonstrationBatch` without padding.

    Packs are TRL's (``packing_strategy="bfd"``): the longest demonstrations first, each into the fullest pack that has
    room for it, so that none is cut but those that are longer than a pack. All are tokenised when this is made.

    Args:
        collate: whose demonstrations are packed.
        length: tokens of a pack.
    """

    def __init__(self, collate: DemonstrationCollator, length: int) -> None:
        ids, labels = zip(*(collate.encode(index) for index in range(len(collate))), strict=True)
        self._packs = pack_dataset(Dataset.from_dict({"input_ids": ids, "labels": labels}), length, "bfd")

    def __len__(self) -> int:
        return len(self._packs)

    def __call__(self, indices: Sequence[int]) -> DemonstrationBatch:
        """The packs at `indices` in one row; a demonstration's first token, with another before it, has no label."""
        packs = [self._packs[index] for index in indices]
        joined = lambda name: list(itertools.chain.from_iterable(pack[name] for pack in packs))
        lengths = tuple(joined("seq_lengths"))
        input_ids, labels = (torch.tensor([joined(name)]) for name in ("input_ids", "labels"))
        labels[0, torch.tensor((0, *lengths[:-1])).cumsum(0)] = IGNORE_INDEX
        return DemonstrationBatch(input_ids, torch.ones_like(input_ids), labels, lengths=lengths)


def require_separable(model: Any) -> None:
    """Raises ValueError for a model whose layers would look from one demonstration of a pack into those before it.

    transformers tells packed sequences apart by positions that begin anew, in the masks that it builds for the kinds of
    attention it knows (``masking_utils``, 5.23); recurrent layers carry their state on.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    attention = base.config._attn_implementation
    kinds = getattr(base.config.get_text_config(), "layer_types", None) or ()
    recurrent = sorted({kind for kind in kinds if not kind.endswith("attention") or kind.startswith("linear")})
    unknown = attention not in ALL_MASK_ATTENTION_FUNCTIONS.valid_keys()
    if unknown or recurrent or getattr(base, "_is_stateful", False):
        reason = f"attn_implementation={attention!r}" if unknown else ", ".join(recurrent) or "recurrent layers"
        raise ValueError(
            f"sft_packing=True needs layers that keep packed demonstrations apart, and {type(base).__name__} has "
            f"{reason}: load it with attn_implementation='sdpa', 'eager' or a flash attention, or set sft_packing=False"
        )
    if "position_ids" not in inspect.signature(base.forward).parameters:
        raise ValueError(
            f"sft_packing=True tells packed demonstrations apart by position_ids, which {type(base).__name__} does not "
            "take: set sft_packing=False"
        )

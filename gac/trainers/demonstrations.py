"""The supervised branch's data: order and batches. Needs torch and a tokenizer, not TRL."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import torch

from gac.losses import IGNORE_INDEX, count_label_tokens
from gac.trainers.rendering import encode_conversation, encode_pair, encode_text, template_of

_COLUMNS = (("input_ids", "labels"), ("prompt", "completion"), ("messages",), ("text",))
"""What a row may hold; of several, the first is taken."""
_FORMATS = "columns 'prompt' and 'completion' (text or message lists), 'messages', 'text', or 'input_ids' and 'labels'"


@dataclasses.dataclass
class DemonstrationBatch:
    """Right-padded int64 tensors ``[B, T]``; ``labels`` are -100 where there is no loss.

    Rows of a data set have their numbers in ``index``, and their labels in ``sources`` and what their losses are
    multiplied by in ``weights`` where it has such columns.
    With ``lengths`` there is one row without padding, of demonstrations of so many tokens one after the other.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor
    index: tuple[int, ...] | None = None
    sources: tuple[Any, ...] | None = None
    lengths: tuple[int, ...] | None = None
    weights: tuple[float, ...] | None = None

    def model_inputs(self) -> dict[str, torch.Tensor]:
        """What the model is called with. Positions that begin anew keep packed demonstrations apart, without a mask."""
        if self.lengths is None:
            return {"input_ids": self.input_ids, "attention_mask": self.attention_mask}
        positions = torch.cat([torch.arange(length) for length in self.lengths])[None]
        return {"input_ids": self.input_ids, "position_ids": positions.to(self.input_ids.device)}

    def by_row(self, values: torch.Tensor) -> torch.Tensor:
        """``[B, T]`` of tokens as ``[D, L]``, a row for each demonstration, filled up with zeros."""
        if self.lengths is None:
            return values
        return torch.nn.utils.rnn.pad_sequence(values[0].split(self.lengths), batch_first=True)

    def to(self, device: torch.device | str) -> "DemonstrationBatch":
        """The same batch on another device."""
        move = lambda tensor: tensor.to(device, non_blocking=True)
        return dataclasses.replace(
            self,
            input_ids=move(self.input_ids),
            attention_mask=move(self.attention_mask),
            labels=move(self.labels),
        )

    def count_tokens(self) -> int:
        """Tokens that carry loss."""
        return int(count_label_tokens(self.labels))


class EpochSampler:
    """An endless, seeded order of ``size`` indices: a fresh permutation per epoch.

    It has no state: the index at a position follows from the seed and the position, so saving a position is enough to
    continue, at any number of ranks.
    """

    def __init__(self, size: int, seed: int) -> None:
        if size < 1:
            raise ValueError(f"EpochSampler: size must be at least 1, got {size}")
        self.size = size
        self.seed = seed
        self._epoch = -1
        self._order: list[int] = []

    def take(self, position: int, count: int) -> list[int]:
        """Indices at ``position, ..., position + count - 1``; crosses epochs without a gap."""
        return [self._index(position + offset) for offset in range(count)]

    def _index(self, position: int) -> int:
        epoch, place = divmod(position, self.size)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**63)
            self._order = torch.randperm(self.size, generator=generator).tolist()
            self._epoch = epoch
        return self._order[place]


class DemonstrationCollator:
    """Turns indices of a demonstration set into a `DemonstrationBatch`, tokenising on the way.

    Args:
        tokenizer: of the model; needs a pad token, and an EOS token for plain text.
        demonstrations: a map-style data set or a sequence of mappings, each with ``input_ids`` and ``labels``; with
            ``prompt`` and ``completion`` (:func:`gac.trainers.rendering.encode_pair`); with ``messages``
            (:func:`~gac.trainers.rendering.encode_conversation`); or with ``text``, whose every token has a loss.
            Message lists may bring columns ``tools`` and ``chat_template_kwargs``.
        completion_only: loss on the completion only (default), of ``messages`` on what the assistant says; else on
            every token. Ignored for 'labels'.
        max_length: longer rows keep their first `max_length` tokens.
        source_column: has a label for each row. weight_column: has a number for each row, from 0 on.
        template: of message lists, for the tokenizer's ``apply_chat_template``.

    Raises:
        ValueError: empty or unsized set, missing columns, a first row that cannot be encoded.
    """

    def __init__(
        self,
        tokenizer: Any,
        demonstrations: Any,
        *,
        completion_only: bool = True,
        max_length: int | None = None,
        source_column: str | None = None,
        weight_column: str | None = None,
        template: Mapping[str, Any] | None = None,
    ) -> None:
        if not hasattr(demonstrations, "__len__") or not hasattr(demonstrations, "__getitem__"):
            raise ValueError(
                "sft_dataset must have a length and rows by index (a datasets.Dataset or a list of dicts), got "
                f"{type(demonstrations).__name__}; a stream cannot be shuffled and resumed exactly"
            )
        if isinstance(demonstrations, Mapping):
            raise ValueError(
                f"sft_dataset must be one data set, got a mapping with keys {sorted(map(str, demonstrations))}; "
                "pass one of its values"
            )
        if len(demonstrations) == 0:
            raise ValueError("sft_dataset is empty; the supervised branch needs at least one demonstration")
        if max_length is not None and max_length < 2:
            raise ValueError(f"sft_max_length must be at least 2 tokens, got {max_length}")
        self.tokenizer = tokenizer
        self.demonstrations = demonstrations
        self.completion_only = completion_only
        self.max_length = max_length
        self.template = template or {}
        self._pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        if self._pad is None:
            raise ValueError("the tokenizer has neither a pad nor an EOS token; set tokenizer.pad_token")
        first = demonstrations[0]
        if not isinstance(first, Mapping):
            raise ValueError(f"sft_dataset rows must be mappings with {_FORMATS}, got {type(first).__name__}")
        self.columns = next((columns for columns in _COLUMNS if set(columns) <= set(first)), ())
        if not self.columns:
            raise ValueError(f"sft_dataset needs {_FORMATS}; it has the columns {sorted(map(str, first))}")
        for option, column in (("gac_source_column", source_column), ("sft_weight_column", weight_column)):
            if column is not None and column not in first:
                raise ValueError(
                    f"{option}={column!r} is no column of sft_dataset, which has {sorted(map(str, first))}"
                )
        self.source_column, self.weight_column = source_column, weight_column
        self.encode(0)
        if weight_column is not None:
            self.weight(0)

    def __len__(self) -> int:
        return len(self.demonstrations)

    def __call__(self, indices: Sequence[int]) -> DemonstrationBatch:
        """The batch of the rows at `indices`, padded to its longest row."""
        batch = pad_demonstrations([self.encode(index) for index in indices], self._pad)
        column = self.source_column
        sources = None if column is None else tuple(self.demonstrations[index][column] for index in indices)
        weights = None if self.weight_column is None else tuple(self.weight(index) for index in indices)
        return dataclasses.replace(batch, index=tuple(indices), sources=sources, weights=weights)

    def weight(self, index: int) -> float:
        """What the loss of a row is multiplied by, from its column. Raises ValueError where that is no such number."""
        value = self.demonstrations[index][self.weight_column]
        number = float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
        if not 0 <= number < math.inf:
            raise ValueError(
                f"sft_dataset row {index}: column {self.weight_column!r} must hold a finite number from 0 on, got "
                f"{value!r}"
            )
        return number

    def encode(self, index: int) -> tuple[list[int], list[int]]:
        """Token ids and labels of a row."""
        ids, labels = self._labelled(self.demonstrations[index], f"sft_dataset row {index}")
        if not ids:
            raise ValueError(f"sft_dataset row {index} has no tokens")
        return ids[: self.max_length], labels[: self.max_length]

    def _labelled(self, row: Mapping[str, Any], where: str) -> tuple[list[int], list[int]]:
        given = [row[name] for name in self.columns]
        if self.columns == ("input_ids", "labels"):
            ids, labels = map(list, given)
            if len(ids) != len(labels):
                raise ValueError(f"{where}: {len(ids)} input_ids but {len(labels)} labels")
            return ids, labels
        if self.columns == ("text",):
            ids = encode_text(self.tokenizer, given[0])
            return ids, list(ids)
        template = template_of(row, self.template)
        if self.columns == ("messages",):
            return encode_conversation(self.tokenizer, given[0], where, replies_only=self.completion_only, **template)
        prompt, completion = encode_pair(self.tokenizer, given[0], given[1], where, **template)
        return prompt + completion, ([IGNORE_INDEX] * len(prompt) if self.completion_only else prompt) + completion


def pad_demonstrations(rows: Sequence[tuple[Sequence[int], Sequence[int]]], pad: int) -> DemonstrationBatch:
    """One batch from rows of token ids and labels, padded on the right to the longest row.

    Without rows, or with empty ones, it still has a row and a token: a forward and backward of it costs next to
    nothing and gives a loss of 0, so that every rank runs as many backward passes whatever its data.
    """
    rows = rows or [((), ())]
    length = max(1, *(len(ids) for ids, _ in rows))
    input_ids = torch.full((len(rows), length), pad, dtype=torch.int64)
    labels = torch.full_like(input_ids, IGNORE_INDEX)
    attention_mask = torch.zeros_like(input_ids)
    attention_mask[:, 0] = 1  # a row that attends to nothing has no finite attention
    for row, (ids, row_labels) in enumerate(rows):
        input_ids[row, : len(ids)] = torch.tensor(ids, dtype=torch.int64)
        labels[row, : len(ids)] = torch.tensor(row_labels, dtype=torch.int64)
        attention_mask[row, : len(ids)] = 1
    return DemonstrationBatch(input_ids, attention_mask, labels)

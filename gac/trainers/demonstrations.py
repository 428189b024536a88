"""The supervised branch's data: order, tokenisation, batches. Needs torch and a tokenizer, not TRL."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from gac.losses import IGNORE_INDEX, count_label_tokens

_FORMATS = "columns 'prompt' and 'completion' (text or message lists), or 'input_ids' and 'labels'"


@dataclasses.dataclass
class DemonstrationBatch:
    """Right-padded int64 tensors ``[B, T]``; ``labels`` are -100 where there is no loss.

    Rows of a data set have their numbers in ``index``, and their labels in ``sources`` where it has such a column.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor
    index: tuple[int, ...] | None = None
    sources: tuple[Any, ...] | None = None

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
        demonstrations: a map-style data set or a sequence of mappings with one of the formats above. Plain text:
            prompt and completion are tokenised apart, as generation does, and EOS closes the completion. Message
            lists: the chat template renders both; the completion is what it adds to the rendered prompt, up to the
            EOS token where nothing but blanks and special tokens come after that.
        completion_only: loss on the completion only (default), else on every token. Ignored for 'labels'.
        max_length: longer rows keep their first `max_length` tokens.
        source_column: has a label for each row.

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
        self._pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        if self._pad is None:
            raise ValueError("the tokenizer has neither a pad nor an EOS token; set tokenizer.pad_token")
        first = demonstrations[0]
        if not isinstance(first, Mapping):
            raise ValueError(f"sft_dataset rows must be mappings with {_FORMATS}, got {type(first).__name__}")
        self.pretokenized = {"input_ids", "labels"} <= set(first)
        if not self.pretokenized and not {"prompt", "completion"} <= set(first):
            raise ValueError(f"sft_dataset needs {_FORMATS}; it has the columns {sorted(map(str, first))}")
        if source_column is not None and source_column not in first:
            raise ValueError(
                f"gac_source_column={source_column!r} is no column of sft_dataset, which has {sorted(map(str, first))}"
            )
        self.source_column = source_column
        self._encode(0)

    def __len__(self) -> int:
        return len(self.demonstrations)

    def __call__(self, indices: Sequence[int]) -> DemonstrationBatch:
        """The batch of the rows at `indices`, padded to its longest row."""
        batch = pad_demonstrations([self._encode(index) for index in indices], self._pad)
        column = self.source_column
        sources = None if column is None else tuple(self.demonstrations[index][column] for index in indices)
        return dataclasses.replace(batch, index=tuple(indices), sources=sources)

    def _encode(self, index: int) -> tuple[list[int], list[int]]:
        row = self.demonstrations[index]
        if self.pretokenized:
            ids, labels = list(row["input_ids"]), list(row["labels"])
            if len(ids) != len(labels):
                raise ValueError(f"sft_dataset row {index}: {len(ids)} input_ids but {len(labels)} labels")
        else:
            prompt, completion = encode_pair(
                self.tokenizer, row["prompt"], row["completion"], f"sft_dataset row {index}"
            )
            ids = prompt + completion
            labels = ([IGNORE_INDEX] * len(prompt) if self.completion_only else prompt) + completion
        if not ids:
            raise ValueError(f"sft_dataset row {index} has no tokens")
        return ids[: self.max_length], labels[: self.max_length]


def encode_pair(tokenizer: Any, prompt: Any, completion: Any, where: str) -> tuple[list[int], list[int]]:
    """Tokens of a prompt and of its completion, as :class:`DemonstrationCollator` describes.

    Args:
        tokenizer: of the model.
        prompt, completion: both text, or both message lists.
        where: names the row in errors.

    Raises:
        ValueError: mixed formats, no EOS token, no chat template, or one that rewrites the prompt.
    """
    if isinstance(prompt, str) and isinstance(completion, str):
        if tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer has no EOS token, so a plain-text completion would have no end")
        text = completion.removesuffix(tokenizer.eos_token)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        return list(tokenizer(prompt)["input_ids"]), [*ids, tokenizer.eos_token_id]
    if isinstance(prompt, str) or isinstance(completion, str):
        raise ValueError(
            f"{where}: prompt is {type(prompt).__name__} and completion {type(completion).__name__}; both must be "
            "text, or both message lists"
        )
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            f"{where} holds message lists but the tokenizer has no chat template; set tokenizer.chat_template or pass "
            "plain text"
        )
    head = tokenizer.apply_chat_template(list(prompt), add_generation_prompt=True, tokenize=False)
    whole = tokenizer.apply_chat_template([*prompt, *completion], tokenize=False)
    if not whole.startswith(head):
        raise ValueError(
            f"{where}: the chat template does not keep the prompt as a prefix of the conversation, so the completion "
            "cannot be located; pass 'input_ids' and 'labels' instead"
        )
    encode = lambda text: list(tokenizer(text, add_special_tokens=False)["input_ids"])
    return encode(head), encode(_to_the_end(tokenizer, whole[len(head) :]))


def _to_the_end(tokenizer: Any, text: str) -> str:
    """A rendered completion up to its end token: what a template puts after it, no rollout will ever have."""
    end = tokenizer.eos_token
    reply, found, rest = text.rpartition(end) if end else ("", "", text)
    for token in tokenizer.all_special_tokens:
        rest = rest.replace(token, "")
    return reply + found if found and not rest.strip() else text


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

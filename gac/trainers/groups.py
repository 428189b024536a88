"""Which rollouts answer the same prompt, and an order of rollouts that keeps them together."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch


@dataclasses.dataclass(frozen=True)
class GroupLayout:
    """Places of one rank's rollouts in a generation batch, before any shuffling.

    Attributes:
        rows: rollouts on this rank.
        size: rollouts of a prompt; they follow each other, and may continue on the next rank.
        offset: rollouts on earlier ranks.
    """

    rows: int
    size: int
    offset: int = 0

    def ids(self) -> torch.Tensor:
        """``[rows]`` int64: number of each rollout's group, the same on every rank."""
        return (self.offset + torch.arange(self.rows)) // self.size

    def heads(self) -> torch.Tensor:
        """``[rows]`` bool: the first rollout of each group. Over all ranks, every group has one."""
        return (self.offset + torch.arange(self.rows)) % self.size == 0

    def shuffled(self) -> torch.Tensor:
        """``[rows]`` int64: an order with groups in random sequence and each group's rollouts side by side.

        Cut into equal pieces of a multiple of `size`, every piece holds whole groups. One permutation is drawn from
        torch's global CPU generator.
        """
        _, inverse, counts = self.ids().unique_consecutive(return_inverse=True, return_counts=True)
        return torch.randperm(len(counts))[inverse].argsort(stable=True)


GROUP, SOURCE = "gac_group", "gac_source"
"""Keys of a generation batch: ``[rows]`` int64, the number of each rollout's prompt; a list with its source's label."""

ROLLOUTS = "rollouts"
"""The source of rollouts whose prompts name none."""


def origins(layout: GroupLayout, prompts: Sequence[Mapping[str, Any]], column: str | None) -> dict[str, Any]:
    """Where each rollout comes from, as entries of the generation batch, which follow it through shuffling and saving.

    Args:
        prompts: the row of the training set that each rollout answers. column: of labels; None for none.
    """
    if column is None:
        return {GROUP: layout.ids()}
    labels = [row.get(column) for row in prompts]
    return {GROUP: layout.ids(), SOURCE: [ROLLOUTS if label is None else label for label in labels]}


def take_rows(batch: Mapping[str, Any], order: torch.Tensor) -> dict[str, Any]:
    """The batch with its rows in another order; 0-dim tensors and None stay as they are.

    Args:
        batch: tensors with rows in front, or lists.
        order: ``[rows]`` int64.
    """

    def take(value: Any) -> Any:
        if value is None or (isinstance(value, torch.Tensor) and value.dim() == 0):
            return value
        if isinstance(value, torch.Tensor):
            return value[order.to(value.device)]
        return [value[index] for index in order.tolist()]

    return {name: take(value) for name, value in batch.items()}

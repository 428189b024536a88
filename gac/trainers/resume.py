"""Where a run goes on when its number of ranks or its batch sizes are not those of the checkpoint.

A *micro-step* is a micro-batch on every rank; a *generation* is the rollouts that TRL buffers at a time. Positions are
turned into rows over all ranks and back into the micro-steps of the new run. Needs TRL for `redistribute`.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.nn import functional

from gac.losses import IGNORE_INDEX
from gac.trainers.groups import take_rows


@dataclasses.dataclass(frozen=True)
class Batching:
    """How a run cuts its rollouts.

    Attributes:
        ranks: data-parallel processes.
        rows: rollouts per rank and micro-step.
        accumulation: micro-steps per optimizer step.
        steps_per_generation: micro-steps that share a generation.
        iterations: how often each generation is used.
        group: rollouts of a prompt.
    """

    ranks: int
    rows: int
    accumulation: int
    steps_per_generation: int
    iterations: int
    group: int

    @property
    def micro_rows(self) -> int:
        """Rollouts of a micro-step over all ranks."""
        return self.ranks * self.rows

    @property
    def step_rows(self) -> int:
        """Rollouts of an optimizer step over all ranks."""
        return self.micro_rows * self.accumulation

    @property
    def generation_rows(self) -> int:
        """Rollouts of a generation over all ranks: TRL's ``generation_batch_size``."""
        return self.micro_rows * self.steps_per_generation

    @property
    def prompts(self) -> int:
        """Prompts of a generation."""
        return self.generation_rows // self.group

    @property
    def cycle(self) -> int:
        """Micro-steps between two generations."""
        return self.steps_per_generation * self.iterations


@dataclasses.dataclass(frozen=True)
class Position:
    """How far a run has come.

    Attributes:
        epoch: whole passes over the prompts.
        taken: micro-steps taken from the data of the pass under way.
        trained: micro-steps with a reinforcement branch since the beginning, which TRL counts its generations by.
    """

    epoch: int
    taken: int
    trained: int

    def moved(self, old: Batching, new: Batching) -> "Position":
        """The same place among prompts and rollouts, in the micro-steps of another batching.

        Raises:
            ValueError: no micro-step of the new run begins there; says which sizes have one that does.
        """
        taken, part = divmod(self.taken, old.cycle)
        part = _within_generation(part, old, new)
        prompts = taken * old.prompts
        if prompts % new.prompts:
            raise ValueError(
                f"{prompts} prompts of this epoch are done, and the new run would take {new.prompts} per generation: "
                "that is no whole number of generations"
            )
        taken = prompts // new.prompts * new.cycle + part
        if taken % new.accumulation:
            raise ValueError(
                f"{taken * new.micro_rows} rows of this epoch are done, and the new run would take {new.step_rows} per "
                "optimizer step: that is no whole number of steps"
            )
        trained, part = divmod(self.trained, old.cycle)
        return Position(self.epoch, taken, trained * new.cycle + _within_generation(part, old, new))


def _within_generation(micro_steps: int, old: Batching, new: Batching) -> int:
    """Micro-steps of the new run that use up as much of a generation as ``micro_steps`` of the old one did."""
    if not micro_steps:
        return 0
    same = (old.generation_rows, old.iterations, old.group) == (new.generation_rows, new.iterations, new.group)
    if not same:
        raise ValueError(
            f"the checkpoint lies within a generation of {old.generation_rows} rollouts (num_generations={old.group}, "
            f"num_iterations={old.iterations}), and the new run would have generations of {new.generation_rows} "
            f"(num_generations={new.group}, num_iterations={new.iterations})"
        )
    rows = micro_steps * old.micro_rows
    if rows % new.micro_rows:
        raise ValueError(
            f"{rows} rows of a generation are done, and the new run would take {new.micro_rows} per micro-step: that "
            "is no whole number of micro-steps"
        )
    return rows // new.micro_rows


def redistribute(
    saved: Sequence[Sequence[Mapping[str, Any]]], new: Batching, rank: int, pad: int
) -> list[dict[str, Any]]:
    """One rank's share of a generation that other ranks have buffered.

    The rollouts of an optimizer step stay those of an optimizer step where the global batch is the same, and groups
    that were whole stay whole where ``rows`` is a multiple of the group.

    Args:
        saved: for each of the old ranks, in order, its micro-batches.
        new: of the run that goes on.
        rank: whose share.
        pad: token that fills up rows.

    Returns:
        ``steps_per_generation`` micro-batches of ``rows`` rollouts, on the device of `saved`.
    """
    from trl.trainer.utils import split_tensor_dict

    in_order = [part for micro_step in zip(*saved, strict=True) for part in micro_step]
    whole = {key: _joined(key, [part[key] for part in in_order], pad) for key in in_order[0]}
    starts = [(micro_step * new.ranks + rank) * new.rows for micro_step in range(new.steps_per_generation)]
    order = torch.tensor([start + row for start in starts for row in range(new.rows)])
    return split_tensor_dict(take_rows(whole, order), new.steps_per_generation)


def _joined(key: str, values: list[Any], pad: int) -> Any:
    """Rows of several micro-batches, which may be padded to different lengths: prompts on the left, all else right."""
    first = values[0]
    if first is None or (isinstance(first, torch.Tensor) and first.dim() == 0):
        return first  # numbers of the whole generation are the same everywhere
    if not isinstance(first, torch.Tensor):
        return [row for value in values for row in value]
    if first.dim() > 1:
        fill = pad if key.endswith("_ids") else IGNORE_INDEX if key.endswith("_labels") else 0
        width = max(value.shape[1] for value in values)
        on_left = key.startswith("prompt_")
        values = [_padded(value, width - value.shape[1], fill, on_left=on_left) for value in values]
    return torch.cat(values)


def _padded(value: torch.Tensor, missing: int, fill: int, *, on_left: bool) -> torch.Tensor:
    later_dims = (0, 0) * (value.dim() - 2)
    return functional.pad(value, (*later_dims, *((missing, 0) if on_left else (0, missing))), value=fill)

"""A step's numbers on their device: one vector, and what looks at parts of it as if they were tensors of their own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping, Sequence

import torch
from torch import Tensor

from gac.statistics.step import Statistics
from gac_kernels.step_vector import OFFSETS, ROW, SHAPES, STATISTICS

OF_ERRORS = ("last", "level", "average", "count")
"""The state of :class:`gac.statistics.uncertainty.SuccessiveDifferences` in a vector."""

_BY_AVERAGE = ("sums", "squares")


class StepVector:
    """The state of a step's end, as :mod:`gac_kernels.step_vector` lays it out. Never changed by a later step.

    Args:
        numbers: the vector, float64. averages: that the law keeps.
    """

    __slots__ = ("_averages", "_views", "numbers")

    def __init__(self, numbers: Tensor, averages: int) -> None:
        self.numbers = numbers
        self._averages = averages
        self._views: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        """A part of it, by the names there; a view, the same one each time."""
        view = self._views.get(name)
        if view is None:
            view = self._views[name] = self._view(name)
        return view

    def _view(self, name: str) -> Tensor:
        if name not in SHAPES:
            return self.numbers[ROW.index(name)]
        begin, shape = OFFSETS[name], SHAPES[name]
        if not shape:
            return self.numbers[begin]
        whole = self.numbers[begin : begin + torch.Size(shape).numel()].view(shape)
        return whole[: self._averages] if name in _BY_AVERAGE else whole

    @property
    def row(self) -> Tensor:
        """What the metrics tell of the step."""
        return self["row"]

    def statistics(self) -> Statistics:
        """Those of the step: views."""
        found = object.__new__(Statistics)
        vars(found).update(zip(Statistics.names(), self.row[STATISTICS].unbind(), strict=True))
        return found


class VectorState(MutableMapping[str, Tensor]):
    """Some parts of a vector, read and written like the dictionary of tensors that they stand for.

    Args:
        vector: it. names: of the parts, in order.
    """

    def __init__(self, vector: StepVector, names: Sequence[str]) -> None:
        self._vector = vector
        self._names: Mapping[str, None] = dict.fromkeys(names)
        self._own: dict[str, Tensor] = {}
        self._whole = True

    @property
    def vector(self) -> StepVector | None:
        """The vector; None where parts were replaced."""
        return self._vector if self._whole else None

    def __getitem__(self, name: str) -> Tensor:
        if name in self._own:
            return self._own[name]
        if name not in self._names:
            raise KeyError(name)
        return self._vector[name]

    def __setitem__(self, name: str, value: Tensor) -> None:
        self._own[name], self._whole = value, False
        if name not in self._names:
            self._names = {**self._names, name: None}

    def __delitem__(self, name: str) -> None:
        self._names = {own: None for own in self._names if own != name}
        self._own.pop(name, None)
        self._whole = False

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def vector_of(
    law: Mapping[str, Tensor], errors: Mapping[str, Tensor], skipped: Tensor, averages: int, device: torch.device
) -> StepVector:
    """The vector that holds these: the one that they are parts of, or a new one with copies.

    Args:
        law: its state. errors: those of statistics. skipped: steps dropped so far, 0-dim.
        averages: that the law keeps. device: where the vector lies.
    """
    if isinstance(law, VectorState) and isinstance(errors, VectorState):
        found = law.vector
        if found is not None and found is errors.vector and skipped is found["skipped"]:
            return found
    parts = {**law, **errors, "skipped": skipped}
    pieces = []
    for name, shape in [*((name, ()) for name in ROW), *list(SHAPES.items())[1:]]:
        part = parts.get(name)
        piece = torch.zeros(shape, dtype=torch.float64, device=device)
        if part is not None:
            (piece[: part.shape[0]] if shape else piece).copy_(part, non_blocking=True)
        pieces.append(piece.reshape(-1))
    return StepVector(torch.cat(pieces), averages)

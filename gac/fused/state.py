"""A state of tensors by name that is kept as Python numbers until somebody asks for a tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor

Numbers = dict[str, Any]
"""A float, or a list of (lists of) floats, by name."""


class HostState(MutableMapping[str, Tensor]):
    """Reads and writes like the dictionary of float64 tensors on the CPU that it stands for.

    Args:
        numbers: what it holds; not changed afterwards.
        ahead: what the numbers are after so many steps in which nothing was measured.

    Attributes:
        passed: how many of these there were; they are made up for when somebody reads.
    """

    def __init__(self, numbers: Numbers, ahead: Callable[[Numbers, int], Numbers] | None = None) -> None:
        self._numbers = numbers
        self._ahead = ahead
        self._tensors: dict[str, Tensor] = {}  # those that were asked for: anybody may have written into them
        self.passed = 0

    @property
    def was_read(self) -> bool:
        """Whether a tensor was handed out, which somebody may write into."""
        return bool(self._tensors)

    def numbers(self) -> Numbers:
        """What it holds now."""
        if self._tensors:
            self._numbers = self._numbers | {name: tensor.tolist() for name, tensor in self._tensors.items()}
        if self.passed and self._ahead is not None:
            self._numbers, self.passed = self._ahead(self._numbers, self.passed), 0
            self._tensors = {}  # what was handed out stays
        return self._numbers

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._tensors or self.passed:
            self._tensors[name] = torch.tensor(self.numbers()[name], dtype=torch.float64)
        return self._tensors[name]

    def __setitem__(self, name: str, value: Tensor) -> None:
        self._numbers = self.numbers() | {name: None}
        self._tensors[name] = value

    def __delitem__(self, name: str) -> None:
        self._numbers = {key: value for key, value in self.numbers().items() if key != name}
        self._tensors.pop(name, None)

    def __iter__(self) -> Iterator[str]:
        return iter(self._numbers)

    def __len__(self) -> int:
        return len(self._numbers)


def numbers_of(state: Mapping[str, Tensor]) -> Numbers:
    """A state's numbers, read on the host."""
    if isinstance(state, HostState):
        return state.numbers()
    return {name: value.tolist() for name, value in state.items()}

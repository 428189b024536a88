"""A state of tensors by name that is kept as Python numbers until somebody asks for a tensor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor

Numbers = dict[str, Any]
"""A float, or a list of (lists of) floats, by name."""


class HostState(MutableMapping[str, Tensor]):
    """Reads and writes like the dictionary of float64 tensors on the CPU that it stands for.

    Args:
        numbers: what it holds; not changed afterwards.
    """

    def __init__(self, numbers: Numbers) -> None:
        self._numbers = numbers
        self._tensors: dict[str, Tensor] = {}  # those that were asked for: anybody may have written into them

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._tensors:
            self._tensors[name] = torch.tensor(self._numbers[name], dtype=torch.float64)
        return self._tensors[name]

    def __setitem__(self, name: str, value: Tensor) -> None:
        self._numbers = self._numbers | {name: None}
        self._tensors[name] = value

    def __delitem__(self, name: str) -> None:
        self._numbers = {key: value for key, value in self._numbers.items() if key != name}
        self._tensors.pop(name, None)

    def __iter__(self) -> Iterator[str]:
        return iter(self._numbers)

    def __len__(self) -> int:
        return len(self._numbers)

    def numbers(self) -> Numbers:
        """What it holds now."""
        return self._numbers | {name: tensor.tolist() for name, tensor in self._tensors.items()}


def numbers_of(state: Mapping[str, Tensor]) -> Numbers:
    """A state's numbers, read on the host."""
    if isinstance(state, HostState):
        return state.numbers()
    return {name: value.tolist() for name, value in state.items()}

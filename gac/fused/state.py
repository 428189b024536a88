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
        numbers: what it holds, or a function that gives them; not changed afterwards.
        ahead: what the numbers are after so many steps in which nothing was measured.
        vector: what the numbers stand in, for whoever reads them there.

    Attributes:
        passed: how many of these there were; they are made up for when somebody reads.
    """

    def __init__(
        self,
        numbers: Numbers | Callable[[], Numbers],
        ahead: Callable[[Numbers, int], Numbers] | None = None,
        vector: Any = None,
    ) -> None:
        self._given: Numbers | Callable[[], Numbers] = numbers
        self._ahead, self._vector = ahead, vector
        self._tensors: dict[str, Tensor] = {}  # those that were asked for: anybody may have written into them
        self.passed = 0

    @property
    def _numbers(self) -> Numbers:
        if not isinstance(self._given, dict):
            self._given = self._given()
        return self._given

    @property
    def was_read(self) -> bool:
        """Whether a tensor was handed out, which somebody may write into."""
        return bool(self._tensors)

    @property
    def vector(self) -> Any:
        """What all but the steps that have passed stands in; None where there is no such thing."""
        return None if self._tensors else self._vector

    def _hold(self, numbers: Numbers) -> None:
        self._given, self._vector = numbers, None

    def numbers(self) -> Numbers:
        """What it holds now."""
        if self._tensors:
            self._hold(self._numbers | {name: tensor.tolist() for name, tensor in self._tensors.items()})
        if self.passed and self._ahead is not None:
            self._hold(self._ahead(self._numbers, self.passed))
            self.passed = 0
            self._tensors = {}  # what was handed out stays
        return self._numbers

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._tensors or self.passed:
            self._tensors[name] = torch.tensor(self.numbers()[name], dtype=torch.float64)
        return self._tensors[name]

    def __setitem__(self, name: str, value: Tensor) -> None:
        self._hold(self.numbers() | {name: None})
        self._tensors[name] = value

    def __delitem__(self, name: str) -> None:
        self._hold({key: value for key, value in self.numbers().items() if key != name})
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

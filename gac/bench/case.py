"""What a timed case is: an operation on given inputs, and what is ready to be run of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from gac.bench import kronecker
from gac.bench.gates import Gate
from gac.plan.shapes import LlamaShape

LISTS = {"moments": 1, "sketch": 1, "weighted_sketch": 3, "pair_moments": 2, "mix_": 2, "kronecker_sketch": 1}
"""Operands of the size of a model's parameter list (of its block's activations), by operation."""

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def dtype_of(name: str) -> torch.dtype:
    """``"bf16"`` -> ``torch.bfloat16``. Raises ValueError for an unknown name."""
    if name not in _DTYPES:
        raise ValueError(f"unknown dtype {name!r}; known: {', '.join(_DTYPES)}")
    return _DTYPES[name]


@dataclass(frozen=True)
class Case:
    """What is timed: operation, dtype name, and either a number of elements or a model's parameter list.

    ``kronecker_sketch`` takes activations, so many ``tokens`` of them for a model.
    """

    operation: str
    dtype: str
    elements: int = 0
    model: LlamaShape | None = None
    note: str = ""
    tokens: int = 0

    @property
    def label(self) -> str:
        """``64K`` for elements, the name of a model for a list."""
        return self.model.name if self.model else size_label(self.elements)

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        if self.operation == "kronecker_sketch":
            return list(kronecker.activations(self.model, self.elements, self.tokens))
        return self.model.shapes() if self.model else [(self.elements,)]

    @property
    def numel(self) -> int:
        """Elements of one operand."""
        return sum(math.prod(shape) for shape in self.shapes)

    def memory(self) -> int:
        """Bytes that the case takes at most, apart from small change."""
        return LISTS.get(self.operation, 3) * self.numel * dtype_of(self.dtype).itemsize


def size_label(elements: int) -> str:
    """``65536`` -> ``64K``; numbers that are no whole multiple stay numbers."""
    for unit, name in ((1 << 20, "M"), (1 << 10, "K")):
        if elements >= unit and elements % unit == 0:
            return f"{elements // unit}{name}"
    return str(elements)


@dataclass
class Prepared:
    """A case ready to run. Each callable takes the number of an input set.

    Attributes:
        ours: the operation.
        gate: compares it with the reference.
        bytes: the least that has to move: inputs read once, outputs written once.
        peers: by name; the part before the colon is its kind.
        omitted: peers that cannot run here, with the reason.
        readers: read the same inputs.
        read_bytes: what they read.
        sets: number of input sets.
    """

    ours: Callable[[int], object]
    gate: Callable[[], Gate]
    bytes: int
    readers: dict[str, Callable[[int], object]]
    read_bytes: int
    sets: int
    peers: dict[str, Callable[[int], object]] = field(default_factory=dict)
    omitted: dict[str, str] = field(default_factory=dict)

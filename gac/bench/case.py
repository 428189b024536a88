"""What a timed case is: an operation on given inputs, and what it takes to run it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from gac.bench import kronecker, limits
from gac.bench.gates import Gate
from gac.bench.inputs import Pools
from gac.plan.shapes import LlamaShape

SCALE = 1.7

LISTS = {
    "moments": 1,
    "sketch": 1,
    "weighted_sketch": 3,
    "absorb_sketch_": 1,
    "accumulate_": 3,
    "pair_moments": 2,
    "mix_": 2,
    "kronecker_sketch": 1,
}
"""Lists of tensors of an operation (of its block's activations), in tensors of its gradients' size and dtype: what
memory they take."""

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


def inputs(case: Case, pools: Pools, operands: Sequence[str], wide: Sequence[str] = ()) -> Any:
    """Input sets of the operands (``wide`` ones float32), with the readers of their memory and the bytes these read."""
    dtypes = {name: torch.float32 if name in wide else dtype_of(case.dtype) for name in operands}
    numel = sum(math.prod(shape) for shape in case.shapes)
    sets = pools.sets(numel * sum(dtype.itemsize for dtype in dtypes.values()))
    lists = [pools.lists(name, case.shapes, dtype, sets) for name, dtype in dtypes.items()]
    flats = [[one.flat[k] for one in lists] for k in range(sets)]
    return lists, limits.readers(flats), sum(flat.nbytes for flat in flats[0]), sets

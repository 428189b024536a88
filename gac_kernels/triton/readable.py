"""Tensors as kernels can read them: contiguous, of a known dtype, copied only where they have to be."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from gac_kernels.strides import flat_views

ELEMENTS = {
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}
READABLE = ELEMENTS | {torch.float8_e4m3fn: tl.uint8, torch.float8_e5m2: tl.int8}
"""What kernels that write no element of a tensor's own type read, as which type; see ``kernels._widen``."""

SCALES = torch.uint8
"""Stands for scales of blocks where the dtype of second moments would."""

_dtype = operator.attrgetter("dtype")


def dtypes_of(tensors: Sequence[Tensor], seen: frozenset[torch.dtype] = frozenset()) -> Any:
    """The dtype of all tensors, or a tuple of their dtypes. ``seen``: those there are, where that is known."""
    if len(seen) == 1:
        return next(iter(seen))
    dtypes = tuple(map(_dtype, tensors))
    return dtypes[0] if len(set(dtypes)) == 1 else dtypes


def supported(tensor: Tensor) -> Tensor:
    """``tensor`` in a dtype that the kernels read (8-bit floats are widened)."""
    return tensor.detach() if tensor.dtype in ELEMENTS else tensor.detach().float()


def is_known(dtypes: frozenset[torch.dtype]) -> bool:
    """True when kernels can read all of these."""
    return READABLE.keys() >= dtypes


def is_plain(tensor: Tensor) -> bool:
    """True when kernels can read the tensor as it is."""
    return tensor.is_contiguous() and tensor.dtype in ELEMENTS


def all_plain(tensors: Sequence[Tensor]) -> bool:
    """The same of all; host time counts here, lists have hundreds of tensors (see :mod:`gac_kernels.arguments`)."""
    return all(map(Tensor.is_contiguous, tensors)) and ELEMENTS.keys() >= set(map(_dtype, tensors))


def in_order(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """Contiguous memory with the same elements in the same order, copied only if it has to be."""
    return [(t.detach() if t.dtype in READABLE else supported(t)).contiguous() for t in tensors]


def any_order(tensor: Tensor) -> Tensor:
    """Contiguous memory with the same elements, in whatever order costs nothing."""
    if tensor.is_contiguous() and tensor.dtype in READABLE:
        return tensor
    tensor = tensor.detach() if tensor.dtype in READABLE else supported(tensor)
    dense = flat_views(tensor)
    return tensor.contiguous() if dense is None else dense[0]


def readable_pairs(a: list[Tensor], b: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Each pair in one order; the lists themselves where nothing has to be copied."""
    if all_plain(a) and all_plain(b):
        return a, b
    pairs = [readable_pair(x, y) for x, y in zip(a, b, strict=True)]
    return [x for x, _ in pairs], [y for _, y in pairs]


def readable_pair(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Both tensors in one order, copied only if they have to be."""
    if is_plain(x) and is_plain(y):
        return x, y
    x, y = supported(x), supported(y)
    dense = flat_views(x, y)
    return (x.contiguous(), y.contiguous()) if dense is None else (dense[0], dense[1])

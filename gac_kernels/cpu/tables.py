"""Tensor tables: a list of tensors as the numbers that the C functions take. See ``csrc/gac_cpu.h``."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from gac_kernels.arguments import KNOWN_DTYPES, PLAIN, TensorList, getter, name_what_is_wrong
from gac_kernels.elements import Elements
from gac_kernels.strides import dense_strides, runs

DTYPE_CODES = {dtype: code for code, dtype in enumerate(KNOWN_DTYPES)}
PAIRED_CODES = {dtype: code for dtype, code in DTYPE_CODES.items() if code < 4}
"""Of what operations on two lists, and those on tokens, read."""

SCALE_CODE = 6
"""Stands for scales of blocks, in the place of second moments."""


class Table:
    """Addresses, sizes and dtypes of a list of tensors.

    Attributes:
        rows: the int64 numbers.
        numels: elements of each tensor.
        form: which rows there are: 0, 1, or 2 + dtype code.
        kept: what has to stay alive while C reads: the copies of tensors that needed one.
    """

    __slots__ = ("form", "kept", "numels", "rows")

    def __init__(self, rows: bytes, numels: Sequence[int], form: int, kept: list[Tensor] | None) -> None:
        self.rows = rows
        self.numels = numels
        self.form = form
        self.kept = kept


_ONE = struct.Struct("2q")


def _packed(rows: list[int]) -> bytes:
    return struct.pack(f"{len(rows)}q", *rows)


_dtype, _is_cpu = getter("dtype"), getter("is_cpu")


def plain_table(tensors: list[Tensor], codes: dict[torch.dtype, int] = DTYPE_CODES) -> Table | None:
    """The table of contiguous CPU tensors of plain types; None when any needs the careful way. Checks nothing else."""
    try:
        if len(tensors) == 1:
            (tensor,) = tensors
            if type(tensor) in PLAIN and tensor.is_cpu and tensor.is_contiguous():
                numel = tensor.numel()
                if numel != 1:
                    rows = _ONE.pack(tensor.data_ptr(), numel)
                    return Table(rows, [numel], 2 + codes[tensor.dtype], None)
        if not (PLAIN.issuperset(map(type, tensors)) and all(map(_is_cpu, tensors))):
            return None
        if not all(map(Tensor.is_contiguous, tensors)):
            return None
        found = [codes[d] for d in set(map(_dtype, tensors))]
        numels = list(map(Tensor.numel, tensors))
        if 1 in numels and any(map(Tensor.is_neg, tensors)):  # a lazily negated view that counts as contiguous
            return None
        rows = [*map(Tensor.data_ptr, tensors), *numels]
        if len(found) == 1:
            return Table(_packed(rows), numels, 2 + found[0], None)
        return Table(_packed(rows + [codes[d] for d in map(_dtype, tensors)]), numels, 0, None)
    except (KeyError, RuntimeError, TypeError):  # an unusual dtype or layout, or no sequence of tensors at all
        return None


def readable(tensor: Tensor, codes: dict[torch.dtype, int] = PAIRED_CODES) -> Tensor:
    """The tensor's values in a dtype that C knows, nothing lazy about it."""
    tensor = tensor.detach().resolve_neg()
    return tensor if tensor.dtype in codes else tensor.to(torch.float32)


def second_table(read: Elements) -> Table | None:
    """The table of second moments or of scales."""
    if read.seconds is None:
        return None
    if not read.scaled:
        return list_table(read.seconds, read.numels)
    scales = read.seconds.tensors
    numels = list(map(Tensor.numel, scales))
    return Table(_packed([*map(Tensor.data_ptr, scales), *numels]), numels, 2 + SCALE_CODE, scales)


def list_table(listed: TensorList, numels: Sequence[int]) -> Table:
    """The table of checked CPU tensors of `numels` elements, whatever their strides."""
    tensors = listed.tensors
    if listed.numbers is not None:
        form = 2 + DTYPE_CODES[next(iter(listed.dtypes))] if len(listed.dtypes) == 1 else 0
        return Table(listed.numbers, numels, form, None)
    if (
        not listed.plain
        or not DTYPE_CODES.keys() >= listed.dtypes
        or (1 in numels and any(map(Tensor.is_neg, tensors)))
    ):
        return strided_table(tensors)
    try:
        rows = [*map(Tensor.data_ptr, tensors), *numels]
    except RuntimeError:  # a layout that counts as contiguous and has no address
        name_what_is_wrong(tensors, "tensors")
        raise
    if len(listed.dtypes) == 1:
        return Table(_packed(rows), numels, 2 + DTYPE_CODES[tensors[0].dtype], None)
    return Table(_packed(rows + [DTYPE_CODES[d] for d in map(_dtype, tensors)]), numels, 0, None)


def strided_table(tensors: list[Tensor], any_order: bool = False) -> Table:
    """The table of any floating CPU tensors; copies those that have no useful runs.

    With ``any_order`` the order of elements within a tensor does not matter.
    """
    kept, columns, strides = [], [], []
    for tensor in tensors:
        tensor = readable(tensor, DTYPE_CODES)
        if any_order and tensor.numel() and dense_strides(tensor) is not None:
            found = (tensor.numel(), 0)
        else:
            found = runs(tensor)
        if found is None:
            tensor = tensor.contiguous()
            found = (tensor.numel(), 0)
        kept.append(tensor)
        columns.append(found[0])
        strides.append(found[1])
    numels = [t.numel() for t in kept]
    rows = [t.data_ptr() for t in kept] + numels + [DTYPE_CODES[t.dtype] for t in kept] + columns + strides
    return Table(_packed(rows), numels, 1, kept)


def require_cpu(tensors: list[Tensor], name: str) -> None:
    """Raises ValueError when the list (already checked to lie on one device) is elsewhere."""
    if tensors and tensors[0].device.type != "cpu":
        raise ValueError(f"{name} are on {tensors[0].device}: this backend takes CPU tensors")

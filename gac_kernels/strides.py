"""How a tensor lies in memory: what may be read as one stretch, and what may not be written."""

from __future__ import annotations

from torch import Tensor

SHORTEST_RUN = 32
"""Rows shorter than this are copied: the loops over them would cost more than the copy."""


def _by_stride(tensor: Tensor) -> list[tuple[int, int]]:
    """``(stride, size)`` of the dimensions that have more than one element, innermost first."""
    return sorted((s, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n != 1)


def overlaps_itself(tensor: Tensor) -> bool:
    """True when two indices may address the same element (an expanded tensor, say)."""
    if tensor.numel() <= 1 or tensor.is_contiguous():
        return False
    reach = 0
    for stride, size in _by_stride(tensor):
        if stride <= reach:
            return True
        reach += stride * (size - 1)
    return False


def dense_strides(tensor: Tensor) -> tuple[int, ...] | None:
    """The strides (0 for dimensions of one element) of a tensor that fills a stretch of memory; None of any other.

    Tensors with equal results hold their elements in the same order of dimensions.
    """
    expected = 1
    for stride, size in _by_stride(tensor):
        if stride != expected:
            return None
        expected *= size
    return tuple(s if n != 1 else 0 for s, n in zip(tensor.stride(), tensor.shape, strict=True))


def flat_views(*tensors: Tensor) -> tuple[Tensor, ...] | None:
    """Tensors of one shape as 1-D views in memory order; None where they do not lie alike and without holes."""
    strides = dense_strides(tensors[0])
    if strides is None or any(dense_strides(t) != strides for t in tensors[1:]):
        return None
    return tuple(t.as_strided((t.numel(),), (1,)) for t in tensors)


def runs(tensor: Tensor) -> tuple[int, int] | None:
    """Contiguous runs of a tensor in row-major order: their length and the distance of their starts, in elements.

    None when the elements do not lie in equally spaced runs of a useful length.
    """
    if tensor.is_contiguous():
        return tensor.numel(), 0
    columns = 1
    rest: list[int] = []
    for size, stride in zip(reversed(tensor.shape), reversed(tensor.stride()), strict=True):
        if size == 1:
            continue
        if not rest and stride == columns:
            columns *= size
        elif rest and stride != rest[0] * rest[1]:
            return None
        else:
            rest = [rest[0], rest[1] * size] if rest else [stride, size]
    if columns < SHORTEST_RUN or (rest and rest[0] < 0):
        return None
    return columns, rest[0] if rest else 0

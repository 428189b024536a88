"""The least that a correct call on small tensors needs: plain tensors told by one number."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gac_kernels.cpu.tables import DTYPE_CODES, PAIRED_CODES, PLAIN

QUICK = 49_152
"""Elements up to which a call runs on the caller's thread, with the interpreter lock held: a second thread would save
less than waking it takes (1 to 3 us where it waits actively)."""


def pack(tensor: Tensor) -> int:
    """``numel << 16 | dtype code`` of one contiguous CPU tensor of a plain type; 0 sends anything else the careful way.

    So goes a tensor of one element: a lazily negated view of that size counts as contiguous.
    """
    try:
        if type(tensor) in PLAIN and tensor.is_contiguous() and tensor.is_cpu:
            numel = tensor.numel()
            if numel > 1:
                return numel << 16 | DTYPE_CODES[tensor.dtype]
    except (KeyError, RuntimeError):  # an unusual dtype; sparse layouts cannot be contiguous
        pass
    return 0


def single(tensors: list) -> Any:
    """The only tensor of a list of one, else the list."""
    return tensors[0] if len(tensors) == 1 else tensors


def pack_pair(a: Any, b: Any) -> int:
    """The same of two tensors that agree in it and in shape."""
    try:
        if type(a) in PLAIN and type(b) in PLAIN and a.is_contiguous() and b.is_contiguous() and a.is_cpu and b.is_cpu:
            dtype, numel = a.dtype, a.numel()
            alike = a.dim() == 1 == b.dim() or a.shape == b.shape  # comparing shapes costs more
            if numel > 1 and b.dtype is dtype and b.numel() == numel and alike:
                return numel << 16 | PAIRED_CODES[dtype]
    except (KeyError, RuntimeError):
        pass
    return 0


QUICK_PACKED = (QUICK + 1) << 16  # packed numbers below stand for quick sizes
ONE_THREAD = 1 << 4


def with_threads(packed: int) -> int:
    """``packed`` with the number of threads that torch has."""
    return packed | torch.get_num_threads() << 4

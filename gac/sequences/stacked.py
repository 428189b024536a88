"""Sketches of weights that lie on one another, one for each expert: ``[E p, q]``; a token sees ``p`` rows of them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gac.sequences.layers import Slot
from gac_kernels import kronecker_sketch
from gac_kernels.arguments import accumulator_dtype
from gac_kernels.kronecker import signs_of


class Stacked:
    """Both sides of every pair of token and expert under the signs of a slot, ``[S, P]`` and ``[S, Q]``.

    A pair's gradient lies in the rows of its expert, so that it meets the signs of these alone, and those of different
    experts differ: inner products are without bias, as of any matrix.

    Args:
        slot: of the stacked weight. keys: ``[4]``, of its signs.
        experts: how many. pairs: ``S``.
        ones: whether inputs have a further column of ones, for the bias.
        dtype: of what comes; float64 stays, where the device has it.
    """

    def __init__(self, slot: Slot, keys: Tensor, *, experts: int, pairs: int, ones: bool, dtype: torch.dtype) -> None:
        tall, wide = slot.shape
        device = keys.device
        found = torch.float64 if dtype is torch.float64 else torch.float32
        self._dtype = torch.float32 if accumulator_dtype(device) is torch.float32 else found
        self._slot, self._keys, self._ones = slot, keys, ones
        self._left_signs = self._map(slot.dims[0], tall, keys[:2]).view(experts, -1, tall)
        self._right_signs = self._map(slot.dims[1], wide, keys[2:])
        self._left = torch.zeros(pairs, tall, dtype=self._dtype, device=device)
        self._right = torch.zeros(pairs, wide, dtype=self._dtype, device=device)

    def _map(self, rows: int, columns: int, keys: Tensor) -> Tensor:
        """``[rows, columns]``: a side's map, without its root."""
        if rows == columns:
            return torch.eye(rows, dtype=self._dtype, device=keys.device)
        places = torch.arange(rows, device=keys.device)
        return signs_of(places, columns, keys[0], keys[1], self._dtype)

    def project(self, inputs: Tensor) -> Tensor:
        """``[n, Q]``: inputs ``[n, q]`` under the signs, the bias's column included."""
        found = inputs.to(self._dtype) @ self._right_signs[: inputs.shape[1]]
        return found + self._right_signs[-1] if self._ones else found

    def put(self, expert: int, pairs: Tensor, gradient: Tensor, projected: Tensor) -> None:
        """Some pairs of one expert.

        Args:
            pairs: ``[n]`` int64, their places. gradient: ``[n, p]``. projected: ``[n, Q]``, of their inputs.
        """
        self._left[pairs] = gradient.to(self._dtype) @ self._left_signs[expert]
        self._right[pairs] = projected

    def add_to(self, out: Tensor, *, bounds: Tensor, longest: int, scale: float) -> None:
        """Adds each sequence's sketch to ``out`` ``[B, P, Q]``; ``bounds`` and ``longest`` are of its pairs."""
        for own, whole in zip(self._slot.shape, self._slot.dims, strict=True):
            scale /= 1.0 if own == whole else math.sqrt(own)
        kronecker_sketch(self._left, self._right, out, bounds=bounds, keys=self._keys, longest=longest, scale=scale)

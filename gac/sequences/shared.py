"""Inputs that several layers share (q, k, v; gate, up) are projected once, where torch's products make the sketch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from gac.sequences.layers import Kind, Layer, Slot
from gac_kernels.arguments import accumulator_dtype
from gac_kernels.kronecker import signs_of


def share_signs(layers: Sequence[Layer]) -> None:
    """Gives linear layers of one module whose inputs are of one size the same signs on that side.

    Each layer's signs for its outputs stay its own, so that inner products are without bias as before. Where inputs are
    of one size and differ, nothing is shared but signs.
    """
    embeddings = {id(layer.weight) for layer in layers if layer.kind is Kind.EMBEDDING}
    first: dict[tuple[str, int, int], Slot] = {}
    for layer in layers:
        slot = layer.weight
        if layer.kind is not Kind.LINEAR or slot is None or id(slot) in embeddings or slot.shape[1] == slot.dims[1]:
            continue
        parent = layer.name.rpartition(".")[0]
        other = first.setdefault((parent, slot.dims[1], slot.shape[1]), slot)
        if other is not slot:
            slot.inputs, slot.shares, other.shares = other.inputs, True, True


class Projections:
    """The last input's projection, as long as the input is there: layers that share one come one after the other.

    Nothing of the input is kept but where it lies.
    """

    def __init__(self) -> None:
        self._storage: StorageWeakRef | None = None
        self._known: tuple | None = None
        self._projected = torch.empty(0)

    def of(self, x: Tensor, slot: Slot, keys: Tensor, *, ones: bool, wide: torch.dtype) -> Tensor:
        """``[N, Q]``: an input under the signs of a slot, scaled.

        Args:
            x: ``[N, q]`` (``q - 1`` with ``ones``: a further column of ones). keys: ``[4]``, of the slot.
            wide: dtype to project in, on devices that have it.
        """
        wide = torch.float32 if accumulator_dtype(x.device) is torch.float32 else wide
        known = (x.data_ptr(), x.shape, x.stride(), x.dtype, x._version, slot.inputs, wide)
        if self._storage is not None and not self._storage.expired() and known == self._known:
            return self._projected
        size = slot.shape[1]
        signs = signs_of(torch.arange(slot.dims[1], device=x.device), size, keys[2], keys[3], wide)
        found = x.to(wide) @ signs[: x.shape[1]]
        if ones:
            found += signs[-1]
        self._projected, self._known = found.div_(math.sqrt(size)), known
        self._storage = StorageWeakRef(x.untyped_storage())
        return self._projected

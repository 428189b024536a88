"""The sketch of sequences' gradients among the timed cases: linear layers' activations, peers, and the gate."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

import gac_kernels
from gac.bench.gates import UNIT, Gate
from gac.plan.shapes import LlamaShape
from gac_kernels.kronecker import sign_keys, signs_of

SKETCH = 32
"""Rows and columns of a sketch: the default of ``estimator="sequence"``."""

TOKENS = {"cuda": 8192, "cpu": 512}
"""Of a model's case. One block of 1B has 0.72 GB of activations in bf16 at 8,192."""

GRADIENTS = "eager: per-sample gradients by vmap"

_SEQUENCE = 1024
_WIDEST = 2048
_SPLIT = 2.0**-20
"""Of TF32 products in three parts, relative."""


def sides_of(model: LlamaShape) -> list[tuple[int, int]]:
    """Outputs and inputs of the linear layers of one block."""
    return [(shape[0], shape[1]) for shape in model.layer() if len(shape) == 2]


def activations(model: LlamaShape | None, elements: int, tokens: int) -> list[tuple[int, int]]:
    """Shapes of the activations of a case: of each layer the output gradient, then the input.

    Args:
        model: whose block; None: one square layer of at most 2,048 inputs with so many ``elements`` in all.
        tokens: of a model's case.
    """
    if model is not None:
        return [(tokens, side) for sides in sides_of(model) for side in sides]
    width = min(_WIDEST, 1 << int(math.log2(math.sqrt(elements / 2))))
    return [(elements // (2 * width), width)] * 2


class Layer(NamedTuple):
    """One call.

    Attributes:
        left: ``[N, p]``. right: ``[N, q]``. out: ``[B, P, Q]`` float32. bounds: ``[B + 1]``. keys: ``[4]``.
        longest: tokens of each sequence.
    """

    left: Tensor
    right: Tensor
    out: Tensor
    bounds: Tensor
    keys: Tensor
    longest: int

    @classmethod
    def of(cls, left: Tensor, right: Tensor) -> Layer:
        """Of two sides: sequences of at most 1,024 tokens, four of them where there are fewer."""
        device, tokens = left.device, len(left)
        longest = min(_SEQUENCE, max(1, tokens // 4))
        rows = tokens // longest
        shape = (rows, min(SKETCH, left.shape[1]), min(SKETCH, right.shape[1]))
        bounds = torch.arange(rows + 1, device=device) * longest
        return cls(
            left, right, torch.zeros(shape, device=device), bounds, torch.tensor(sign_keys(1), device=device), longest
        )

    def sketch(self, function: Callable) -> object:
        """The call; ``function`` is called like :func:`gac_kernels.kronecker_sketch`."""
        return function(self.left, self.right, self.out, bounds=self.bounds, keys=self.keys, longest=self.longest)

    def signs(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """``[p, P]`` and ``[q, Q]``: both maps, the identity where a side is no larger than its sketch."""
        found = []
        for side, columns, place in ((self.left, self.out.shape[1], 0), (self.right, self.out.shape[2], 2)):
            index = torch.arange(side.shape[1], device=side.device)
            if columns == side.shape[1]:
                found.append(torch.eye(columns, dtype=dtype, device=side.device))
            else:
                signs = signs_of(index, columns, self.keys[place], self.keys[place + 1], dtype)
                found.append(signs / math.sqrt(columns))
        return found[0], found[1]

    def rows(self, side: Tensor) -> Tensor:
        """``[B, T, d]``: the tokens of each sequence."""
        return side[: len(self.out) * self.longest].view(len(self.out), self.longest, -1)


def layers(tensors: Sequence[Tensor]) -> list[Layer]:
    """Of activations as :func:`activations` has them."""
    return [Layer.of(left, right) for left, right in zip(tensors[::2], tensors[1::2], strict=True)]


def check(function: Callable, of: Sequence[Layer]) -> Gate:
    """Compares the first and the last sequence of each layer with float64, number by number.

    Rounding errors that add up as independent ones do stay below ``sqrt(depth)`` units of the root of ``sum_t |a_t|^2
    |b_t|^2``, ``a`` and ``b`` the projections (Higham and Mary 2019); the bound has ``depth`` itself.
    """
    errors, bounds = [], []
    for layer in of:
        layer.out.zero_()
        layer.sketch(function)
        left, right = layer.signs(torch.float64)
        depth = layer.left.shape[1] + layer.right.shape[1] + layer.longest
        for row in {0, len(layer.out) - 1}:
            a = layer.rows(layer.left)[row].double() @ left
            b = layer.rows(layer.right)[row].double() @ right
            size = (a.square().sum(1) * b.square().sum(1)).sum().sqrt()
            errors.append((layer.out[row].double() - a.T @ b).abs())
            bounds.append(2 * (depth * UNIT + _SPLIT) * size.expand_as(errors[-1]))
    return Gate.of(errors, bounds, "the first and the last sequence of each layer")


def by_matmul(layer: Layer, left: Tensor, right: Tensor) -> Tensor:
    """A dense projection with signs that are kept (``[p, P]``, ``[q, Q]``), then one product a sequence."""
    a, b = layer.left @ left, layer.right @ right
    return layer.out.add_(torch.bmm(layer.rows(a).transpose(1, 2), layer.rows(b)))


def by_einsum(layer: Layer, left: Tensor, right: Tensor) -> Tensor:
    """The same by three einsums."""
    a = torch.einsum("btp, pk -> btk", layer.rows(layer.left), left)
    b = torch.einsum("btq, ql -> btl", layer.rows(layer.right), right)
    return layer.out.add_(torch.einsum("btk, btl -> bkl", a, b))


def by_gradients(layer: Layer, left: Tensor, right: Tensor, weight: Tensor) -> Tensor:
    """Per-sample gradients of the layer's ``weight`` ``[p, q]``, which are then projected."""

    def loss(weight: Tensor, x: Tensor, gradient: Tensor) -> Tensor:
        return (torch.nn.functional.linear(x, weight) * gradient).sum()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))
    gradients = each(weight, layer.rows(layer.right), layer.rows(layer.left))
    return layer.out.add_(left.T @ gradients @ right)


def peers_of(sets: Sequence[Sequence[Layer]], compiled: Callable) -> dict[str, Callable[[int], object]]:
    """What a user would write, by name; signs are made beforehand.

    Args:
        sets: for each input set its layers. compiled: what :func:`by_matmul` is under ``torch.compile``.
    """
    signs = [layer.signs(layer.left.dtype) for layer in sets[0]]
    weights = [
        torch.zeros(x.left.shape[1], x.right.shape[1], dtype=x.left.dtype, device=x.left.device) for x in sets[0]
    ]

    def each(function: Callable) -> Callable[[int], object]:
        return lambda k: [function(layer, *own) for layer, own in zip(sets[k], signs, strict=True)]

    def gradients(k: int) -> object:
        return [by_gradients(x, *own, w) for x, own, w in zip(sets[k], signs, weights, strict=True)]

    return {
        "eager: matmul, signs kept": each(by_matmul),
        "eager: einsum, signs kept": each(by_einsum),
        GRADIENTS: gradients,
        "compile: matmul, signs kept": each(compiled),
    }


def ours(of: Sequence[Layer]) -> object:
    """The operation on each layer."""
    return [layer.sketch(gac_kernels.kronecker_sketch) for layer in of]

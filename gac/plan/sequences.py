"""What ``estimator="sequence"`` costs: its sketches and what its kernels read, from the shapes of a model's parameters.

Parameters of two dimensions are taken for linear layers, the first for an embedding, which is the head too unless the
last parameter is another one of its height; those of one dimension for norms.
"""

from __future__ import annotations

from dataclasses import dataclass

from gac.plan.parameters import Parameters
from gac.plan.traffic import LAUNCH_SECONDS, OPERATION_SECONDS

TAKE_SECONDS = 30e-6
"""Host time of one layer without its kernels: 56 us of a linear layer on a machine twice as slow as that of
``HOOK_SECONDS``; measured."""

MESSAGE_NUMBERS = 8
"""Numbers in the message beside both branches' sums of sketches."""

LAYER_LAUNCHES = 2
"""Kernels of one linear layer or embedding."""

NORM_OPERATIONS = 7
"""Tensor operations of one norm: to float32, square, mean, root, two products, a sum over tokens."""

NORM_BYTES = 36
"""What these move for each element of the activation, in 16 bits or in 32."""

TOKENS_OF_A_PROGRAM = 64


@dataclass(frozen=True)
class Sequences:
    """What one backward pass and the sums take.

    Attributes:
        width: numbers of a sequence's sketch. matrices: how many have one.
        read: bytes of inputs and output gradients, each read once by the layer that has it.
        moved: with sketches, partial sums and what norms take besides.
        operations: of the projections and products. calls: of the kernel. launches: kernels started.
        host_seconds: in hooks, calls and launches.
    """

    width: int
    matrices: int
    read: int
    moved: int
    operations: int
    calls: int
    launches: int
    host_seconds: float


def sequences_of(parameters: Parameters, *, size: int, rows: int, tokens: int, itemsize: int) -> Sequences:
    """The costs of one backward pass over ``rows`` sequences.

    Args:
        size: rows and columns of a sketch. tokens: of all sequences together. itemsize: bytes of an activation.
    """
    shapes = [(rows_, numel // rows_) for numel, rows_ in zip(parameters.numels, parameters.rows, strict=True)]
    matrices = [shape for shape in shapes if shape[1] > 1]
    vectors = [shape[0] for shape in shapes if shape[1] == 1]
    layers = matrices[1:]
    if matrices and (len(matrices) == 1 or matrices[-1][0] != matrices[0][0]):
        layers = [*layers, matrices[0]]  # the tied head
    width = sum(min(size, p) * min(size, q) for p, q in matrices) + sum(min(size * size, d) for d in vectors)
    embedded = matrices[0][1] if matrices else 0
    read = itemsize * tokens * (sum(p + q for p, q in layers) + embedded) + 8 * tokens * bool(matrices)
    calls = len(layers) + bool(matrices)
    partials = 2 * 4 * size * size * (tokens // TOKENS_OF_A_PROGRAM + rows)
    moved = read + calls * (partials + 2 * 4 * rows * size * size) + NORM_BYTES * tokens * sum(vectors)
    operations = 2 * tokens * (sum(size * (p + q) + size * size for p, q in layers) + size * (embedded + size))
    launches = LAYER_LAUNCHES * calls + NORM_OPERATIONS * len(vectors)
    host = TAKE_SECONDS * (calls + len(vectors)) + LAUNCH_SECONDS * LAYER_LAUNCHES * calls
    host += NORM_OPERATIONS * OPERATION_SECONDS * len(vectors)
    return Sequences(
        width=width,
        matrices=len(matrices),
        read=read,
        moved=moved,
        operations=operations,
        calls=calls,
        launches=launches,
        host_seconds=host,
    )


def buckets_of(size: int, matrices: int) -> int:
    """Buckets of a plain sketch that are as sure as this one: ``k L / 2``.

    The square of a matrix of rank one has the relative variance ``(1 + 2/k)^2 - 1``, about ``4/k``, under signs on both
    sides; larger ranks have less. ``L`` matrices of equal weight divide it, and ``b`` buckets have ``2/b``.
    """
    return max(1, size * matrices // 2)

"""The public operation on sums of outer products; the others are in :mod:`gac_kernels.ops`, which says how calls go."""

from __future__ import annotations

import torch
from torch import Tensor

from gac_kernels.backends import runner
from gac_kernels.kronecker import kronecker_call

__all__ = ["kronecker_sketch"]


def kronecker_sketch(
    left: Tensor,
    right: Tensor,
    out: Tensor,
    *,
    bounds: Tensor,
    keys: Tensor,
    size: int | None = None,
    longest: int | None = None,
    ones: bool = False,
    scale: float = 1.0,
) -> Tensor:
    """Adds to ``out`` the sketch of each sequence's sum of outer products, ``G_i = sum_t l_t r_t^T``.

    With ``left`` the gradient of a linear layer's output and ``right`` its input, ``G_i`` is sequence ``i``'s gradient
    of the layer's weight, and ``out[i] += scale * A^T G_i B`` with random signs ``A``, ``B`` that are made in the
    kernel: ``E <out[i], out[j]> = scale^2 <G_i, G_j>``. :mod:`gac_kernels.kronecker` has the map.

    Args:
        left: ``[N, p]``, any floating dtype and strides; or ``[N]`` int64, where row ``t`` is all zeros but for a one
            at place ``left[t]`` (all zeros where it is negative), as the input of an embedding.
        right: ``[N, q]``, any floating dtype and strides.
        out: ``[B, P, Q]`` float32, contiguous but for the first stride; ``P <= min(64, p)``, ``Q <= min(64, q)``. A
            side with ``P = p`` (``Q = q``) is taken as it is.
        bounds: ``[B + 1]`` int64, contiguous, not decreasing, from 0 to ``N`` at most: sequence ``i`` has the tokens
            ``bounds[i] .. bounds[i + 1]``. No other token is read. All tensors are on one device.
        keys: ``[4]`` int64, contiguous: :func:`gac_kernels.kronecker.sign_keys` of a seed.
        size: ``p``, where ``left`` is int64.
        longest: no sequence has more tokens; by default ``N``. A lower bound spares empty programs on GPUs.
        ones: ``right`` counts as if it had a further column of ones (``q`` is one more): the column of a bias.
        scale: a number.

    Returns:
        ``out``. Products are added in float32 (float64 where a side is float64).

    Raises:
        TypeError, ValueError: with the argument's name, what it was and what is needed.
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
        torch.ops.gac_kernels.kronecker_sketch_(left, right, out, bounds, keys, size, longest, ones, scale)
        return out
    call = kronecker_call(
        left, right, out, bounds=bounds, keys=keys, size=size, longest=longest, ones=ones, scale=scale
    )
    return runner("kronecker_sketch", out.device.type)(call)

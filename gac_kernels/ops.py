"""The public operations: their signatures, and the way to the backend that serves.

Eager calls are checked (:mod:`gac_kernels.calls`) and go straight to the backend (:mod:`gac_kernels.backends`). Under
``torch.compile``, and while a dispatch mode such as ``FakeTensorMode`` is active, they go through the operators
``torch.ops.gac_kernels.*`` that :mod:`gac_kernels.library` registers. :mod:`gac_kernels.reference` has the formulas.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gac_kernels import library
from gac_kernels.backends import implementation, runner
from gac_kernels.backends import status as backend_status
from gac_kernels.calls import token_call
from gac_kernels.elements import unscaled
from gac_kernels.layout import SketchLayout
from gac_kernels.totals import absorb_call, accumulate_call

__all__ = [
    "absorb_",
    "absorb_sketch_",
    "accumulate_",
    "backend_status",
    "mix_",
    "moments",
    "pair_moments",
    "sketch",
    "token_moments",
]


@functools.cache
def _cpu_mix() -> Callable:
    """``implementation`` for the call that has a peer of one microsecond: without arguments it costs half."""
    return implementation("mix_", "cpu")


_is_compiling = torch.compiler.is_compiling
_active_modes = torch._C._len_torch_dispatch_stack


def traced() -> bool:
    """True when a call must be visible to the dispatcher: while compiling, or under a dispatch mode."""
    return _is_compiling() or _active_modes() > 0


def _device_type(tensors: Any) -> str:
    first = tensors[0] if isinstance(tensors, list) and tensors else tensors
    if not isinstance(first, Tensor) or first.is_cpu:
        return "cpu"
    return first.device.type


def moments(tensors: Any, *, per_tensor: bool = False, block_scales: Any = None) -> Tensor:
    """Sum of squares and number of non-finite elements.

    Args:
        tensors: a tensor or a list of tensors on one device; any shape, floating dtype and strides.
        per_tensor: one row for each tensor instead of the total.
        block_scales: scales of the MX formats for the tensors that have them, a list with None for the others: of an
            e4m3fn or e5m2 tensor of shape ``[..., n]``, ``n`` a multiple of 32 where there are more dimensions than
            one, a tensor ``[..., ceil(n / 32)]`` of float8_e8m0fnu, or uint8 exponents. Element ``x`` then counts as
            ``x * 2**(e - 127)`` with the ``e`` of its 32; an ``e`` of 255 makes them NaN. None: elements count as they
            are.

    Returns:
        ``[2]`` (``[n, 2]`` with ``per_tensor``): sum of squares, count of NaN and infinite elements; float64
        (float32 where the device has no float64). An empty list gives zeros. A non-finite element makes the sum
        of squares non-finite too.

    Raises:
        TypeError: an element is no floating-point tensor, or scales are of another dtype, or of a tensor that has none.
        ValueError: tensors are on several devices, scales do not fit.
    """
    if block_scales is not None:
        if not traced():
            tensors = library.readable(tensors)
            backend = implementation("moments", _device_type(tensors))
            return backend(tensors, per_tensor=per_tensor, block_scales=block_scales)
        tensors = unscaled(tensors, block_scales)
    if traced():
        return torch.ops.gac_kernels.moments(library.listed(tensors), per_tensor)
    if type(tensors) is Tensor and tensors.is_cpu:
        return implementation("moments", "cpu")(tensors, per_tensor=per_tensor)
    tensors = library.readable(tensors)
    return implementation("moments", _device_type(tensors))(tensors, per_tensor=per_tensor)


def sketch(
    tensors: Any,
    out: Tensor,
    *,
    layout: SketchLayout | None = None,
    regions: Any = None,
    starts: Any = None,
    seed: int = 0,
    scale: Tensor | float | None = None,
    accumulate: bool = False,
    per_tensor: bool = False,
    into: Tensor | None = None,
    second_moments: Any = None,
    eps: float = 1e-8,
    block_scales: Any = None,
) -> Tensor:
    """A random projection of the tensors into ``out``, and their moments from the same read.

    ``out`` receives ``scale * S x``: a fixed linear map with ``E <Sa, Sb> = <a, b>`` over seeds, described in
    :mod:`gac_kernels.layout` (a count sketch, Charikar, Chen and Farach-Colton 2002, whose buckets are structured
    so that neighbouring elements never collide).

    Args:
        tensors: a tensor or a list of tensors on ``out``'s device; any shape, floating dtype and strides.
        out: ``[layout.size]``, contiguous, float32 or float64.
        layout: where elements go. None: the list is one long vector and gets a map that fits ``out``.
        regions: the region of each tensor (default: tensor ``k`` belongs to region ``k``). Only with ``layout``.
        starts: the position of each tensor's first element within its region (default 0). Only with ``layout``.
        seed: selects the signs when ``layout`` is None.
        scale: multiplies what is written (a number, or a 0-dim tensor that is read on the device); default 1.
        accumulate: add to ``out``. Otherwise all buckets of the regions named are overwritten; others stay.
        per_tensor: moments as one row for each tensor.
        into: what to add the moments to, of their shape, dtype and device, contiguous; None for a new tensor.
        second_moments: a tensor for each of ``tensors``, with as many elements in the same order; any floating dtype
            and strides. Each element ``x`` then counts as ``x / (sqrt(v) + eps)``, in the sketch and in the moments:
            with Adam's second moments (bias-corrected or not, as they are given) that is the space of its update
            (Kingma and Ba 2015). Where ``v`` is 0 a finite ``x`` counts as 0: Adam has met no gradient of that
            element yet, so its scale is unknown. A negative ``v`` gives NaN. None: elements count as they are.
        eps: Adam's epsilon; 0, or 2**-126 to 2**127. Only with ``second_moments``.
        block_scales: as for :func:`moments`, of tensors whose ``starts`` are multiples of 32; not with
            ``second_moments``. Scaled elements beyond float32 are infinite in a float32 bucket, but are not counted.

    Returns:
        Moments of the (weighted) tensors before ``scale``, as :func:`moments` gives them; ``into`` itself where it is
        given.

    Raises:
        TypeError, ValueError: with the argument's name, what it was and what is needed.
    """
    if traced():
        tensors = tensors if block_scales is None else unscaled(tensors, block_scales)
        place = library.place_arguments(layout, regions, starts, seed)
        second_moments = None if second_moments is None else library.listed(second_moments)
        rest = (*place, *library.scalar_parts(scale), accumulate, per_tensor, second_moments, eps)
        if into is None:
            return torch.ops.gac_kernels.sketch(library.listed(tensors), out, *rest)
        torch.ops.gac_kernels.sketch_into_(library.listed(tensors), out, into, *rest)
        return into
    return implementation("sketch", _device_type(out)).direct(
        tensors,
        out,
        layout=layout,
        regions=regions,
        starts=starts,
        seed=seed,
        scale=scale,
        accumulate=accumulate,
        per_tensor=per_tensor,
        into=into,
        second_moments=second_moments,
        eps=eps,
        block_scales=block_scales,
    )


def accumulate_(
    tensors: Any,
    total: Tensor,
    *,
    layout: SketchLayout | None = None,
    regions: Any = None,
    starts: Any = None,
    previous: Tensor | None = None,
    scale: Tensor | float | None = None,
    per_tensor: bool = False,
    into: Tensor | None = None,
    second_moments: Any = None,
    eps: float = 1e-8,
    block_scales: Any = None,
) -> Tensor:
    """Adds the tensors to one vector, ``total += scale * x``, and takes their moments from the same read.

    What :func:`sketch` with ``accumulate`` does in a layout that gives each element a bucket of its own, without signs.

    Args:
        tensors: a tensor or a list of tensors on ``total``'s device; any shape, floating dtype and strides. None may
            share memory with ``total`` or ``previous``.
        total: ``[layout.size]`` float32, contiguous.
        layout: where elements go: one with ``rows_per_slab`` 1 (:meth:`SketchLayout.per_tensor` without a size). None:
            the tensors lie end to end, and ``total`` has as many elements as they.
        regions: the region of each tensor (default: tensor ``k`` belongs to region ``k``). Only with ``layout``.
        starts: the position of each tensor's first element within its region (default 0). Only with ``layout``. No two
            tensors may share elements.
        previous: ``[layout.size]`` float32, contiguous: ``x - previous`` is added in place of ``x``, and ``previous``
            becomes ``x``, rounded to float32 before either. So the tensors may be running sums.
        scale: multiplies what is added (a number, or a 0-dim tensor that is read on the device); default 1.
        per_tensor: moments as one row for each tensor.
        into: what to add the moments to, of their shape, dtype and device, contiguous; None for a new tensor.
        second_moments, eps: as for :func:`sketch`: each element ``x`` counts as ``x / (sqrt(v) + eps)``.
        block_scales: as for :func:`sketch`, with any ``starts``.

    Returns:
        ``[2]`` (``[n, 2]`` with ``per_tensor``): sum of squares of what was added, before ``scale``, and number of
        non-finite elements among the (weighted) ``x``; float64 (float32 where the device has no float64). ``into``
        itself where it is given.

    Raises:
        TypeError, ValueError: with the argument's name, what it was and what is needed.
    """
    if traced():
        tensors = tensors if block_scales is None else unscaled(tensors, block_scales)
        place = library.place_arguments(layout, regions, starts, 0)
        second_moments = None if second_moments is None else library.listed(second_moments)
        rest = (*place, *library.scalar_parts(scale), per_tensor, second_moments, eps)
        if into is None:
            return torch.ops.gac_kernels.accumulate_(library.listed(tensors), total, previous, *rest)
        torch.ops.gac_kernels.accumulate_into_(library.listed(tensors), total, previous, into, *rest)
        return into
    call = accumulate_call(
        tensors,
        total,
        layout=layout,
        regions=regions,
        starts=starts,
        previous=previous,
        scale=scale,
        per_tensor=per_tensor,
        into=into,
        second_moments=second_moments,
        eps=eps,
        block_scales=block_scales,
    )
    return runner("accumulate_", "cpu" if total.is_cpu else total.device.type)(call)


def pair_moments(a: Any, b: Any, *, per_tensor: bool = False) -> Tensor:
    """``|a|^2``, ``|b|^2`` and ``<a, b>`` of two lists of equal shapes.

    Args:
        a, b: tensors or lists of tensors on one device, pairwise of equal shape; any floating dtypes and strides.
        per_tensor: one row for each pair instead of the total.

    Returns:
        ``[3]`` (``[n, 3]`` with ``per_tensor``), float64 (float32 where the device has no float64).

    Raises:
        TypeError, ValueError: lists of different lengths, shapes or devices, or not floating point.
    """
    if traced():
        return torch.ops.gac_kernels.pair_moments(library.listed(a), library.listed(b), per_tensor)
    if type(a) is Tensor and a.is_cpu and type(b) is Tensor:
        return implementation("pair_moments", "cpu")(a, b, per_tensor=per_tensor)
    a, b = library.readable(a), library.readable(b)
    return implementation("pair_moments", _device_type(a))(a, b, per_tensor=per_tensor)


def mix_(a: Any, b: Any, mu: Tensor | float, *, moments: bool = False) -> Tensor | None:
    """``a <- mu * a + (1 - mu) * b`` in place, rounded once to ``a``'s dtype.

    Args:
        a, b: as for :func:`pair_moments`; no tensor of ``a`` may overlap itself in memory.
        mu: weight of ``a``: a number, or a 0-dim tensor that is read on the device.
        moments: also return the pair moments of the values before the update, from the same read.

    Returns:
        None, or the ``[3]`` tensor of :func:`pair_moments`.
    """
    if _is_compiling() or _active_modes():  # `traced`, less a call
        operator = torch.ops.gac_kernels.mix_moments_ if moments else torch.ops.gac_kernels.mix_
        return operator(library.listed(a), library.listed(b), *library.scalar_parts(mu))
    if type(a) is Tensor and a.is_cpu and type(b) is Tensor:
        return _cpu_mix()(a, b, mu, moments=moments)
    a, b = library.readable(a), library.readable(b)
    return implementation("mix_", _device_type(a))(a, b, mu, moments=moments)


def token_moments(logprobs: Tensor, advantages: Tensor, mask: Tensor, is_expert: Tensor) -> Tensor:
    """Per-sequence sums from which every coefficient estimator follows (see :mod:`gac.statistics`).

    With ``m`` the mask, ``phi = p * (1 - p)`` for ``p = exp(logprob)``, and ``A`` the advantage, set to 0 on
    demonstrations, the columns are ::

        sum m, sum m*logprob, sum m*A, sum m*A^2, sum m*phi, sum m*phi^2, sum m*phi*A

    Args:
        logprobs: ``[B, T]`` log-probabilities of the taken tokens, any floating dtype.
        advantages: ``[B, T]`` or ``[B]``, any floating dtype.
        mask: ``[B, T]``, bool or number; tokens that count. Values under a zero mask are never used.
        is_expert: ``[B]`` bool; True marks a demonstration.

    Returns:
        ``[B, 7]`` float64 (float32 where the device has no float64).

    Raises:
        TypeError, ValueError: with the argument's name, its shape and the shape needed.
    """
    if traced():
        return torch.ops.gac_kernels.token_moments(logprobs, advantages, mask, is_expert)
    call = token_call(logprobs, advantages, mask, is_expert)
    return runner("token_moments", logprobs.device.type)(call)


def absorb_(
    current: Tensor,
    previous: Tensor | None,
    total: Tensor,
    scale: Tensor | float,
    *,
    into: Tensor | None = None,
) -> Tensor:
    """Takes the newest contribution out of a running sketch: one pass over three vectors.

    With ``delta = scale * (current - previous)``: ``total += delta``, then ``previous <- current``.

    Args:
        current: ``[m]`` float32, contiguous: the sketch of the running sum.
        previous: ``[m]`` float32, contiguous, what ``current`` was at the last call; None stands for zeros and
            nothing is written to it.
        total: ``[m]`` float32, contiguous. The three must not overlap.
        scale: a number, or a 0-dim tensor that is read on the device.
        into: what to add the sums to, of their shape, dtype and device, contiguous; None for a new tensor.

    Returns:
        ``[ceil(m / 1024)]``: the sum of squares of ``delta`` over each 1024 consecutive elements (the last may be
        shorter); float64 (float32 where the device has no float64). ``into`` itself where it is given.

    Raises:
        TypeError, ValueError: with the argument's name, what it was and what is needed.
    """
    if traced():
        rest = library.scalar_parts(scale)
        if into is None:
            return torch.ops.gac_kernels.absorb_(current, previous, total, *rest)
        torch.ops.gac_kernels.absorb_into_(current, previous, total, into, *rest)
        return into
    call = absorb_call(current, previous, total, scale, into=into)
    return runner("absorb_", current.device.type)(call)


def absorb_sketch_(
    tensors: Any,
    previous: Tensor,
    total: Tensor,
    scale: Tensor | float,
    *,
    layout: SketchLayout,
    regions: Any = None,
    into: Tensor | None = None,
    second_moments: Any = None,
    eps: float = 1e-8,
    block_scales: Any = None,
) -> Tensor:
    """:func:`sketch` of running sums, and :func:`absorb_` of what they have gained, in one.

    With ``now`` the tensors' sketch in float32 and ``delta = scale * (now - previous)``, in the regions named:
    ``total += delta``, then ``previous <- now``. Other regions stay.

    Args:
        tensors: a tensor or a list of tensors that fill their regions; as for :func:`sketch`.
        previous: ``[layout.size]`` float32, contiguous: the sketch of the running sums at the last call.
        total: ``[layout.size]`` float32, contiguous. It must not overlap ``previous``.
        scale: a number, or a 0-dim tensor that is read on the device.
        layout: where elements go.
        regions: the region of each tensor (default: tensor ``k`` fills region ``k``), each another.
        into: what to add the sums to, of their shape, dtype and device, contiguous; None for a new tensor.
        second_moments, eps, block_scales: as for :func:`sketch`.

    Returns:
        ``[2 + layout.cells]``: moments of the (weighted) tensors, as :func:`sketch` gives them, and the sum of squares
        of ``delta`` over each 128 lanes of each slab of the layout (0 where no region was named); float64 (float32
        where the device has no float64). ``into`` itself where it is given.

    Raises:
        TypeError, ValueError: with the argument's name, what it was and what is needed.
    """
    if traced():
        tensors = tensors if block_scales is None else unscaled(tensors, block_scales)
        numels, listed = list(layout.numels), None if regions is None else list(regions)
        seconds = None if second_moments is None else library.listed(second_moments)
        rest = (numels, layout.rows_per_slab, layout.lanes, listed, layout.seed & 0xFFFFFFFF)
        rest = (*rest, *library.scalar_parts(scale), seconds, eps)
        if into is None:
            return torch.ops.gac_kernels.absorb_sketch_(library.listed(tensors), previous, total, *rest)
        torch.ops.gac_kernels.absorb_sketch_into_(library.listed(tensors), previous, total, into, *rest)
        return into
    options = {"layout": layout, "regions": regions, "into": into, "second_moments": second_moments, "eps": eps}
    options["block_scales"] = block_scales
    backend = implementation("absorb_sketch_", _device_type(previous))
    return backend.direct(tensors, previous, total, scale, **options)

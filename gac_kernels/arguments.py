"""Checks of the operations' arguments, shared by every backend. Pure host work: nothing here reads a device.

Lists have hundreds of tensors and a call may be shorter than its checks, so what is right is found right by a few
passes in C (``map`` over attribute getters); loops in Python only look for what to name in an error.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from gac_kernels.layout import SketchLayout

_PLAIN = {Tensor, torch.nn.Parameter}
_kind = operator.attrgetter("dtype", "layout", "device")
_shape = operator.attrgetter("shape")


def accumulator_dtype(device: torch.device) -> torch.dtype:
    """float64, or float32 on devices that lack it."""
    return torch.float32 if device.type == "mps" else torch.float64


def tensor_list(tensors: Any, name: str) -> list[Tensor]:
    """``tensors`` as a list of floating-point tensors on one device; a single tensor is a list of one."""
    if isinstance(tensors, Tensor):
        tensors = [tensors]
    elif not isinstance(tensors, Sequence):
        try:
            tensors = list(tensors)
        except TypeError:
            raise TypeError(f"{name} must be a tensor or a list of tensors, got {type(tensors).__name__}") from None
    if _PLAIN.issuperset(map(type, tensors)):
        kinds = set(map(_kind, tensors))
        readable = all(dtype.is_floating_point and layout is torch.strided for dtype, layout, _ in kinds)
        if readable and len({device for _, _, device in kinds}) <= 1:
            return list(tensors)
    for k, tensor in enumerate(tensors):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}[{k}] must be a tensor, got {type(tensor).__name__}")
        if not tensor.is_floating_point():
            raise TypeError(f"{name}[{k}] must be floating point, got {tensor.dtype}")
        if tensor.layout is not torch.strided:
            raise TypeError(f"{name}[{k}] has layout {tensor.layout}: pass its dense form (t.to_dense())")
        if tensor.device != tensors[0].device:
            raise ValueError(
                f"{name}[{k}] is on {tensor.device}, {name}[0] on {tensors[0].device}: call once for each device"
            )
    return list(tensors)


def check_scalar(value: Any, name: str, device: torch.device) -> Tensor | float:
    """A number, or a 0-dim floating tensor on ``device`` (or on the host, where reading it costs no transfer back)."""
    if isinstance(value, Tensor):
        if value.numel() != 1 or not value.is_floating_point():
            raise ValueError(f"{name} must be a 0-dim floating-point tensor, got {tuple(value.shape)} {value.dtype}")
        if value.device != device:
            if value.device.type != "cpu":
                raise ValueError(f"{name} is on {value.device}, the tensors on {device}: move it there first")
            value = value.to(device, non_blocking=True)
        return value.detach().reshape(())
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    raise TypeError(f"{name} must be a number or a 0-dim tensor, got {type(value).__name__}")


def check_pair(a: Any, b: Any, *, writes_a: bool = False) -> tuple[list[Tensor], list[Tensor]]:
    """Two lists of floating tensors, pairwise of equal shape, on one device."""
    a, b = tensor_list(a, "a"), tensor_list(b, "b")
    if len(a) != len(b):
        raise ValueError(f"a has {len(a)} tensors and b has {len(b)}: they must pair up")
    together = list(map(_shape, a)) == list(map(_shape, b)) and (not a or a[0].device == b[0].device)
    if together and (not writes_a or all(map(Tensor.is_contiguous, a))):
        return a, b
    for k, (x, y) in enumerate(zip(a, b, strict=True)):
        if x.shape != y.shape:
            raise ValueError(f"a[{k}] has shape {tuple(x.shape)} and b[{k}] {tuple(y.shape)}: they must be equal")
        if x.device != y.device:
            raise ValueError(f"a[{k}] is on {x.device} and b[{k}] on {y.device}: they must be on one device")
        if writes_a and overlaps_itself(x):
            raise ValueError(f"a[{k}] (strides {x.stride()}) overlaps itself in memory and cannot be written: clone it")
    return a, b


def overlaps_itself(tensor: Tensor) -> bool:
    """True when two indices may address the same element (an expanded tensor, say)."""
    if tensor.numel() <= 1 or tensor.is_contiguous():
        return False
    reach = 0
    for stride, size in sorted((s, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1):
        if stride <= reach:
            return True
        reach += stride * (size - 1)
    return False


def check_into(into: Tensor, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """``into``, where results are added, without its graph."""
    dtype = accumulator_dtype(device)
    if not isinstance(into, Tensor) or into.dtype != dtype:
        raise TypeError(f"into must be a {dtype} tensor, got {getattr(into, 'dtype', type(into).__name__)}")
    if into.shape != shape or not into.is_contiguous():
        raise ValueError(f"into must be contiguous with shape {shape}, got {tuple(into.shape)}, {into.stride()}")
    if into.device != device:
        raise ValueError(f"into is on {into.device}, the results on {device}: they must be on one device")
    return into.detach()


def check_sketch(
    tensors: Any, out: Tensor, layout: SketchLayout | None, regions: Any, starts: Any, seed: int
) -> tuple[list[Tensor], SketchLayout, tuple[int, ...], tuple[int, ...]]:
    """The arguments of ``sketch`` in their full form: a layout, and a region and a start for each tensor."""
    tensors = tensor_list(tensors, "tensors")
    if not isinstance(out, Tensor) or out.dim() != 1 or not out.is_contiguous():
        raise ValueError("out must be a contiguous 1-D tensor")
    if out.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"out must be float32 or float64, got {out.dtype}")
    if tensors and tensors[0].device != out.device:
        raise ValueError(f"tensors are on {tensors[0].device}, out on {out.device}: they must be on one device")
    if layout is None:
        if regions is not None or starts is not None:
            raise ValueError("regions and starts need a layout: pass layout=SketchLayout.per_tensor(...)")
        starts, total = [], 0
        for tensor in tensors:
            starts.append(total)
            total += tensor.numel()
        return tensors, SketchLayout.flat(total, out.numel(), seed=seed), (0,) * len(tensors), tuple(starts)
    if out.numel() != layout.size:
        raise ValueError(f"out has {out.numel()} elements, the layout needs {layout.size}: torch.zeros(layout.size)")
    regions = tuple(range(len(tensors))) if regions is None else tuple(map(int, regions))
    starts = (0,) * len(tensors) if starts is None else tuple(map(int, starts))
    _check_places(layout, regions, starts, tuple(map(Tensor.numel, tensors)))
    return tensors, layout, regions, starts


@lru_cache(maxsize=256)
def _check_places(
    layout: SketchLayout, regions: tuple[int, ...], starts: tuple[int, ...], numels: tuple[int, ...]
) -> None:
    """That every tensor lies within its region. Training repeats a few calls: each of them is looked at once."""
    if len(regions) != len(numels) or len(starts) != len(numels):
        raise ValueError(f"{len(numels)} tensors need as many regions and starts, got {len(regions)}, {len(starts)}")
    for k, (numel, region, start) in enumerate(zip(numels, regions, starts, strict=True)):
        if not 0 <= region < len(layout.numels):
            raise ValueError(f"regions[{k}] is {region}: the layout has {len(layout.numels)} regions")
        if start < 0 or start + numel > layout.numels[region]:
            raise ValueError(
                f"tensors[{k}] covers elements {start} to {start + numel} of region {region}, "
                f"which has {layout.numels[region]}"
            )


def check_second_moments(second_moments: Any, tensors: list[Tensor], eps: float) -> list[Tensor]:
    """``second_moments`` as a list of tensors that pair up with ``tensors``, element by element."""
    second_moments = tensor_list(second_moments, "second_moments")
    if len(second_moments) != len(tensors):
        raise ValueError(f"second_moments has {len(second_moments)} tensors, tensors {len(tensors)}: they must pair up")
    for k, (v, x) in enumerate(zip(second_moments, tensors, strict=True)):
        if v.numel() != x.numel():
            raise ValueError(f"second_moments[{k}] has {v.numel()} elements, tensors[{k}] {x.numel()}: must be equal")
        if v.device != x.device:
            raise ValueError(f"second_moments[{k}] is on {v.device}, tensors[{k}] on {x.device}: move it there first")
    check_eps(eps)
    return second_moments


def check_eps(eps: float) -> None:
    """Raises unless ``eps`` is a number that float32 holds: 0, or from 2**-126 to its largest."""
    if isinstance(eps, bool) or not isinstance(eps, (int, float)):
        raise TypeError(f"eps must be a number, got {type(eps).__name__}")
    if eps != 0 and not 2.0**-126 <= eps <= 2.0**127:
        raise ValueError(f"eps must be 0 or between 2**-126 (1.2e-38) and 2**127, got {eps}")


def check_token_inputs(
    logprobs: Tensor, advantages: Tensor, mask: Tensor, is_expert: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``token_moments``' arguments with ``advantages`` broadcast to ``[B, T]``."""
    named = {"logprobs": logprobs, "advantages": advantages, "mask": mask, "is_expert": is_expert}
    for name, value in named.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
        if value.device != logprobs.device:
            raise ValueError(f"{name} is on {value.device}, logprobs on {logprobs.device}: move it there first")
    if logprobs.dim() != 2:
        raise ValueError(f"logprobs must have shape [B, T], got {tuple(logprobs.shape)}")
    for name in ("logprobs", "advantages"):
        if not named[name].is_floating_point():
            raise TypeError(f"{name} must be floating point, got {named[name].dtype}")
    rows, length = logprobs.shape
    if advantages.shape == (rows,):
        advantages = advantages[:, None]
    if advantages.shape not in ((rows, length), (rows, 1)):
        raise ValueError(f"advantages must have shape {(rows, length)} or {(rows,)}, got {tuple(advantages.shape)}")
    if mask.shape != (rows, length):
        raise ValueError(f"mask must have shape {(rows, length)}, got {tuple(mask.shape)}")
    if is_expert.shape != (rows,):
        raise ValueError(f"is_expert must have shape {(rows,)}, got {tuple(is_expert.shape)}")
    return logprobs.detach(), advantages.detach().expand(rows, length), mask, is_expert.bool()


def check_absorb(current: Tensor, previous: Tensor | None, total: Tensor, scale: Any) -> Tensor | float:
    """``absorb_``'s arguments; returns the scale as :func:`check_scalar` does."""
    named = {"current": current, "total": total} | ({} if previous is None else {"previous": previous})
    for name, value in named.items():
        if not isinstance(value, Tensor) or value.dtype != torch.float32:
            raise TypeError(f"{name} must be a float32 tensor, got {getattr(value, 'dtype', type(value).__name__)}")
        if value.dim() != 1 or not value.is_contiguous():
            raise ValueError(f"{name} must be contiguous and 1-D, got shape {tuple(value.shape)}: pass t.reshape(-1)")
        if value.shape != current.shape:
            raise ValueError(f"{name} has {value.numel()} elements, current {current.numel()}: they must be equal")
        if value.device != current.device:
            raise ValueError(f"{name} is on {value.device}, current on {current.device}: they must be on one device")
    return check_scalar(scale, "scale", current.device)

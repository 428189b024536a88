"""Checks of the operations' arguments, shared by every backend. Pure host work: nothing here reads a device.

Lists have hundreds of tensors and a call may be shorter than its checks, so what is right is found right by a few
passes in C (``map`` over attribute getters); loops in Python only look for what to name in an error.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gac_kernels.strides import overlaps_itself

PLAIN = frozenset((Tensor, torch.nn.Parameter))
"""Types whose memory is surely their own; what else there is may be a view of something."""

_FLOATING = frozenset(d for d in vars(torch).values() if isinstance(d, torch.dtype) and d.is_floating_point)


def getter(name: str) -> Callable[[Tensor], Any]:
    """Reads an attribute of a tensor; mapped over a list it costs half of a loop."""
    return getattr(Tensor, name).__get__


_dtype, _device, _layout, _is_cpu, _shape = map(getter, ("dtype", "device", "layout", "is_cpu", "shape"))


_NUMBER = struct.Struct("q")


def accumulator_dtype(device: torch.device) -> torch.dtype:
    """float64, or float32 on devices that lack it."""
    return torch.float32 if device.type == "mps" else torch.float64


KNOWN_DTYPES = (
    *(torch.float32, torch.bfloat16, torch.float16, torch.float64),
    *(torch.float8_e4m3fn, torch.float8_e5m2),
)
"""By their codes in :attr:`TensorList.numbers` and in the C++ library."""

_ALONE = tuple(frozenset((dtype,)) for dtype in KNOWN_DTYPES)


class TensorList(NamedTuple):
    """A list of floating-point tensors on one device, and what was seen of it while it was checked.

    Attributes:
        tensors: the tensors.
        dtypes: those there are.
        plain: all are contiguous and of plain types.
        numbers: int64 numbers, where one pass in C has made them: addresses, elements and codes of dtypes, a row of
            each; None.
    """

    tensors: list[Tensor]
    dtypes: frozenset[torch.dtype]
    plain: bool
    numbers: bytes | None = None

    def numels(self) -> tuple[int, ...]:
        """Elements of each tensor."""
        count = len(self.tensors)
        if self.numbers is None:
            return tuple(map(Tensor.numel, self.tensors))
        return struct.unpack_from(f"{count}q", self.numbers, 8 * count)


def describe(tensors: Any) -> bytes | None:
    """Where the C++ library is loaded, its builtin stands here (``csrc/python_calls.cpp``): one pass over a list.

    Returns:
        int64 numbers of contiguous tensors of plain types, known dtypes and one device: the code of the dtype of all or
        -1, and the rows of :attr:`TensorList.numbers`. None for anything else: it has to be looked at by Python.
    """
    return None


def described(tensors: Any, name: str) -> TensorList:
    """``tensors`` as a list of floating-point tensors on one device; a single tensor is a list of one.

    Raises:
        TypeError: an element is no dense floating-point tensor. ValueError: they are on several devices.
    """
    if isinstance(tensors, Tensor):
        tensors = [tensors]
    numbers = None
    if type(tensors) is list:
        tensors = tensors.copy()  # before it is looked at: another thread may change the caller's
        numbers = describe(tensors)
    if numbers is not None:
        code = _NUMBER.unpack_from(numbers)[0]
        dtypes = _ALONE[code] if code >= 0 else frozenset(map(_dtype, tensors))
        return TensorList(tensors, dtypes, True, numbers[8:])
    if not isinstance(tensors, Sequence):
        try:
            tensors = list(tensors)
        except TypeError:
            raise TypeError(f"{name} must be a tensor or a list of tensors, got {type(tensors).__name__}") from None
    plain = PLAIN.issuperset(map(type, tensors))
    if plain and (all(map(_is_cpu, tensors)) or len(set(map(_device, tensors))) <= 1):
        dtypes = frozenset(map(_dtype, tensors))
        if _FLOATING.issuperset(dtypes):
            contiguous = _contiguous(tensors)
            if contiguous or {torch.strided}.issuperset(map(_layout, tensors)):
                return TensorList(list(tensors), dtypes, contiguous)
    name_what_is_wrong(tensors, name)
    return TensorList(list(tensors), frozenset(map(_dtype, tensors)), plain and _contiguous(tensors))


def _contiguous(tensors: Sequence[Tensor]) -> bool:
    try:
        return all(map(Tensor.is_contiguous, tensors))
    except RuntimeError:  # a sparse layout has no strides
        return False


def name_what_is_wrong(tensors: Sequence, name: str) -> None:
    """Raises what :func:`described` does, for the first element that is to blame."""
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


def tensor_list(tensors: Any, name: str) -> list[Tensor]:
    """The tensors of :func:`described`."""
    return described(tensors, name).tensors


def check_scalar(value: Any, name: str, device: torch.device) -> Tensor | float:
    """A number, or a 0-dim floating tensor on ``device`` (or on the host, where reading it costs no transfer back)."""
    if isinstance(value, Tensor):
        if value.numel() != 1 or not value.is_floating_point():
            raise ValueError(f"{name} must be a 0-dim floating-point tensor, got {tuple(value.shape)} {value.dtype}")
        if value.device != device:
            if value.device.type != "cpu":
                raise ValueError(f"{name} is on {value.device}, the tensors on {device}: move it there first")
            value = value.to(device, non_blocking=True)
        value = value.reshape(()) if value.dim() else value
        return value.detach() if value.requires_grad else value
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


def check_second_moments(second_moments: Any, numels: tuple[int, ...], device: torch.device, eps: float) -> TensorList:
    """``second_moments`` as a list of tensors that pair up with those of ``numels`` elements on ``device``."""
    found = described(second_moments, "second_moments")
    seconds = found.tensors
    if len(seconds) != len(numels):
        raise ValueError(f"second_moments has {len(seconds)} tensors, tensors {len(numels)}: they must pair up")
    if seconds and seconds[0].device != device:
        raise ValueError(f"second_moments[0] is on {seconds[0].device}, tensors[0] on {device}: move it there first")
    if found.numels() != numels:
        for k, (got, numel) in enumerate(zip(found.numels(), numels, strict=True)):
            if got != numel:
                raise ValueError(f"second_moments[{k}] has {got} elements, tensors[{k}] {numel}: must be equal")
    check_eps(eps)
    return found


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

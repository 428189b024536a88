"""What a call reads: the elements of a list of tensors, as they are, weighted by second moments or scaled in blocks.

Scales in blocks are those of the OCP Microscaling formats (MX, specification 1.0, 2023): the elements are e4m3 or e5m2,
and each 32 of them along the last dimension have one power of two, an exponent of 8 bits without sign or digits (e8m0).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gac_kernels.arguments import TensorList, check_second_moments, described

BLOCK = 32
"""Elements that share a scale."""

SCALED_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)
SCALE_DTYPES = tuple(d for d in (getattr(torch, "float8_e8m0fnu", None), torch.uint8) if d is not None)


class Elements(NamedTuple):
    """Checked tensors, and what their elements are divided by or multiplied with.

    Attributes:
        listed: floating-point tensors on one device, of any dtype and strides; contiguous where they are scaled.
        numels: elements of each.
        seconds: second moments, a tensor for each of those, of as many elements; or, ``scaled``, scales: uint8,
            contiguous, one for each 32 elements, none where a tensor has none. None: elements count as they are.
        eps: added to the roots of second moments.
        scaled: what ``seconds`` are.
    """

    listed: TensorList
    numels: tuple[int, ...]
    seconds: TensorList | None
    eps: float
    scaled: bool

    @property
    def tensors(self) -> Sequence[Tensor]:
        """The tensors."""
        return self.listed.tensors

    @property
    def second_moments(self) -> Sequence[Tensor] | None:
        """Their second moments."""
        return None if self.seconds is None or self.scaled else self.seconds.tensors

    @property
    def scales(self) -> Sequence[Tensor] | None:
        """Their scales."""
        return self.seconds.tensors if self.seconds is not None and self.scaled else None


def elements(
    tensors: Any,
    device: torch.device | None,
    name: str,
    second_moments: Any = None,
    eps: float = 1e-8,
    block_scales: Any = None,
) -> Elements:
    """Checks what is read by a call whose vector ``name`` is on ``device`` (None: wherever the tensors are)."""
    listed = described(tensors, "tensors")
    tensors = listed.tensors
    if device is not None and tensors and tensors[0].device != device:
        raise ValueError(f"tensors are on {tensors[0].device}, {name} on {device}: they must be on one device")
    numels = listed.numels()
    if block_scales is not None:
        if second_moments is not None:
            raise ValueError(
                "block_scales and second_moments are not taken together: pass x.float() * scales as tensors"
            )
        scales = _checked_scales(tensors, block_scales)
        if not listed.plain:
            contiguous = [t.contiguous() if s.numel() else t for t, s in zip(tensors, scales, strict=True)]
            listed = described(contiguous, "tensors")
        return Elements(listed, numels, TensorList(scales, frozenset((torch.uint8,)), True), eps, True)
    if second_moments is None:
        return Elements(listed, numels, None, eps, False)
    where = device if device is not None else tensors[0].device
    return Elements(listed, numels, check_second_moments(second_moments, numels, where, eps), eps, False)


def _checked_scales(tensors: Sequence[Tensor], block_scales: Any) -> list[Tensor]:
    given = [block_scales] if isinstance(block_scales, Tensor) else list(block_scales)
    if len(given) != len(tensors):
        raise ValueError(
            f"block_scales has {len(given)} entries, tensors {len(tensors)}: they must pair up, None for none"
        )
    found = []
    for k, (tensor, scales) in enumerate(zip(tensors, given, strict=True)):
        if scales is None:
            found.append(torch.empty(0, dtype=torch.uint8, device=tensor.device))
            continue
        if not isinstance(scales, Tensor) or scales.dtype not in SCALE_DTYPES:
            got = getattr(scales, "dtype", type(scales).__name__)
            raise TypeError(f"block_scales[{k}] must be a float8_e8m0fnu or uint8 tensor, or None, got {got}")
        if tensor.dtype not in SCALED_DTYPES:
            raise TypeError(
                f"tensors[{k}] has block scales and must be float8_e4m3fn or float8_e5m2, got {tensor.dtype}"
            )
        if scales.device != tensor.device:
            raise ValueError(f"block_scales[{k}] is on {scales.device}, tensors[{k}] on {tensor.device}: move it there")
        if not tensor.dim() or (tensor.dim() > 1 and tensor.shape[-1] % BLOCK):
            raise ValueError(
                f"tensors[{k}] has shape {tuple(tensor.shape)}: with block scales the last dimension must be a "
                f"multiple of {BLOCK}, but for tensors of one dimension"
            )
        shape = (*tensor.shape[:-1], -(-tensor.shape[-1] // BLOCK))
        if scales.shape != shape:
            raise ValueError(
                f"block_scales[{k}] has shape {tuple(scales.shape)}, {shape} is needed: one for each {BLOCK} elements"
            )
        found.append(scales.detach().contiguous().view(torch.uint8).reshape(-1))
    return found


def factors(scales: Tensor, numel: int, dtype: torch.dtype) -> Tensor:
    """``[numel]``: what each element is multiplied with, a power of two; NaN for a scale of 255."""
    powers = torch.exp2(scales.to(dtype) - 127).masked_fill(scales == 255, torch.nan)
    return powers.repeat_interleave(BLOCK)[:numel]


def unscaled(tensors: Any, block_scales: Any) -> list[Tensor]:
    """The tensors as they count, in float32 where they have scales: for where no kernel can be called."""
    read = elements(tensors, None, "", block_scales=block_scales)
    pairs = zip(read.tensors, read.scales or (), strict=True)
    return [x.float() * factors(s, x.numel(), torch.float32).view(x.shape) if s.numel() else x for x, s in pairs]

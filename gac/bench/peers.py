"""The peers: what a user would write in plain torch for the same numbers, or for the closest thing torch has."""

from __future__ import annotations

import shutil
from collections.abc import Callable

import torch
from torch import Tensor

from gac_kernels.layout import LANES, SIGN_BITS


def compiler_missing(device: torch.device) -> str | None:
    """Why ``torch.compile`` has no code generator here; None when it has."""
    if not (shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")):
        return "torch.compile needs a C++ compiler, and none was found"
    if device.type == "cuda":
        try:
            import triton  # noqa: F401
        except ImportError:
            return "torch.compile needs triton on a GPU, and it is not installed"
    return None


def moments_expression(x: Tensor) -> Tensor:
    """Sum of squares and count of non-finite elements."""
    wide = x.float()
    return torch.stack([wide.square().sum(), (~torch.isfinite(wide)).sum().float()])


def pair_expression(a: Tensor, b: Tensor) -> Tensor:
    """``|a|^2``, ``|b|^2``, ``<a, b>``."""
    a, b = a.float(), b.float()
    return torch.stack([a.square().sum(), b.square().sum(), (a * b).sum()])


def mix_expression(a: Tensor, b: Tensor, mu: Tensor) -> None:
    """``a <- mu * a + (1 - mu) * b``."""
    a.copy_(mu * a.float() + (1 - mu) * b.float())


def weighted(x: Tensor, second: Tensor, eps: float = 1e-8) -> Tensor:
    """``x`` as Adam's update sees it."""
    return x / (second.sqrt() + eps)


def sketch_expression(x: Tensor, out: Tensor, key: int, rows: int, lanes: int, second: Tensor | None = None) -> Tensor:
    """The sketch of one flat tensor that fills whole slabs, signs hashed on the fly, with its moments."""
    index = torch.arange(x.numel(), device=x.device)
    h = (index // SIGN_BITS) ^ key
    h = h ^ (h >> 16)
    h = (h * 0x85EBCA6B) & 0xFFFFFFFF
    h = h ^ (h >> 13)
    h = (h * 0xC2B2AE35) & 0xFFFFFFFF
    h = h ^ (h >> 16)
    wide = x.float() if second is None else weighted(x.float(), second)
    signed = torch.where((h >> (index % SIGN_BITS)) & 1 == 1, -wide, wide)
    out.copy_(signed.view(-1, rows, lanes).sum(1).view(-1))
    return moments_expression(wide)


def absorb_expression(current: Tensor, previous: Tensor, total: Tensor, scale: Tensor) -> Tensor:
    """``total += delta``, ``previous <- current``; squares of ``delta`` by cells of 1024."""
    delta = scale * (current - previous)
    total.add_(delta)
    previous.copy_(current)
    return delta.square().view(-1, LANES).sum(1)


def accumulate_expression(total: Tensor, x: Tensor, scale: Tensor) -> Tensor:
    """``total += scale * x``, and the moments of ``x``."""
    wide = x.float()
    total.add_(scale * wide)
    return moments_expression(wide)


def absorb_sketch_expression(
    x: Tensor, previous: Tensor, total: Tensor, scale: Tensor, key: int, rows: int, lanes: int
) -> tuple[Tensor, Tensor]:
    """:func:`sketch_expression`, and :func:`absorb_expression` of what it makes."""
    now = torch.empty_like(previous)
    moments = sketch_expression(x, now, key, rows, lanes)
    return moments, absorb_expression(now, previous, total, scale)


def token_expression(logprobs: Tensor, advantages: Tensor, mask: Tensor, is_expert: Tensor) -> Tensor:
    """The seven sums of each sequence."""
    logp = torch.where(mask, logprobs.float(), 0.0)
    a = torch.where(mask & ~is_expert[:, None], advantages.float(), 0.0)
    p = logp.exp()
    phi = torch.where(mask, p * (1 - p), 0.0)
    return torch.stack([c.sum(1) for c in (mask.float(), logp, a, a * a, phi, phi * phi, phi * a)], dim=1)


_compiled: dict[Callable, Callable] = {}


def compiled(expression: Callable) -> Callable:
    """``torch.compile(expression, dynamic=True)``, once in a process: one kernel serves every size."""
    if expression not in _compiled:
        torch._dynamo.config.cache_size_limit = max(torch._dynamo.config.cache_size_limit, 64)
        _compiled[expression] = torch.compile(expression, dynamic=True)
    return _compiled[expression]

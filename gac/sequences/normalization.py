"""What a normalization layer multiplies its weight with: found by its formula, and confirmed on random numbers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

Normalize = Callable[[Tensor], Tensor]
"""From a layer's input to what its weight multiplies, both ``[..., d]``; float32."""

_AS_THEY_ARE: Mapping[int, torch.Size] = {}
_EPS = ("eps", "variance_epsilon", "epsilon", "layer_norm_epsilon")
AGREE = 1e-3
"""Relative difference of a weight's gradient on random numbers below which a formula is a layer's own: with another one
it is of the order of 1."""


def root_mean_square(x: Tensor, eps: float) -> Tensor:
    """``x / sqrt(mean(x^2) + eps)`` (Zhang and Sennrich 2019)."""
    x = x.float()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def standardized(x: Tensor, eps: float) -> Tensor:
    """``(x - mean) / sqrt(variance + eps)`` (Ba et al. 2016)."""
    return nn.functional.layer_norm(x.float(), x.shape[-1:], eps=eps)


def normalization_of(module: nn.Module, shapes: Mapping[int, torch.Size] = _AS_THEY_ARE) -> Normalize | None:
    """The formula of a layer that scales (and shifts) normalized vectors elementwise; None where none of them fits.

    Such a layer has no parts, a ``weight`` ``[d]`` and perhaps a ``bias`` ``[d]``. Its gradients on random numbers have
    to be those of the formula: ``sum g * x_hat`` and ``sum g``. ``shapes`` has those of parameters, by their ``id``,
    that are something else while a model is sharded.
    """
    own = {name: shapes.get(id(p), p.shape) for name, p in module._parameters.items() if p is not None}
    shape = own.get("weight")
    if list(module.children()) or not set(own) <= {"weight", "bias"} or shape is None or len(shape) != 1:
        return None
    if any(other != shape for other in own.values()):
        return None
    device = next(p.device for p in module._parameters.values() if p is not None)
    eps = next((getattr(module, name) for name in _EPS if isinstance(getattr(module, name, None), float)), None)
    if eps is None:
        eps = torch.finfo(torch.float32).eps  # what nn.RMSNorm takes for None
    for formula in (root_mean_square, standardized):
        normalize = functools.partial(formula, eps=eps)
        if _agrees(module, normalize, own, device):
            return normalize
    return None


class Bare(nn.Module):
    """A module without its hooks, which would take random numbers for a part of the training."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module.forward(*args, **kwargs)


def _agrees(module: nn.Module, normalize: Normalize, shapes: dict[str, torch.Size], device: torch.device) -> bool:
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator).to(device)
    d = shapes["weight"][0]
    own = {f"module.{name}": draw(d).requires_grad_() for name in shapes}
    x, g = draw(3, d) + 0.5, draw(3, d)
    try:
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
            out = functional_call(Bare(module), own, (x,))
            found = torch.autograd.grad(out, list(own.values()), g)
    except Exception:  # whatever it wants, it is no layer of this kind
        return False
    expected = {"weight": (g * normalize(x)).sum(0), "bias": g.sum(0)}
    return all(
        bool((gradient - expected[name]).norm() <= AGREE * expected[name].norm())
        for name, gradient in zip(shapes, found, strict=True)
    )

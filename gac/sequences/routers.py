"""Routers of experts, and other modules that begin with a linear map of their own: found on random numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from gac.sequences.normalization import AGREE, Bare

_LARGEST = 1 << 22
"""Elements of a weight that is looked at: routers have few, and the look takes a copy."""


@dataclass(frozen=True)
class Router:
    """Where a module's linear map ends.

    Attributes:
        output: place of its result in what the module returns; None where that is all.
    """

    output: int | None


@torch.inference_mode(False)
def router_of(module: nn.Module, shape: torch.Size) -> Router | None:
    """A module that returns ``F.linear(x, weight, bias)``, alone or among what it makes of it; None where it does not.

    Its weight's gradient on random numbers has to be that of the map, with the gradient of the map's whole result:
    nothing else may use the weight.

    Args:
        module: with a ``weight`` ``[p, q]`` and perhaps a ``bias`` ``[p]``, and no other parameters.
        shape: of the weight.
    """
    own = {name for name, p in module._parameters.items() if p is not None}
    if not {"weight"} <= own <= {"weight", "bias"} or list(module.children()) or not 0 < shape.numel() <= _LARGEST:
        return None
    generator = torch.Generator().manual_seed(0)
    draw = lambda *sizes: torch.randn(*sizes, generator=generator)
    x, numbers = draw(5, shape[1]), {"weight": draw(*shape).requires_grad_()}
    if "bias" in own:
        numbers["bias"] = draw(shape[0]).requires_grad_()
    try:
        with torch.enable_grad(), torch.autocast("cpu", enabled=False):
            found = functional_call(Bare(module), {f"module.{name}": p for name, p in numbers.items()}, (x,))
            results = [found] if isinstance(found, Tensor) else list(found)
            product = nn.functional.linear(x, **numbers)
            place = next(k for k, result in enumerate(results) if _close(result, product))
            total = torch.stack([(r * draw(*r.shape)).sum().float() for r in differentiable(results)]).sum()
            g, *gradients = torch.autograd.grad(total, [results[place], *numbers.values()])
    except Exception:  # whatever it wants, it is no module of this kind
        return None
    expected = {"weight": g.t() @ x, "bias": g.sum(0)}
    if not all(_close(gradient, expected[name]) for name, gradient in zip(numbers, gradients, strict=True)):
        return None
    return Router(None if isinstance(found, Tensor) else place)


def differentiable(results: Sequence[object]) -> list[Tensor]:
    """Those of a module's results that have gradients."""
    return [r for r in results if isinstance(r, Tensor) and r.is_floating_point() and r.requires_grad]


def gradient_of_product(module: nn.Module, x: Tensor, gradients: Sequence[Tensor], output: int) -> Tensor:
    """The whole gradient of a router's linear map, by what it makes of it, from the gradients of its results.

    Args:
        x: its input. gradients: of :func:`differentiable` results. output: place of the map's result among all.
    """
    with torch.enable_grad():
        results = module.forward(x.detach())
        pairs = [(r, g.to(r.dtype)) for r, g in zip(differentiable(results), gradients, strict=True)]
        (found,) = torch.autograd.grad([r for r, _ in pairs], [results[output]], [g for _, g in pairs])
    return found


def _close(found: object, expected: Tensor) -> bool:
    if not isinstance(found, Tensor) or found.shape != expected.shape or not found.is_floating_point():
        return False
    return bool((found - expected).norm() <= AGREE * expected.norm())

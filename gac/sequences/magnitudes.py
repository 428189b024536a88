"""What the magnitudes of a DoRA layer multiply: found from the layer's output, and confirmed on random numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from gac.sequences.normalization import AGREE, Bare

InputOf = Callable[[tuple, Mapping[str, Any], Tensor], Tensor]
"""From a call's arguments and what it returned to what the layer's weight multiplies."""


def magnitudes_of(module: nn.Module, shape: tuple[int, ...] | torch.Size) -> InputOf | None:
    """What the weight ``m`` ``[d]`` of PEFT's ``DoraLinearLayer`` multiplies; None for any other module.

    The layer's output is ``(m / n - 1) * base + m / n * adapter`` (Liu et al. 2024, section 4.3), where ``n``, the
    norms of the merged weight's rows, counts as a constant: so ``m`` multiplies ``(base + adapter) / n``, which is
    ``(output + base) / m``. A layer whose gradient on random numbers is another one is not known.

    Args:
        module: the layer. shape: of its weight.
    """
    if type(module).__name__ != "DoraLinearLayer" or len(shape) != 1:
        return None
    layer: Any = module

    def input_of(args: tuple, kwargs: Mapping[str, Any], output: Tensor) -> Tensor:
        return _multiplied(args, kwargs, output, layer.weight)

    return input_of if _agrees(module, shape[0], layer.weight.device) else None


@torch.no_grad()
def _multiplied(args: tuple, kwargs: Mapping[str, Any], output: Tensor, magnitudes: Tensor) -> Tensor:
    layer, base = kwargs["base_layer"], kwargs.get("base_result")
    if base is None:  # with dropout the layer makes it of what is left of its input
        x, weight = args[0], layer.weight
        base = layer.forward(x.to(weight.dtype) if weight.is_floating_point() else x)  # without hooks
    if layer.bias is not None:
        base = base - layer.bias
    total = output + base
    return torch.where(magnitudes == 0, 0.0, total / magnitudes)  # one that is exactly 0 tells nothing


class _Linear(nn.Module):
    """A small linear layer of given numbers; ``turned``: its weight is ``[inputs, outputs]``."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None, *, turned: bool = False) -> None:
        super().__init__()
        self.weight, self.turned = nn.Parameter(weight), turned
        self.bias = None if bias is None else nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.t() if self.turned else self.weight, self.bias)


def _agrees(module: nn.Module, d: int, device: torch.device) -> bool:
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator).to(device)
    turned = bool(getattr(module, "fan_in_fan_out", False))
    base = _Linear(draw(*((4, d) if turned else (d, 4))), draw(d), turned=turned)
    layers = {"lora_A": _Linear(draw(2, 4)), "lora_B": _Linear(draw(d, 2)), "base_layer": base}
    x, g = draw(3, 4), draw(3, d)
    magnitudes = (draw(d).abs() + 0.5).requires_grad_()
    for base_result in (base(x).detach(), None):
        kwargs = layers | {"scaling": 0.7, "base_result": base_result}
        try:
            with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
                output = functional_call(Bare(module), {"module.weight": magnitudes}, (x,), kwargs)
                (found,) = torch.autograd.grad(output, magnitudes, g)
                expected = (g * _multiplied((x,), kwargs, output, magnitudes)).sum(0)
        except Exception:  # whatever it wants, it is no layer of this kind
            return False
        if not bool((found - expected).norm() <= AGREE * expected.norm()):
            return False
    return True

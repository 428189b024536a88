"""Experts whose weights are stacked in one module: what each sends to its gradient, made anew from the module's call.

A token ``t`` goes to a few experts ``e``, each with a weight of its own (the router's)::

    u = U_e x_t     h = gate(u)     y_t += w_te * D_e h        x_t: [d]  U_e: [u, d]  h: [m]  D_e: [d, m]

With the gradient ``g_t`` of ``y_t``, each pair of token and expert adds ``(w_te g_t) h^T`` to the gradient of ``D_e``,
and ``gu x_t^T`` to that of ``U_e``, where ``gu`` is ``D_e^T (w_te g_t)`` taken back through the gate. Inputs, routing
and output gradient are seen at the module, whichever way it computes; ``h`` and ``gu`` are computed again, an expert at
a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from gac.sequences.normalization import AGREE, Bare


class Routed(NamedTuple):
    """What a module of experts was called with.

    Attributes:
        x: ``[N, d]``, tokens. chosen: ``[N, k]``, their experts; what is none of them goes nowhere.
        weights: ``[N, k]``, what each output is multiplied with.
    """

    x: Tensor
    chosen: Tensor
    weights: Tensor


class Sent(NamedTuple):
    """What the pairs of one expert send to its gradients.

    Attributes:
        expert: its number. pairs: ``[n]`` int64, places of the pairs among all ``N k`` of them, token by token.
        up_gradient: ``[n, u]``. inner: ``[n, m]``, the down projection's inputs. down_gradient: ``[n, d]``.
    """

    expert: int
    pairs: Tensor
    up_gradient: Tensor
    inner: Tensor
    down_gradient: Tensor


@dataclass(eq=False)
class Experts:
    """A module of stacked experts, as transformers 5 has them.

    Attributes:
        module: it. up, down: names of its weights, ``[E, u, d]`` and ``[E, d, m]``, or ``turned``: with the last two
            dimensions the other way round. biases: whether each has one, ``[E, u]`` and ``[E, d]``, under its name
            with ``_bias``.
    """

    module: nn.Module
    up: str
    down: str
    turned: bool
    biases: bool

    @property
    def count(self) -> int:
        """Experts."""
        return int(self.module.num_experts)  # type: ignore[arg-type]

    def routed(self, args: tuple, kwargs: Mapping[str, Any]) -> Routed | None:
        """What a call was made with; None where it is another one than known."""
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        numbers = [value for value in given if value.is_floating_point()]
        indices = [value for value in given if value.dtype in (torch.int64, torch.int32)]
        if len(numbers) != 2 or len(indices) != 1:
            return None
        found = Routed(numbers[0], indices[0], numbers[1])
        fits = found.x.dim() == 2 and found.chosen.shape == found.weights.shape and len(found.x) == len(found.chosen)
        return found if fits and found.chosen.dim() == 2 else None

    def weights(self) -> dict[str, Tensor] | None:
        """Those at hand, by name; None where this rank has parts of them at the moment."""
        names = [self.up, self.down]
        names += [f"{name}_bias" for name in names if self.biases]
        found = {name: getattr(self.module, name).detach() for name in names}  # FSDP1's are no parameters at times
        whole = all(found[name].dim() == 3 and len(found[name]) == self.count for name in (self.up, self.down))
        return found if whole else None

    def sent(self, routed: Routed, gradient: Tensor, own: Mapping[str, Tensor]) -> Iterator[Sent]:
        """Of each expert that has tokens. The host reads how many each has.

        Args:
            gradient: ``[N, d]``, of the module's output. own: the module's weights, by name.
        """
        up, down, up_bias = own[self.up], own[self.down], own.get(self.up + "_bias")
        flat, weights = routed.chosen.reshape(-1), routed.weights.reshape(-1)
        order = flat.argsort(stable=True)
        numbers = torch.arange(self.count + 1, device=flat.device)
        bounds = torch.searchsorted(flat[order].to(torch.int64), numbers).tolist()
        for expert in range(self.count):
            pairs = order[bounds[expert] : bounds[expert + 1]]
            if not len(pairs):
                continue
            tokens = pairs // routed.chosen.shape[1]
            g = gradient[tokens].to(down.dtype) * weights[pairs, None].to(down.dtype)
            u_map, d_map = (w[expert].t() if self.turned else w[expert] for w in (up, down))
            u = nn.functional.linear(routed.x[tokens].to(up.dtype), u_map, None if up_bias is None else up_bias[expert])
            with torch.enable_grad():
                u.requires_grad_()
                inner = _gated(self.module, u)
            (up_gradient,) = torch.autograd.grad(inner, u, g @ d_map)
            yield Sent(expert, pairs, up_gradient, inner.detach(), g)


def _gated(module: Any, u: Tensor) -> Tensor:
    """``[n, m]``: from what the up projection gave to what the down projection gets."""
    if getattr(module, "has_gate", True):
        return module._apply_gate(u)
    return module.act_fn(u)


def experts_of(module: nn.Module) -> Experts | None:
    """A module of stacked experts, if it is one: its gradients on random numbers have to be those of the formula.

    Experts that are spread over ranks are none: a rank has those of other ranks' tokens.
    """
    own = module._parameters
    up = next((name for name in ("gate_up_proj", "up_proj") if own.get(name) is not None), None)
    if up is None or own.get("down_proj") is None or not isinstance(getattr(module, "num_experts", None), int):
        return None
    biases = own.get(up + "_bias") is not None
    names = {up, "down_proj"} | ({up + "_bias", "down_proj_bias"} if biases else set())
    if {name for name, p in own.items() if p is not None} != names or getattr(module, "_is_expert_parallel", False):
        return None
    found = Experts(module, up, "down_proj", bool(getattr(module, "is_transposed", False)), biases)
    return found if _agrees(found) else None


_SMALL = 8
"""Width on which a formula is tried: grouped products want rows of 16 bytes."""


@torch.inference_mode(False)
def _agrees(experts: Experts) -> bool:
    """On the CPU, with experts of few numbers and a few tokens."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator)
    count, tokens, each = experts.count, 4, min(2, experts.count)
    tall = 2 * _SMALL if getattr(experts.module, "has_gate", True) else _SMALL
    shapes = {experts.up: (count, tall, _SMALL), experts.down: (count, _SMALL, _SMALL)}
    weights = {name: draw(a, *((c, b) if experts.turned else (b, c))) for name, (a, b, c) in shapes.items()}
    if experts.biases:
        weights |= {experts.up + "_bias": draw(count, tall), experts.down + "_bias": draw(count, _SMALL)}
    index = torch.stack([torch.randperm(count, generator=generator)[:each] for _ in range(tokens)])
    routed, g = Routed(draw(tokens, _SMALL), index, draw(tokens, each).abs()), draw(tokens, _SMALL)
    leaves = {name: value.requires_grad_() for name, value in weights.items()}
    try:
        with torch.enable_grad(), torch.autocast("cpu", enabled=False):
            out = functional_call(Bare(experts.module), {f"module.{name}": p for name, p in leaves.items()}, routed)
            found = torch.autograd.grad(out, list(leaves.values()), g)
        with torch.no_grad():
            expected = _gradients(experts, routed, g, {name: p.detach() for name, p in leaves.items()})
    except Exception:  # whatever it wants, it is no module of this kind
        return False
    return all(
        bool((gradient - expected[name]).norm() <= AGREE * expected[name].norm())
        for name, gradient in zip(leaves, found, strict=True)
    )


def _gradients(experts: Experts, routed: Routed, gradient: Tensor, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """By name: of all tokens together."""
    found = {name: torch.zeros_like(p) for name, p in weights.items()}
    each = routed.chosen.shape[1]
    for sent in experts.sent(routed, gradient, weights):
        x = routed.x[sent.pairs // each]
        for name, g, inputs in ((experts.up, sent.up_gradient, x), (experts.down, sent.down_gradient, sent.inner)):
            found[name][sent.expert] += inputs.t() @ g if experts.turned else g.t() @ inputs
            if experts.biases:
                found[name + "_bias"][sent.expert] += g.sum(0)
    return found

"""Where a layer's input and the gradient of its output are met: forward hooks, and hooks on what layers return.

The input is kept as autograd keeps what a backward pass needs: in the form of a saved tensor. So it shares its memory
with what the layer itself saved, and activation checkpointing, or offloading, does with it what it does with the rest.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from gac.sequences.layers import Kind, Layer
from gac.sequences.routers import differentiable, gradient_of_product
from gac.sequences.rows import Chosen, Given

Take = Callable[[Layer, "Kept", Tensor], None]
"""Takes a layer's input, and the gradient of its output."""


class _Saved(torch.autograd.Function):
    """A node that saves a tensor and is never run."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*inputs)
        return anchor.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> None:
        raise RuntimeError("the node that keeps a layer's input was run")


class Kept:
    """A layer's input until the gradient of its output comes.

    Args:
        inputs: it, in its parts. given: what the model was called with.
    """

    def __init__(self, inputs: Sequence[Tensor], given: Given | None) -> None:
        self.given = given
        with torch.enable_grad():
            # what the node returned, not the node alone: torch 2.7 frees what a node saved as soon as nothing needs it
            self._output = _Saved.apply(torch.empty(0, requires_grad=True), *(x.detach() for x in inputs))

    def take(self) -> Sequence[Tensor] | None:
        """The input, once; None when it was taken before."""
        output, self._output = self._output, None
        return None if output is None else output.grad_fn.saved_tensors


class Present(Kept):
    """An input that is at hand."""

    def __init__(self, inputs: Sequence[Tensor], given: Given | None) -> None:
        self.given, self._inputs = given, inputs

    def take(self) -> Sequence[Tensor] | None:
        """The input."""
        return self._inputs


_places: WeakValueDictionary[int, Taps] = WeakValueDictionary()
_numbers = itertools.count()
_PLACE = 1 << 20
"""Layers that a model may have."""

_library = torch.library.Library("gac", "FRAGMENT")
_library.define("take(Tensor[] inputs, Tensor[] gradients, int place) -> ()")


def _take(inputs: list[Tensor], gradients: list[Tensor], place: int) -> None:
    """What compiled code calls in the backward pass; the compiler does not look into it."""
    taps = _places.get(place // _PLACE)
    if taps is not None:
        taps.take(place % _PLACE, inputs, gradients)


_library.impl("take", _take, "CompositeExplicitAutograd")
torch.library.register_fake("gac::take", lambda inputs, gradients, place: None, lib=_library)


@functools.cache
def _keep_in_compiled_code() -> None:
    """Tells the compiler that the operator, which returns nothing, has to stay."""
    from torch._higher_order_ops.effects import _EffectType, _register_effectful_op

    _register_effectful_op(torch.ops.gac.take.default, _EffectType.ORDERED)


class _Tap(torch.autograd.Function):
    """The identity of some outputs; its backward pass hands over what it sees."""

    @staticmethod
    def forward(ctx: Any, place: int, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*tensors[count:])
        ctx.place = place
        return tuple(output.view_as(output) for output in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        torch.ops.gac.take(list(ctx.saved_tensors), list(gradients), ctx.place)
        return (None, None, *gradients, *(None for _ in ctx.saved_tensors))


class Taps:
    """The hooks of a model.

    Args:
        model: told apart from its parts, because its input says how many sequences there are.
        layers: those that are seen.
        take: called in the backward pass.
    """

    def __init__(self, model: nn.Module, layers: list[Layer], take: Take) -> None:
        self._model, self._layers, self._take = model, layers, take
        self._given: tuple[int, int] | None = None
        self.chosen: Chosen | None = None  # of calls under way
        self._number = next(_numbers)
        _keep_in_compiled_code()
        _places[self._number] = self

    @property
    def given(self) -> Given | None:
        """What the model was last called with."""
        return None if self._given is None else Given(*self._given, self.chosen)

    def take(self, number: int, inputs: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        """What a layer saw, from compiled code."""
        layer, gradient = self._layers[number], gradients[0]
        if layer.output is not None:
            gradient = gradient_of_product(layer.module, inputs[0], gradients, layer.output)
        self._take(layer, Present(inputs, self.given), gradient)

    def attach(self) -> list[torch.utils.hooks.RemovableHandle]:
        """Puts the hooks on; what it returns takes them off."""
        handles = [self._model.register_forward_pre_hook(self._on_call, with_kwargs=True)]
        for number, layer in enumerate(self._layers):
            hook = self._hook(layer, self._number * _PLACE + number)
            handles.append(layer.module.register_forward_hook(hook, with_kwargs=True))
        return handles

    def _on_call(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        named = [kwargs[name] for name in ("input_ids", "inputs_embeds") if isinstance(kwargs.get(name), Tensor)]
        for value in (*named, *args, *kwargs.values()):
            if isinstance(value, Tensor) and value.dim() > 0:
                self._given = (value.shape[0], value.shape[1] if value.dim() > 1 else 1)
                return

    def _hook(self, layer: Layer, place: int) -> Callable:
        def on_forward(module: nn.Module, args: tuple, kwargs: dict[str, Any], returned: Any) -> Any:
            output = returned if layer.output is None else returned[layer.output]
            if not isinstance(output, Tensor) or not output.requires_grad or not torch.is_grad_enabled():
                return None
            inputs = _inputs_of(layer, args, kwargs, output)
            if inputs is None:
                return None
            changed = None
            if layer.kind is Kind.EMBEDDING:
                x, output = _for_each_row(inputs[0], output, self._given)
                inputs, changed = (x,), output
            if torch.compiler.is_compiling():
                return _tapped(returned if changed is None else changed, inputs, place)
            kept = Kept(inputs, self.given)
            output.register_hook(lambda gradient: self._take(layer, kept, gradient))
            return changed

        return on_forward


def _tapped(returned: Any, inputs: Sequence[Tensor], place: int) -> Any:
    """What a layer returns, through the identity: of a tuple, all that have gradients."""
    whole = (returned,) if isinstance(returned, Tensor) else tuple(returned)
    outputs = differentiable(whole)
    tapped = iter(_Tap.apply(place, len(outputs), *outputs, *inputs))
    found = tuple(next(tapped) if any(result is output for output in outputs) else result for result in whole)
    return found[0] if isinstance(returned, Tensor) else found


def _inputs_of(layer: Layer, args: tuple, kwargs: Mapping[str, Any], output: Tensor) -> Sequence[Tensor] | None:
    """What is kept of a layer's call."""
    if layer.experts is not None:
        return layer.experts.routed(args, kwargs)
    if layer.input_of is not None:
        return (layer.input_of(args, kwargs, output),)
    x = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
    return None if x is None else (x,)


def _for_each_row(ids: Tensor, output: Tensor, given: tuple[int, int] | None) -> tuple[Tensor, Tensor]:
    """Positions that all rows share, ``[T]`` or ``[1, T]``, once for each row: a view, whose gradient comes by row.

    Adding the rows up, which broadcasting would have done where the positions are used, is then done here.
    """
    if given is None or given[0] == 1 or ids.shape not in ((given[1],), (1, given[1])):
        return ids, output
    if ids.dim() == 1 and given[1] in (1, given[0]):
        return ids, output  # a place for each row, perhaps
    return ids.expand(given), output.expand(*given, output.shape[-1])

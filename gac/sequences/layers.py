"""Which layers of a model are seen, and where the sketch of each parameter's gradient lies."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from gac.observe.module_names import group_parameters
from gac.sequences.experts import Experts, experts_of
from gac.sequences.magnitudes import InputOf, magnitudes_of
from gac.sequences.normalization import Normalize, normalization_of
from gac.sequences.routers import router_of
from gac.sequences.supported import WRAPPER, whole_shapes


class Kind(Enum):
    """What a layer does, as far as its gradient is concerned."""

    LINEAR = "linear"
    EMBEDDING = "embedding"
    NORM = "norm"
    EXPERTS = "experts"


@dataclass(eq=False)
class Slot:
    """The sketch of one parameter's gradient: a stretch of each sequence's row of numbers.

    Attributes:
        name: of the parameter.
        shape: ``(P, Q)`` of a matrix, with the weight's outputs (or an embedding's places) on the left; ``(m,)`` of a
            vector.
        dims: what is sketched: ``(p, q)`` (``q`` with the bias), or ``(d,)``.
        module: index of its module's label.
        number: of its signs. inputs: of those of its inputs, and shares: whether another slot has them too.
        offset: of its first number in a row.
        column: name of the bias that is the last column.
        turned: whether the parameter has the weight's inputs on the left.
    """

    name: str
    shape: tuple[int, ...]
    dims: tuple[int, ...]
    module: int
    number: int = 0
    inputs: int = 0
    shares: bool = False
    offset: int = 0
    column: str | None = None
    turned: bool = False

    @property
    def size(self) -> int:
        """Numbers that it takes."""
        return self.shape[0] * (self.shape[1] if len(self.shape) > 1 else 1)


@dataclass(eq=False)
class Layer:
    """A module that is seen.

    Attributes:
        name: of it. module: itself. kind: of it.
        weight: where its weight's gradient goes. ones: whether that has the column of its bias.
        bias: where its bias's gradient goes by itself.
        normalize: of a norm.
        input_of: what stands for the layer's input; None where that is its first argument.
        output: place of its output in what it returns; None where that is all.
        padding: place of an embedding that gets no gradient.
        experts: of a module of these. parts: its projections, up and down, whose weights are seen by it.
    """

    name: str
    module: nn.Module
    kind: Kind
    weight: Slot | None = None
    ones: bool = False
    bias: Slot | None = None
    normalize: Normalize | None = None
    input_of: InputOf | None = None
    output: int | None = None
    padding: int | None = None
    experts: Experts | None = None
    parts: tuple[Layer, ...] = ()

    @property
    def slots(self) -> list[Slot]:
        """Those that it adds to."""
        own = [slot for slot in (self.weight, self.bias) if slot is not None]
        return own + [slot for part in self.parts for slot in part.slots]


@dataclass
class Layers:
    """What is seen of a model, and what is not.

    Attributes:
        seen: its layers.
        slots: one for each parameter (a bias may share its weight's), those of one module side by side.
        labels: of modules. segments: the stretch of each in a row.
        unseen: names of trainable parameters that no layer sees.
        share: of the trainable elements that are seen.
        elements: of each trainable parameter.
    """

    seen: list[Layer]
    slots: list[Slot]
    labels: list[str]
    segments: list[tuple[int, int]] = field(default_factory=list)
    unseen: list[str] = field(default_factory=list)
    share: float = 1.0
    elements: dict[str, int] = field(default_factory=dict)

    def leave_out(self, slots: Sequence[Slot]) -> None:
        """These turned out not to be seen."""
        self.unseen += [name for slot in slots for name in (slot.name, slot.column) if name is not None]
        self.share = 1.0 - sum(self.elements[name] for name in self.unseen) / max(1, sum(self.elements.values()))

    @property
    def width(self) -> int:
        """Numbers of a row."""
        return sum(slot.size for slot in self.slots)


def find_layers(model: nn.Module, parameters: Sequence[tuple[str, nn.Parameter]], sketch_size: int) -> Layers:
    """The layers of ``model`` whose gradients follow from their input and the gradient of their output.

    Linear layers (``nn.Linear``, GPT-2's ``Conv1D``, routers), embeddings, and norms that scale elementwise, each with
    its bias, and modules of stacked experts, whose weights count as one matrix ``[E u, d]`` each. A parameter that
    several of them share has one slot, so that its uses add up; one that anything else has too is not seen.

    Args:
        parameters: the trainable ones, each once. sketch_size: rows and columns of a matrix's sketch.
    """
    labels, modules = group_parameters([name for name, _ in parameters])
    place = {id(p): (name, label) for (name, p), label in zip(parameters, modules, strict=True)}
    shapes = whole_shapes(model, parameters)
    uses, unseen, users = _uses(model, place, shapes)
    dims: dict[int, tuple[int, ...]] = {}
    columns: set[int] = set()
    for use in uses:
        use.layer.ones = use.bias is not None and len(use.dims) == 2 and use.may_share(users)
        if use.layer.ones:
            columns.add(id(use.bias))
        for p, own in use.own():
            if dims.setdefault(id(p), own) != own:
                unseen.add(id(p))  # once in this and once in that orientation
    turned = {id(use.weight) for use in uses if use.turned}
    slots: dict[int, Slot] = {}
    for key, own in dims.items():
        if key not in unseen:
            name, label = place[key]
            limit = sketch_size if len(own) == 2 else sketch_size**2
            slots[key] = Slot(name, tuple(min(limit, d) for d in own), own, label, turned=key in turned)
    for use in uses:
        use.layer.weight = slots.get(id(use.weight))
        use.layer.bias = None if use.layer.ones else slots.get(id(use.bias))
        if use.layer.ones and use.layer.weight is not None:
            use.layer.weight.column = place[id(use.bias)][0]
    seen = dict.fromkeys(use.owner or use.layer for use in uses if use.layer.slots)
    found = Layers(list(seen), _in_order(slots.values()), labels)
    found.segments = [_segment(found.slots, label) for label in range(len(labels))]
    found.unseen = [name for name, p in parameters if id(p) not in slots and id(p) not in columns]
    found.elements = {name: math.prod(shapes[id(p)]) for name, p in parameters}
    found.leave_out([])
    return found


def _in_order(slots: Iterable[Slot]) -> list[Slot]:
    """Those of one module side by side, numbered and given their places."""
    ordered, offset = sorted(slots, key=lambda slot: slot.module), 0
    for number, slot in enumerate(ordered):
        slot.number = slot.inputs = number
        slot.offset = offset
        offset += slot.size
    return ordered


def _segment(slots: Sequence[Slot], label: int) -> tuple[int, int]:
    own = [slot for slot in slots if slot.module == label]
    begin = own[0].offset if own else 0
    return begin, begin + sum(slot.size for slot in own)


@dataclass(eq=False)
class _Use:
    """A layer and its trainable parameters; ``dims`` of the weight, or of the vectors of a norm.

    ``turned`` as of :class:`Slot`; ``owner`` is the layer that it is a part of.
    """

    layer: Layer
    weight: nn.Parameter | None
    bias: nn.Parameter | None
    dims: tuple[int, ...]
    turned: bool = False
    owner: Layer | None = None

    def may_share(self, users: Mapping[int, int]) -> bool:
        """Whether the bias may be a column of the weight: nobody else has either."""
        return self.weight is not None and users[id(self.weight)] == users[id(self.bias)] == 1

    def own(self) -> list[tuple[nn.Parameter, tuple[int, ...]]]:
        """Parameters that need a slot, with what is sketched of them."""
        found = []
        if self.weight is not None:
            dims = self.dims if not self.layer.ones else (self.dims[0], self.dims[1] + 1)
            found.append((self.weight, dims))
        if self.bias is not None and not self.layer.ones:
            found.append((self.bias, self.dims[:1]))
        return found


def _uses(
    model: nn.Module, place: Mapping[int, object], shapes: Mapping[int, torch.Size]
) -> tuple[list[_Use], set[int], dict[int, int]]:
    """Layers with trainable parameters; parameters that others have; and how many modules have each."""
    uses: list[_Use] = []
    unseen: set[int] = set()
    users = dict.fromkeys(place, 0)
    for name, module in model.named_modules():
        own = {key: p for key, p in module._parameters.items() if p is not None and id(p) in place}
        for p in own.values():
            users[id(p)] += 1
        found = _uses_of(name.replace(WRAPPER, ""), module, own, shapes) if own else []
        uses += found
        if not found:
            unseen.update(map(id, own.values()))
    return uses, unseen, users


def _uses_of(
    name: str, module: nn.Module, own: dict[str, nn.Parameter], shapes: Mapping[int, torch.Size]
) -> list[_Use]:
    """Of a module; a bias of experts whose weight is frozen is not seen."""
    experts = experts_of(module)
    if experts is None:
        use = _use(name, module, own, shapes)
        return [] if use is None else [use]
    parts = tuple(Layer(f"{name}.{part}", module, Kind.LINEAR) for part in (experts.up, experts.down))
    owner = Layer(name, module, Kind.EXPERTS, experts=experts, parts=parts)
    found = []
    for part, key in zip(parts, (experts.up, experts.down), strict=True):
        weight: Any = module._parameters[key]
        count, *sides = shapes.get(id(weight), weight.shape)
        tall, wide = reversed(sides) if experts.turned else sides
        bias = own.get(f"{key}_bias") if key in own else None
        found.append(_Use(part, own.get(key), bias, (count * tall, wide), experts.turned, owner))
    return found


def _use(name: str, module: Any, own: dict[str, nn.Parameter], shapes: Mapping[int, torch.Size]) -> _Use | None:
    if set(own) - {"weight", "bias"}:
        return None
    weight, bias = own.get("weight"), own.get("bias")
    forward = type(module).forward
    if isinstance(module, nn.Embedding):
        if forward is not nn.Embedding.forward or module.scale_grad_by_freq:
            return None
        dims = (module.num_embeddings, module.embedding_dim)
        return _Use(Layer(name, module, Kind.EMBEDDING, padding=module.padding_idx), weight, bias, dims)
    if isinstance(module, nn.Linear):
        if forward is not nn.Linear.forward:
            return None
        return _Use(Layer(name, module, Kind.LINEAR), weight, bias, (module.out_features, module.in_features))
    if type(module).__name__ == "Conv1D" and isinstance(getattr(module, "nf", None), int) and hasattr(module, "nx"):
        return _Use(Layer(name, module, Kind.LINEAR), weight, bias, (module.nf, module.nx), turned=True)
    held = getattr(module, "weight", None)
    if not isinstance(held, Tensor):
        return None
    shape = shapes.get(id(held), held.shape)
    if len(shape) == 2:
        router = router_of(module, shape)
        layer = None if router is None else Layer(name, module, Kind.LINEAR, output=router.output)
        return None if layer is None else _Use(layer, weight, bias, tuple(shape))
    input_of = magnitudes_of(module, shape)
    normalize = normalization_of(module, shapes) if input_of is None else Tensor.float
    if normalize is None:
        return None
    return _Use(Layer(name, module, Kind.NORM, normalize=normalize, input_of=input_of), weight, bias, tuple(shape))

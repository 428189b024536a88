"""Sorts a model's parameters into modules by their names.

A transformer layer is two modules, ``attention`` and ``mlp``; a norm belongs to the one it serves. Its few parameters
scale that module's input (or output), and rows of their own would triple the length of a table that is read for which
block disagrees. Embeddings, the final norm and the head are modules of their own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import zip_longest

_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
_TRUNKS = frozenset({"module", "base_model", "model", "transformer", "backbone"})
_ATTENTION = re.compile(r"attn|attention|^[qkvo]_proj$|^(query_key_value|qkv)$", re.IGNORECASE)
_MLP = re.compile(
    r"mlp|ffn|feed_?forward|densereludense|moe|experts"
    r"|^(fc\d|linear\d|intermediate|output|router|(gate|up|down)_proj)$",
    re.IGNORECASE,
)
_NORM = re.compile(r"norm|^ln(_|\d|$)", re.IGNORECASE)
_SECOND_NORM = re.compile(r"(pre|post)_?(ff|feed)|mlp|ffn|final|output|after|[2-9]$", re.IGNORECASE)
_EMBEDDING = re.compile(r"embed|^(wte|wpe|shared)$", re.IGNORECASE)
_HEAD = re.compile(r"^(embed_out|output|score|classifier|cls|qa_outputs|.*head)$", re.IGNORECASE)

Path = tuple[str, ...]


def group_parameters(names: Sequence[str]) -> tuple[list[str], list[int]]:
    """Sorts parameters into modules by their names.

    Knows how Hugging Face models name the parts of a layer, and looks through the wrappers of DDP, FSDP,
    ``torch.compile`` and PEFT. The parameters of a model without attention layers are grouped by the first components
    of their names: up to a layer's index where there is one, else the first two. Never fails.

    Args:
        names: parameter names, as of ``model.named_parameters()``.

    Returns:
        The modules' labels in the order in which they first occur (``embedding``, ``layers.0.attention``,
        ``layers.0.mlp``, ..., ``norm``, ``head``), and for every name the index of its label.
    """
    paths = [_unwrapped(name) for name in names]
    stacks = _stacks(paths)
    layers = _layers(paths, stacks)
    labels = [_label(path, stacks, layers) for path in paths]
    order = {label: index for index, label in enumerate(dict.fromkeys(labels))}
    return list(order), [order[label] for label in labels]


def _unwrapped(name: str) -> Path:
    """The modules on the way to a parameter, without wrappers; the parameter's own name only if it has no module."""
    path = [part for part in name.split(".") if part not in _WRAPPERS]
    while len(path) > 1 and path[0] in _TRUNKS:
        del path[0]
    return tuple(path[:-1] or path)


def _index_at(path: Path) -> int | None:
    """Position of the first index in a path."""
    return next((i for i, part in enumerate(path) if part.isdigit()), None)


def _inside(path: Path, at: int) -> list[str]:
    """What follows a layer's index, without the inner lists of T5 (``layer.1``)."""
    return [part for part in path[at + 1 :] if not part.isdigit() and part != "layer"]


def _kind(part: str) -> str | None:
    """What a component of a name inside a layer stands for: ``attention``, ``mlp``, ``norm`` or something else."""
    if _NORM.search(part):
        return "norm"
    if _ATTENTION.search(part):
        return "attention"
    return "mlp" if _MLP.search(part) else None


def _stacks(paths: Sequence[Path]) -> dict[Path, str]:
    """The lists of layers with attention, and what the labels of their layers begin with.

    That is ``layers`` where the model has one such list; several (of an encoder and a decoder) are told apart by the
    first component in which their paths differ.
    """
    found: dict[Path, str] = {}
    for path in paths:
        at = _index_at(path)
        if at and any(_kind(part) == "attention" for part in _inside(path, at)[:1]):
            found[path[:at]] = "layers"
    stacks = list(found)
    if len(stacks) > 1:
        differ = next(i for i, parts in enumerate(zip_longest(*stacks)) if len(set(parts)) > 1)
        unique = len({stack[differ : differ + 1] for stack in stacks}) == len(stacks)
        for stack in stacks:
            name = ".".join(stack[differ : differ + 1] if unique else stack) or ".".join(stack)
            found[stack] = name if name.endswith(stack[-1]) else f"{name}.layers"
    return found


def _layers(paths: Sequence[Path], stacks: Mapping[Path, str]) -> dict[Path, tuple[list[str], bool]]:
    """For every layer (and inner list of T5): its blocks, the MLP last, and whether norms of an MLP say so."""
    found: dict[Path, tuple[list[str], bool]] = {}
    for path in paths:
        at = _index_at(path)
        inside = _inside(path, at) if at is not None and path[:at] in stacks else []
        for layer in (path[: at + 1], path[: at + 3]) if inside else ():
            blocks, explicit = found.get(layer, ([], False))
            kind = _kind(inside[0]) or inside[0]
            if kind == "norm":
                explicit |= re.search("(pre|post)_?(ff|feed)", inside[0]) is not None
            else:
                blocks = sorted({*blocks, kind}, key=lambda block: (block == "mlp", block != "attention", block))
            found[layer] = (blocks, explicit)
    return found


def _label(path: Path, stacks: Mapping[Path, str], layers: Mapping[Path, tuple[list[str], bool]]) -> str:
    at = _index_at(path)
    if at is not None and path[:at] in stacks:
        block = _block(path, at, layers)
        return ".".join([stacks[path[:at]], path[at], *([block] if block else [])])
    if at is None and stacks:
        prefix = next((name for s in stacks.values() if (name := s.removesuffix(".layers")) in path), "")
        # the head first: GPT-NeoX calls it embed_out
        for pattern, label in ((_HEAD, "head"), (_EMBEDDING, "embedding"), (_NORM, "norm")):
            if any(pattern.search(part) for part in path):
                return f"{prefix}.{label}" if prefix else label
    return ".".join(path[: 2 if at is None else at + 1])


def _block(path: Path, at: int, layers: Mapping[Path, tuple[list[str], bool]]) -> str:
    """``attention``, ``mlp``, the component's own name where it is neither, or nothing."""
    inside = _inside(path, at)
    if not inside:
        return ""
    kind = _kind(inside[0])
    blocks, explicit = layers[path[: at + 1]]
    if kind != "norm" or not blocks:
        return kind or inside[0]
    beside = layers[path[: at + 3]][0] if path[at + 1] == "layer" else []
    if beside:
        return beside[0]
    # Llama's post_attention norm feeds the MLP; Gemma's, beside one that is named for the MLP, ends the attention
    second = _SECOND_NORM.search(inside[0]) or ("post_attention" in inside[0] and not explicit)
    return blocks[-1 if second else 0]


def some(names: Sequence[str]) -> str:
    """The first names, for an error's text."""
    listed = ", ".join(map(repr, names[:3]))
    return f"{listed} and {len(names) - 3} more" if len(names) > 3 else listed

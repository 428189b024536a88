"""What of sources and single demonstrations goes into a mixer's state, and comes back."""

from __future__ import annotations

import itertools
import math
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from gac.sequences.alignment import Alignments
from gac.sequences.sources import StepOfSources
from gac.state import Anything, Flag, ListOf, Numbers, Range, Table, Whole
from gac.statistics.branch import Branch

_ANY = Range(-math.inf, math.inf, unknown=True)
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Place:
    """Whose history it is: that of ``rank`` of ``ranks``; ``shared``: sources are sums over all of them."""

    rank: int
    ranks: int
    shared: bool


def state_of(history: Iterable[StepOfSources], alignments: Alignments, place: Place) -> dict[str, Any]:
    """Tensors, numbers and labels. Steps in a row that have the same sources lie together."""
    blocks = []
    for sources, of_them in itertools.groupby(history, key=lambda step: step.sources):
        steps = list(of_them)
        blocks.append(
            {
                "labels": [label for label, _ in sources],
                "branches": [list(Branch).index(branch) for _, branch in sources],
                "gram": torch.stack([step.gram for step in steps]).cpu(),
                "numbers": torch.stack([step.numbers for step in steps]).cpu(),
            }
        )
    index, sums = alignments.state()
    demonstrations = {"index": index, "sums": sums}
    place_now = {"rank": place.rank, "ranks": place.ranks, "shared": place.shared}
    return {**place_now, "sources": blocks, "demonstrations": demonstrations}


def history_of(state: dict[str, Any], device: torch.device) -> list[StepOfSources]:
    """The steps of a state that :class:`SequencesEntry` has read."""
    found = []
    for block in state["sources"]:
        sources = tuple(zip(block["labels"], [list(Branch)[k] for k in block["branches"]], strict=True))
        for gram, numbers in zip(block["gram"].to(device), block["numbers"].to(device), strict=True):
            found.append(StepOfSources(sources, gram, numbers))
    return found


class SequencesEntry:
    """The entry (:class:`gac.state.Entry`) of what :func:`state_of` gives.

    Args:
        dtype: of sums of squares.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype

    def read(self, value: Any, at: str) -> dict[str, Any]:
        whole = Whole(-(2**53))
        demonstrations = Table({"index": ListOf(whole), "sums": Numbers((None, 3), torch.float64, _CPU, Range())})
        place: dict[str, Any] = {"rank": Whole(), "ranks": Whole(1), "shared": Flag()}
        table = Table({**place, "sources": ListOf(_Block(self._dtype)), "demonstrations": demonstrations})
        found = table.read(value, at)
        index, sums = found["demonstrations"]["index"], found["demonstrations"]["sums"]
        if len(index) != len(sums) or len(set(index)) != len(index):
            raise ValueError(
                f'{at}["demonstrations"] must have three sums for each number of a demonstration, each number '
                f"once, got {len(index)} numbers and sums {tuple(sums.shape)}"
            )
        return found


class _Block:
    """Steps that have the same sources."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype

    def read(self, value: Any, at: str) -> dict[str, Any]:
        named = Table(
            {"labels": ListOf(_Label()), "branches": ListOf(Whole(0, 1)), "gram": Anything(), "numbers": Anything()}
        )
        found = named.read(value, at)
        count = len(found["labels"])
        sources = list(zip(found["labels"], found["branches"], strict=False))
        if len(found["branches"]) != count or len(set(sources)) != count:
            raise ValueError(
                f'{at}["branches"] must have a branch for each of the {count} labels, no pair twice, got '
                f"{found['branches']}"
            )
        shapes = {"gram": (None, count + 2, count + 2), "numbers": (None, 2, count + 2)}
        for name, shape in shapes.items():
            found[name] = Numbers(shape, self._dtype, _CPU, _ANY).read(found[name], f'{at}["{name}"]')
        if len(found["gram"]) != len(found["numbers"]):
            raise ValueError(f'{at}["gram"] and {at}["numbers"] must have as many steps, got '
                             f"{len(found['gram'])} and {len(found['numbers'])}")  # fmt: skip
        return found


class _Label:
    """What names a source."""

    def read(self, value: Any, at: str) -> Hashable:
        try:
            hash(value)
        except TypeError:
            raise TypeError(f"{at} must be a label, which can be hashed, got {type(value).__name__}") from None
        return value

"""What a saved state may hold, as data, and :func:`read`, which holds a state against it before anything is taken.

A state comes out of a file, from another version, another run or another program. Whoever keeps one describes it with
the entries below; a description reads a value as a whole and gives it back as it is to be kept, in copies on their
devices, so that what remains is to assign them.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

MAX = sys.float_info.max
"""The largest finite number: the bound of what must be finite and nothing else."""

_EXACT = 2**53
"""Up to here every whole number is a float64."""

_REAL = (torch.float32, torch.float64)
_PLAIN = (Tensor, nn.Parameter)

Bound = float | tuple
"""A number, or nested tuples of them that fit the tensor's shape."""


class Entry(Protocol):
    """One thing that a state holds."""

    def read(self, value: Any, at: str) -> Any:
        """``value`` as it is to be kept.

        Args:
            value: what the state holds.
            at: where, for errors.

        Raises:
            TypeError: it is of another kind. ValueError: it is of the kind, and cannot be.
        """


def read(value: Any, entry: Entry, *, at: str = "state_dict", then: str) -> Any:
    """The value of a whole state, once all of it is as ``entry`` says.

    Args:
        value: what was saved.
        entry: what it may be.
        at: the name of it in errors.
        then: what to do about a wrong one.

    Raises:
        TypeError, ValueError: they name the place within the state, what is there and what may be, and end in ``then``.
    """
    try:
        return entry.read(value, at)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{error}; {then}") from None


@dataclass(frozen=True)
class Range:
    """Which numbers a tensor may hold.

    Attributes:
        low, high: bounds, both allowed; finite numbers alone unless a bound is infinite.
        unknown: whether NaN stands for what is not known yet.
        whole: whether they count something.
    """

    low: Bound = -MAX
    high: Bound = MAX
    unknown: bool = False
    whole: bool = False

    def check(self, values: Tensor, at: str) -> None:
        """Raises ValueError that names the first of the ``values`` (on the CPU) which may not be."""
        values = values.double()
        low, high = (torch.tensor(bound, dtype=torch.float64).expand_as(values) for bound in (self.low, self.high))
        wrong = ~((values >= low) & (values <= high))
        if self.whole:
            wrong |= values != values.floor()
        if self.unknown:
            wrong &= ~values.isnan()
        if wrong.any():
            first = tuple(wrong.nonzero()[0].tolist())
            place = f"{at}[{', '.join(map(str, first))}]" if first else at
            raise ValueError(f"{place} must be {self._words(low[first], high[first])}, got {values[first].item():g}")

    def _words(self, low: Tensor, high: Tensor) -> str:
        kind = "whole number" if self.whole else "number"
        text = f"a finite {kind}" if low > -math.inf and high < math.inf else f"a {kind}"
        if low > -MAX:
            text = f"a {kind} in [{low:g}, {high:g}]" if high < MAX else f"{text} from {low:g} on"
        return text + (", or NaN where it is not known" if self.unknown else "")


@dataclass(frozen=True)
class Numbers:
    """A dense tensor of real numbers.

    Attributes:
        shape: of it; None for a size that may be any.
        dtype, device: of what is kept. float32 and float64 become it, and no other.
        range: of its numbers.
    """

    shape: tuple[int | None, ...]
    dtype: torch.dtype
    device: torch.device
    range: Range

    def read(self, value: Any, at: str) -> Tensor:
        if type(value) not in _PLAIN:
            raise TypeError(f"{at} must be a tensor, got {_told(value)}")
        if value.dtype not in (*_REAL, self.dtype):
            raise TypeError(f"{at} must be a tensor of real numbers ({self.dtype}), got {value.dtype}")
        if value.layout is not torch.strided or value.is_meta or value.is_nested:
            raise ValueError(f"{at} must be a dense tensor, got one of {value.layout} on {value.device}")
        shape = tuple(value.shape)
        if len(shape) != len(self.shape) or any(own not in (None, n) for own, n in zip(self.shape, shape, strict=True)):
            wanted = str(self.shape).replace("None", "any")
            raise ValueError(f"{at} must have the shape {wanted}, got {shape}")
        kept = value.detach().to("cpu", self.dtype, copy=True)
        self.range.check(kept, at)
        return kept.to(self.device)


@dataclass(frozen=True)
class Whole:
    """A Python int in ``[low, high]``; bool is none."""

    low: int = 0
    high: int = _EXACT

    def read(self, value: Any, at: str) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{at} must be an int, got {_told(value)}")
        if not self.low <= value <= self.high:
            upper = f"to {self.high}" if self.high < _EXACT else "on"
            raise ValueError(f"{at} must be a whole number from {self.low} {upper}, got {_told(value)}")
        return int(value)


@dataclass(frozen=True)
class Flag:
    """True or False."""

    def read(self, value: Any, at: str) -> bool:
        if not isinstance(value, bool):
            raise TypeError(f"{at} must be True or False, got {_told(value)}")
        return value


@dataclass(frozen=True)
class Text:
    """Any text."""

    def read(self, value: Any, at: str) -> str:
        if not isinstance(value, str):
            raise TypeError(f"{at} must be a text, got {_told(value)}")
        return value


@dataclass(frozen=True)
class Same:
    """A text that is known beforehand.

    Attributes:
        value: it.
        otherwise: what another one means, with ``{got!r}`` for it.
    """

    value: str
    otherwise: str

    def read(self, value: Any, at: str) -> str:
        if not isinstance(value, str):
            raise TypeError(f"{at} must be {self.value!r}, got {_told(value)}")
        if value != self.value:
            raise ValueError(f"{at}: {self.otherwise.format(got=value)}")
        return self.value


@dataclass(frozen=True)
class ListOf:
    """A list (or tuple) whose items are all alike.

    Attributes:
        item: each of them.
        length: how many; None for any number.
    """

    item: Entry
    length: int | None = None

    def read(self, value: Any, at: str) -> list:
        if not isinstance(value, (list, tuple)):
            raise TypeError(f"{at} must be a list, got {_told(value)}")
        if self.length not in (None, len(value)):
            raise ValueError(f"{at} must have {self.length} items, got {len(value)}")
        return [self.item.read(item, f"{at}[{k}]") for k, item in enumerate(value)]


@dataclass(frozen=True)
class Table:
    """A dictionary with given names, no more and no fewer.

    Attributes:
        entries: by name, in the order in which they are read.
        together: groups of names that may be absent, each as a whole.
        misfit: what wrong names may come from.
    """

    entries: Mapping[str, Entry]
    together: Sequence[frozenset[str]] = ()
    misfit: str = ""

    def read(self, value: Any, at: str) -> dict[str, Any]:
        if not isinstance(value, Mapping):
            raise TypeError(f"{at} must be a dictionary, got {_told(value)}")
        absent = [group for group in self.together if group.isdisjoint(value)]
        wanted = [name for name in self.entries if not any(name in group for group in absent)]
        for text, names in (("lacks", set(wanted) - set(value)), ("has no place for", set(value) - set(wanted))):
            if names:
                why = f": {self.misfit}" if self.misfit else ""
                raise ValueError(f"{at} {text} {', '.join(sorted(map(str, names)))}{why}")
        return {name: self.entries[name].read(value[name], f'{at}["{name}"]') for name in wanted}


@dataclass(frozen=True)
class Anything:
    """Whatever it is."""

    def read(self, value: Any, at: str) -> Any:
        return value


@dataclass(frozen=True)
class Maybe:
    """What ``entry`` says, or None."""

    entry: Entry

    def read(self, value: Any, at: str) -> Any:
        return None if value is None else self.entry.read(value, at)


@dataclass(frozen=True)
class Unchanged:
    """What ``entry`` says, given back as it was saved: for whoever reads it again with more knowledge."""

    entry: Entry

    def read(self, value: Any, at: str) -> Any:
        self.entry.read(value, at)
        return value


def like(state: Mapping[str, Tensor], ranges: Mapping[str, Range]) -> dict[str, Numbers]:
    """Entries for tensors such as ``state`` has now: their names, shapes, dtypes and devices, with these ranges."""
    return {name: Numbers(tuple(x.shape), x.dtype, x.device, ranges[name]) for name, x in state.items()}


def _told(value: Any) -> str:
    """A value in an error: short, and with its kind."""
    kind = type(value).__name__
    if isinstance(value, int) and value.bit_length() > 64:
        return f"one of {value.bit_length()} bits ({kind})"
    return f"{value!r:.80} ({kind})" if isinstance(value, (str, int, float, complex)) else kind

"""Which tokens belong to which sequence."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Chosen:
    """Some tokens of each sequence, end to end.

    Attributes:
        bounds: ``[B + 1]`` int64. tokens: of all sequences. longest: no sequence has more.
    """

    bounds: Tensor
    tokens: int
    longest: int


@dataclass(frozen=True)
class Given:
    """What a model was last called with: the first two sizes of its ids or embeddings.

    ``chosen`` are the tokens that some of its layers get, as they were told; None.
    """

    rows: int
    tokens: int
    chosen: Chosen | None = None


@dataclass(frozen=True, eq=False)
class Rows:
    """The sequences of some backward passes, as they were told.

    Attributes:
        count: of them, ``B``.
        is_expert: ``[B]`` bool.
        groups: ``[B]`` int64: rows of a branch with one number are one contribution; negative ones stand alone. None.
        tokens: ``[B]``, what each row counts for; None where all count alike.
        sources: a label for each row; None. index: a number of each row's data; None.
        bounds: ``[B + 1]`` int64, the tokens of packed sequences; None where a batch has a row for each.
        longest: tokens of the longest packed sequence, where the host knows.
        last: where the last packed sequence ends, where the host knows.
        on_host: ``is_expert``, where ``index`` is told.
    """

    count: int
    is_expert: Tensor
    groups: Tensor | None = None
    tokens: Tensor | None = None
    sources: Sequence[Any] | None = None
    index: Sequence[int] | None = None
    bounds: Tensor | None = None
    longest: int | None = None
    last: int | None = None
    on_host: list[bool] | None = None


def rows_of(
    is_expert: Any,
    device: torch.device,
    *,
    groups: Any = None,
    tokens: Any = None,
    sources: Any = None,
    index: Any = None,
    lengths: Any = None,
    cu_seqlens: Any = None,
    position_ids: Any = None,
) -> Rows:
    """What :meth:`gac.Mixer.batch` was told, checked and on ``device``. With ``index`` the host reads ``is_expert``.

    Raises:
        TypeError, ValueError: with the argument's name, what it was and what it must be.
    """
    expert = _vector(is_expert, "is_expert", None)
    if expert.dtype != torch.bool:
        raise TypeError(f"is_expert must be bool, True for demonstrations, got {expert.dtype}")
    count = len(expert)
    grouped = None if groups is None else _vector(groups, "groups", count)
    if grouped is not None and (grouped.is_floating_point() or grouped.dtype == torch.bool):
        raise TypeError(f"groups must be whole numbers, a number for each group, got {grouped.dtype}")
    counted = None if tokens is None else _vector(tokens, "tokens", count)
    if counted is not None and counted.device.type == "cpu" and not bool((counted >= 0).all()):
        raise ValueError(f"tokens must be finite and not negative, got {counted.tolist()}")
    for name, labels in (("sources", sources), ("index", index)):
        if labels is not None and (isinstance(labels, str) or len(labels) != count):
            raise ValueError(f"{name} must have an entry for each of the {count} rows of is_expert, got {labels!r}")
    if index is not None:
        index = [int(k) for k in (index.tolist() if isinstance(index, Tensor) else index)]
    if sources is not None:
        sources = sources.tolist() if isinstance(sources, Tensor) else list(sources)
    bounds, longest, last = _bounds(lengths, cu_seqlens, position_ids, count)

    def move(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        return None if tensor is None else tensor.to(device, dtype, non_blocking=True)

    return Rows(
        count,
        expert.to(device, non_blocking=True),
        move(grouped, torch.int64),
        move(counted, torch.float64 if device.type != "mps" else torch.float32),
        sources,
        index,
        move(bounds, torch.int64),
        longest,
        last,
        None if index is None else expert.tolist(),
    )


def chosen_of(lengths: Any, device: torch.device) -> Chosen:
    """What :meth:`gac.Mixer.selected` was told, on ``device``. The host reads lengths.

    Raises:
        TypeError, ValueError: with the argument's name, what it was and what it must be.
    """
    found = _vector(lengths, "lengths", None)
    if found.is_floating_point() or found.dtype == torch.bool:
        raise TypeError(f"lengths must be whole numbers, the chosen tokens of each sequence, got {found.dtype}")
    numbers = found.tolist()
    if any(length < 0 for length in numbers):
        raise ValueError(f"lengths of the chosen tokens must not be negative, got {numbers}")
    bounds = torch.nn.functional.pad(found.to(torch.int64).cumsum(0), (1, 0))
    return Chosen(bounds.to(device, non_blocking=True), sum(numbers), max(numbers, default=0))


def _vector(value: Any, name: str, length: int | None) -> Tensor:
    if not isinstance(value, Tensor):
        try:
            value = torch.as_tensor(value)
        except (TypeError, ValueError, RuntimeError):
            raise TypeError(f"{name} must be a tensor with a number for each row, got {type(value).__name__}") from None
    if value.dim() != 1 or (length is not None and len(value) != length):
        wanted = "[B]" if length is None else f"[{length}], as is_expert has"
        raise ValueError(f"{name} must have shape {wanted}, got {tuple(value.shape)}")
    return value.detach()


def _bounds(
    lengths: Any, cu_seqlens: Any, position_ids: Any, count: int
) -> tuple[Tensor | None, int | None, int | None]:
    given = {"lengths": lengths, "cu_seqlens": cu_seqlens, "position_ids": position_ids}
    told = [name for name, value in given.items() if value is not None]
    if len(told) > 1:
        raise ValueError(f"{' and '.join(told)} say the same: pass one of them")
    if not told:
        return None, None, None
    if lengths is not None:
        lengths = _vector(lengths, "lengths", count)
        bounds = torch.nn.functional.pad(lengths.to(torch.int64).cumsum(0), (1, 0))
    elif cu_seqlens is not None:
        bounds = _vector(cu_seqlens, "cu_seqlens", count + 1).to(torch.int64)
    else:
        bounds = _restarts(position_ids, count)
    if bounds.device.type != "cpu":
        return bounds, None, None
    steps = bounds.diff()
    if bool((steps < 0).any()) or (count and int(bounds[0]) < 0):
        raise ValueError(f"lengths of packed sequences must not be negative, got {steps.tolist()}")
    return bounds, int(steps.max()) if count else 0, int(bounds[-1])


def _restarts(position_ids: Any, count: int) -> Tensor:
    """``[count + 1]``: where positions of a packed row begin again at 0, and its end. No device is waited for."""
    positions = torch.as_tensor(position_ids).detach()
    if positions.is_floating_point() or positions.dtype == torch.bool:
        raise TypeError(f"position_ids must be whole numbers, got {positions.dtype}")
    if positions.dim() == 0 or positions.numel() != positions.shape[-1]:
        raise ValueError(f"position_ids must have shape [T] or [1, T], got {tuple(positions.shape)}")
    positions = positions.flatten()
    begins, end = positions == 0, len(positions)
    if positions.device.type == "cpu":
        found = begins.nonzero().flatten().tolist()
        padded = found[count:] == list(range(found[count], end)) if len(found) > count else True  # with zeros, behind
        if len(found) < count or not padded:
            raise ValueError(
                f"position_ids must begin again at 0 for each of the {count} rows of is_expert, and do so "
                f"{len(found)} times"
            )
    places = torch.where(begins, torch.arange(end, device=positions.device), end)
    return torch.nn.functional.pad(places.sort().values[:count], (0, 1), value=end)


class Found(NamedTuple):
    """The sequences of an activation's flattened tokens.

    Attributes:
        bounds: ``[B + 1]`` int64. longest: no sequence has more tokens.
        even: whether the tokens are theirs alone, and equally many of each.
    """

    bounds: Tensor
    longest: int
    even: bool


class Places:
    """Finds the sequence of each token of an activation, from its shape alone.

    Args:
        rows: of the passes under way.
    """

    def __init__(self, rows: Rows) -> None:
        self._rows = rows
        self._made: dict[tuple[int, torch.device], Tensor] = {}

    def find(self, shape: Sequence[int], given: Given | None, device: torch.device) -> Found | None:
        """The sequences of an activation; None where its shape does not tell them.

        Args:
            shape: of the activation, without its last dimension.
            given: what the model was called with.
        """
        found = self._find(shape, given, device)
        chosen = None if given is None else given.chosen
        if found is None and chosen is not None and math.prod(shape) == chosen.tokens:
            return Found(chosen.bounds.to(device, non_blocking=True), chosen.longest, False)
        return found

    def _find(self, shape: Sequence[int], given: Given | None, device: torch.device) -> Found | None:
        count, n = self._rows.count, math.prod(shape)
        if self._rows.bounds is not None:
            if given is not None and n != given.rows * given.tokens:
                return None
            last = self._rows.last
            if last is not None and last > n:
                raise ValueError(f"lengths add up to {last} tokens, and the model was called with {n}")
            longest = n if self._rows.longest is None else self._rows.longest
            return Found(self._packed(device).clamp(max=n), longest, False)
        if count == 1:
            return self._even(n, device)
        if len(shape) > 1 and shape[0] == count:
            return self._even(n // count, device)
        if len(shape) == 1 and n == count:
            return self._even(1, device)
        flat = given is not None and given.rows == count and n == given.rows * given.tokens
        if flat and (len(shape) == 1 or shape[0] == 1):
            return self._even(n // count, device)
        return None

    def _even(self, length: int, device: torch.device) -> Found:
        if (length, device) not in self._made:
            self._made[length, device] = torch.arange(self._rows.count + 1, device=device) * length
        return Found(self._made[length, device], length, True)

    def _packed(self, device: torch.device) -> Tensor:
        bounds = self._rows.bounds
        assert bounds is not None
        return bounds if bounds.device == device else bounds.to(device, non_blocking=True)

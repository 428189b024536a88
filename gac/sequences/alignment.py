"""How single demonstrations point, compared with the RL gradient of the steps they were seen in."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Alignment:
    """Cosines of demonstrations with the RL gradient.

    Attributes:
        index: the numbers of the demonstrations.
        cosine: ``[n]`` float64, the mean over the steps in which each was seen of the cosine between its gradient and
            the RL gradient of that step, both as observed: noise in either makes it smaller than that of their means.
        standard_error: ``[n]``, from its spread over steps; NaN below two of them.
        steps: ``[n]`` int64.
    """

    index: tuple[int, ...]
    cosine: Tensor
    standard_error: Tensor
    steps: Tensor


class Alignments:
    """Keeps what is known of each demonstration; numbers stay on the device until they are asked for."""

    def __init__(self) -> None:
        self._waiting: list[tuple[tuple[int, ...], Tensor]] = []
        self._sums: dict[int, list[float]] = {}  # count, sum, sum of squares

    def take(self, index: Sequence[int], rows: Tensor, rl: Tensor) -> None:
        """One step.

        Args:
            index: of its demonstrations. rows: ``[n, K]``, their sketches. rl: ``[K]``, that of the RL gradient.
        """
        cosine = (rows @ rl).double() / (rows.norm(dim=1).double() * rl.norm().double())
        self._waiting.append((tuple(index), cosine))
        if len(self._waiting) >= 512:
            self._settle()

    def _settle(self) -> None:
        waiting, self._waiting = self._waiting, []
        for index, cosine in waiting:
            for k, value in zip(index, cosine.tolist(), strict=True):
                if math.isfinite(value):
                    sums = self._sums.setdefault(k, [0.0, 0.0, 0.0])
                    for at, part in enumerate((1.0, value, value * value)):
                        sums[at] += part

    def state(self) -> tuple[list[int], Tensor]:
        """Numbers of all that were seen, and ``[n, 3]`` float64: count, sum and sum of squares of each."""
        self._settle()
        return list(self._sums), torch.tensor(list(self._sums.values()), dtype=torch.float64).reshape(-1, 3)

    def take_state(self, index: Sequence[int], sums: Tensor) -> None:
        """Continues where :meth:`state` left off."""
        self._waiting.clear()
        self._sums = dict(zip(index, sums.tolist(), strict=True))

    @staticmethod
    def together(others: Iterable[tuple[Sequence[int], Tensor]]) -> Alignments:
        """The sums of several :meth:`state`, in their order."""
        found = Alignments()
        for index, sums in others:
            for k, own in zip(index, sums.tolist(), strict=True):
                kept = found._sums.get(k, [0.0, 0.0, 0.0])
                found._sums[k] = [a + b for a, b in zip(kept, own, strict=True)]
        return found

    def of(self, index: Sequence[int] | None) -> Alignment:
        """Of some demonstrations, or of all that were seen, by number. Waits for the device."""
        self._settle()
        chosen = tuple(sorted(self._sums)) if index is None else tuple(int(k) for k in index)
        table = torch.tensor([self._sums.get(k, [0.0, 0.0, 0.0]) for k in chosen], dtype=torch.float64).reshape(-1, 3)
        count, total, squares = table.unbind(1)
        mean = torch.where(count >= 1, total / count, math.nan)
        variance = (squares - count * mean.square()).clamp(min=0.0) / (count - 1)
        error = torch.where(count >= 2, (variance / count).sqrt(), math.nan)
        return Alignment(chosen, mean, error, count.to(torch.int64))

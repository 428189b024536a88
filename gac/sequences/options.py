"""The options of ``estimator="sequence"``."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

SIZES = (8, 16, 32, 64)
"""Rows and columns that a layer's sketch may have."""


@dataclass(frozen=True, kw_only=True)
class SequenceOptions:
    """What the sketches of sequences are made of.

    Attributes:
        sketch_size: rows and columns of a layer's sketch, one of :data:`SIZES`. The error of a step's statistics falls
            as its inverse, its cost grows with it.
        seed: of the signs. None draws new signs in every step, so that their error averages out over steps; with a
            number they stay, and sketches of different steps may be compared.
        layer_share: the share of layers that a step looks at, drawn anew in every step among layers of one shape. Each
            counts as much more as it was drawn more seldom, so nothing is biased.
        sources: the labels that rows may carry (``mixer.batch(sources=...)``), the same on every rank: on several ranks
            their sums then add up over all of them, and ``mixer.sources()`` tells of all rows. None: any label; on
            several ranks, each tells of its own rows.

    Raises:
        TypeError, ValueError: with the option's name, what it was and what it may be.
    """

    sketch_size: int = 32
    seed: int | None = None
    layer_share: float = 1.0
    sources: Sequence[Hashable] | None = None

    def __post_init__(self) -> None:
        if self.sketch_size not in SIZES:
            raise ValueError(f"sketch_size must be one of {', '.join(map(str, SIZES))}, got {self.sketch_size!r}")
        if self.seed is not None and (isinstance(self.seed, bool) or not isinstance(self.seed, int)):
            raise TypeError(f"seed of sequences must be an int or None, got {self.seed!r}")
        share = self.layer_share
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share <= 1:
            raise ValueError(f"layer_share must be a number above 0 and at most 1, got {share!r}")
        if self.sources is not None:
            if isinstance(self.sources, str) or not isinstance(self.sources, Sequence) or not self.sources:
                raise TypeError(f"sources of sequences must be a list of labels, or None for any, got {self.sources!r}")
            if len(set(self.sources)) != len(self.sources):
                raise ValueError(f"sources of sequences must name each label once, got {list(self.sources)!r}")

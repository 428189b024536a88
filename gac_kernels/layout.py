"""The sketch's linear map, as numbers: which bucket and which sign an element gets.

A *region* is the stretch of buckets that belongs to one logical tensor (one parameter, say). Its elements are
cut into rows of ``lanes`` adjacent elements and ``rows_per_slab`` consecutive rows form a slab; the rows of a
slab are added lane by lane. Element ``j`` of region ``r`` therefore lands in bucket ::

    bucket_offsets[r] + (j // (lanes * rows_per_slab)) * lanes + j % lanes

with the sign given by bit ``j % 32`` of ``sign_word(seed, (index_offsets[r] + j) // 32)`` (1 means minus).
Nothing else enters, so every backend and launch configuration computes the same map, and the pieces of a
tensor may be sketched one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

LANES = 1024
"""Elements of one row. A region never has fewer buckets than ``min(numel, LANES)``."""

SKETCH_CHUNK_ROWS = (16, 256)
"""Fewest and most rows that one program of ``sketch`` adds up, unless the slab is shorter."""

SKETCH_WAVE = 1056
"""Programs of ``sketch`` that an H100 runs at once: 8 on each of 132 SMs. Others run other numbers; that chunks depend
on sizes alone is worth more than their last wave."""

_USUAL_ROWS = 64
"""Of a chunk, where a list has enough of them for a wave; longer lists grow their chunks ..."""

_USUAL_PROGRAMS = 4096
"""... beyond so many programs."""

SIGN_BITS = 32
"""Signs that one hash serves."""

CELL_LANES = 128
"""Lanes of one sum of squares of ``absorb_sketch_``."""

_MASK32 = 0xFFFFFFFF
_GOLDEN32 = 0x9E3779B9


def _finalize32(h: int) -> int:
    """The 32-bit avalanche step of MurmurHash3 (public domain, Austin Appleby)."""
    h ^= h >> 16
    h = (h * 0x85EBCA6B) & _MASK32
    h ^= h >> 13
    h = (h * 0xC2B2AE35) & _MASK32
    return h ^ (h >> 16)


def sign_key(seed: int, high_word: int) -> int:
    """The 32-bit key that ``sign_word`` xors into the low half of a word index; constant below 2**37 elements."""
    return _finalize32((seed & _MASK32) ^ _finalize32((high_word + _GOLDEN32) & _MASK32))


def sign_word(seed: int, word: int) -> int:
    """The signs of elements ``32*word .. 32*word + 31``; bit ``b`` set means element ``32*word + b`` is negated."""
    return _finalize32((word & _MASK32) ^ sign_key(seed, word >> 32))


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


@dataclass(frozen=True)
class SketchLayout:
    """Where every element of a list of logical tensors goes in the sketch. Immutable and hashable.

    Attributes:
        numels: elements of each region's logical tensor.
        rows_per_slab: rows of ``lanes`` elements that share their buckets; 1 keeps every element apart
            (the sketch is then a signed copy and loses nothing).
        seed: selects the family of signs.
        lanes: elements of one row; a multiple of 32.
    """

    numels: tuple[int, ...]
    rows_per_slab: int
    seed: int = 0
    lanes: int = LANES

    def __post_init__(self) -> None:
        if self.rows_per_slab < 1:
            raise ValueError(f"rows_per_slab must be at least 1, got {self.rows_per_slab}")
        if self.lanes < SIGN_BITS or self.lanes % SIGN_BITS:
            raise ValueError(f"lanes must be a positive multiple of {SIGN_BITS}, got {self.lanes}")
        if any(n < 0 for n in self.numels):
            raise ValueError(f"numels must not be negative, got {self.numels}")

    @classmethod
    def flat(cls, numel: int, size: int, *, seed: int = 0, lanes: int = LANES) -> SketchLayout:
        """One region over ``numel`` elements that fits ``size`` buckets.

        A list of tensors under this layout is one long vector: how it is cut into tensors changes nothing.
        Raises ValueError when ``size`` is below ``min(numel, lanes)``.
        """
        if size < min(numel, lanes):
            raise ValueError(
                f"out has {size} buckets, too few for {numel} elements: give it at least {min(numel, lanes)}"
            )
        rows = _ceil_div(numel, lanes)
        slabs = max(1, size // lanes)
        rows_per_slab = 1 if numel <= size else _ceil_div(rows, slabs)
        return cls((numel,), max(1, rows_per_slab), seed, lanes)

    @classmethod
    def per_tensor(
        cls, numels: Sequence[int], *, size: int | None = None, seed: int = 0, lanes: int = LANES
    ) -> SketchLayout:
        """A region for each tensor, about ``size`` buckets in all (None: no element shares a bucket).

        ``size`` is a wish: rounding each region up to whole slabs can exceed it by ``lanes`` buckets a tensor.
        """
        numels = tuple(int(n) for n in numels)
        rows_per_slab = 1 if size is None else max(1, _ceil_div(sum(numels), max(1, size)))
        return cls(numels, rows_per_slab, seed, lanes)

    def region_size(self, numel: int) -> int:
        """Buckets of a region of ``numel`` elements."""
        if numel <= self.lanes:
            return numel
        slabs = _ceil_div(numel, self.lanes * self.rows_per_slab)
        rows_in_last = _ceil_div(numel - (slabs - 1) * self.lanes * self.rows_per_slab, self.lanes)
        if rows_in_last > 1:
            return slabs * self.lanes
        return (slabs - 1) * self.lanes + (numel - (slabs - 1) * self.lanes * self.rows_per_slab)

    @cached_property
    def bucket_offsets(self) -> tuple[int, ...]:
        """First bucket of each region."""
        offsets, total = [], 0
        for numel in self.numels:
            offsets.append(total)
            total += self.region_size(numel)
        return tuple(offsets)

    @cached_property
    def index_offsets(self) -> tuple[int, ...]:
        """Index of each region's first element in the sign sequence; a multiple of ``lanes``."""
        offsets, total = [], 0
        for numel in self.numels:
            offsets.append(total)
            total += _ceil_div(numel, self.lanes) * self.lanes
        return tuple(offsets)

    @cached_property
    def size(self) -> int:
        """Buckets in all: the number of elements of ``out``."""
        return sum(self.region_size(n) for n in self.numels)

    @property
    def cells_of_slab(self) -> int:
        """Sums of squares that ``absorb_sketch_`` makes of a slab."""
        return _ceil_div(self.lanes, CELL_LANES)

    @cached_property
    def cell_offsets(self) -> tuple[int, ...]:
        """First cell of each region, and their number in all."""
        offsets = [0]
        for numel in self.numels:
            offsets.append(offsets[-1] + _ceil_div(self.region_size(numel), self.lanes) * self.cells_of_slab)
        return tuple(offsets)

    @property
    def cells(self) -> int:
        """Sums of squares that ``absorb_sketch_`` makes in all."""
        return self.cell_offsets[-1]

    @property
    def lossless(self) -> bool:
        """True when no two elements share a bucket: inner products of sketches are then exact."""
        return self.rows_per_slab == 1

    def __hash__(self) -> int:  # numels can be long: hash it once
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash((self.numels, self.rows_per_slab, self.seed, self.lanes))


def sketch_chunk_rows(rows: int, lanes: int, rows_per_slab: int | None = None) -> int:
    """Rows of one chunk for a list of ``rows`` rows: a number that depends on nothing but the sizes.

    Lists that fill no wave of programs with chunks of the usual size have smaller ones. Others have chunks of such a
    size that the programs make up whole waves, but for 6% that parts of slabs at the tensors' ends take; where slabs
    are longer, chunks divide them evenly. A last wave with few programs leaves the memory idle: each of them reads no
    faster for being alone.
    """
    fewest, most = SKETCH_CHUNK_ROWS
    usual = _USUAL_ROWS
    while usual * 2 <= most and rows // (usual * 2) >= _USUAL_PROGRAMS:
        usual *= 2
    wave = SKETCH_WAVE * 15 // 16
    waves = max(1, round(rows / (usual * wave)))
    chunk = max(fewest, min(_ceil_div(rows, waves * wave), most))
    if rows_per_slab is not None and rows_per_slab > chunk:
        chunk = min(most, _ceil_div(rows_per_slab, max(1, round(rows_per_slab / chunk))))
    return max(1, min(chunk, (1 << 28) // lanes))

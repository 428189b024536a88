"""Curves drawn with characters, for a terminal."""

import math
from collections.abc import Sequence
from typing import NamedTuple

Points = Sequence[tuple[float, float]]
"""Steps and values."""

BLOCKS, PLAIN_BLOCKS = "▁▂▃▄▅▆▇█", "_.-~=+*#"
_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
"""Bits of a braille character by row and column."""


class Cell(NamedTuple):
    """A character of a chart, and what it shows: ``"line"``, ``"band"`` or ``""``."""

    text: str
    shows: str


def columns_of(points: Points, count: int, first: float, last: float) -> list[float]:
    """Means of the values in `count` equal parts of the steps from `first` to `last`; NaN where there are none.

    Where the points are fewer than the parts, each fills those up to the next.
    """
    sums, numbers = [0.0] * count, [0] * count
    width = max(last - first, 1)
    place = lambda step: min(max(int((step - first) / width * count), 0), count - 1)
    for step, value in points:
        if math.isfinite(value):
            sums[place(step)] += value
            numbers[place(step)] += 1
    means = [total / n if n else math.nan for total, n in zip(sums, numbers, strict=True)]
    begun = False
    for column in range(count):
        if numbers[column]:
            begun = True
        elif begun and any(numbers[column:]):
            means[column] = means[column - 1]
    return means


def sparkline(values: Sequence[float], low: float, high: float, *, plain: bool = False) -> str:
    """One character for each value, higher for larger ones between `low` and `high`; a blank for NaN."""
    blocks = PLAIN_BLOCKS if plain else BLOCKS
    room = high - low
    text = ""
    for value in values:
        if math.isnan(value):
            text += " "
            continue
        part = (value - low) / room if room > 0 else 0.5
        text += blocks[min(max(int(part * len(blocks)), 0), len(blocks) - 1)]
    return text


def gauge(value: float, mark: float, width: int, *, plain: bool = False) -> str:
    """A bar as long as `value` is of twice `mark`, which a line stands at: below it is within bounds."""
    full, empty, line = ("#", ".", "|") if plain else ("█", "░", "│")
    filled = min(max(round(value / (2 * mark) * width), 0), width) if math.isfinite(value) else 0
    cells = [full] * filled + [empty] * (width - filled)
    cells[width // 2] = line
    return "".join(cells)


def band_chart(
    line: Points,
    band: Sequence[tuple[float, float, float]],
    width: int,
    height: int,
    limits: tuple[float, float] = (0.0, 1.0),
    *,
    plain: bool = False,
) -> list[list[Cell]]:
    """A curve over a band, in `height` rows of `width` cells; values beyond the limits lie at the edge.

    Args:
        line: steps and values.
        band: steps with lower and upper ends.
        limits: values at the lower and upper edge.
        plain: with characters of ASCII alone.
    """
    steps = [step for step, *_ in (*line, *band)]
    first, last = (min(steps), max(steps)) if steps else (0.0, 1.0)
    fine = 1 if plain else 2  # columns of dots in a cell; rows of dots are four
    tall = 1 if plain else 4
    scale = lambda value: min(max((value - limits[0]) / (limits[1] - limits[0]), 0.0), 1.0)
    row_of = lambda value, rows: min(int((1 - scale(value)) * rows), rows - 1)

    dots = [[0] * width for _ in range(height)]
    heights = columns_of(line, width * fine, first, last)
    before: int | None = None
    for column, value in enumerate(heights):
        if math.isnan(value):
            before = None
            continue
        now = row_of(value, height * tall)
        start = now if before is None else before + (now > before) - (now < before) if before != now else now
        for dot in range(min(start, now), max(start, now) + 1):
            dots[dot // tall][column // fine] |= 1 if plain else _DOTS[dot % tall][column % fine]
        before = now

    low = columns_of([(step, below) for step, below, _ in band], width, first, last)
    high = columns_of([(step, above) for step, _, above in band], width, first, last)
    shade, mark = (":", "*") if plain else ("░", "")
    rows = []
    for row in range(height):
        cells = []
        for column in range(width):
            if dots[row][column]:
                cells.append(Cell(mark or chr(0x2800 + dots[row][column]), "line"))
            elif not math.isnan(low[column]) and row_of(high[column], height) <= row <= row_of(low[column], height):
                cells.append(Cell(shade, "band"))
            else:
                cells.append(Cell(" ", ""))
        rows.append(cells)
    return rows

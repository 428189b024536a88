"""Numbers as the report writes them, and sentences that follow from them."""

import math
from collections.abc import Iterable, Sequence

from benchmarks.study.analysis import Family
from benchmarks.study.inference import Comparison

NOT_RUN = "Not yet run."


def table(header: Sequence[str], rows: Iterable[Sequence[str]], text_columns: int = 1) -> str:
    """A Markdown table; all but the first columns are aligned to the right."""
    marks = ["---" if index < text_columns else "---:" for index in range(len(header))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, marks, *rows))


def percent(value: float | None, digits: int = 1) -> str:
    """A share in percent, without the sign."""
    return "" if value is None else f"{100 * value:.{digits}f}"


def number(value: float | None, form: str = ".2f") -> str:
    """A number, or nothing where there is none."""
    return "" if value is None or math.isnan(value) else format(value, form)


def probability(p: float | None) -> str:
    """``0.034`` or ``<0.001``."""
    return "" if p is None else "<0.001" if p < 0.001 else f"{p:.2g}" if p < 0.1 else f"{p:.2f}"


def difference(found: Comparison | None) -> str:
    """``+1.2 [-0.3, +2.7]`` in points; without the interval where there is none."""
    if found is None:
        return ""
    text = _points(found.mean)
    return text if math.isnan(found.low) else f"{text} [{_points(found.low)}, {_points(found.high)}]"


def clause(family: Family, name: str) -> str:
    """How ``gac`` did against an arm, to follow "`gac` is": ``better by 2.1 points (0.5 to 3.7, p = 0.01)``."""
    found = family.versus.get(name)
    if found is None:
        return "not compared yet"
    verdict, mean, low, high = family.verdict(name), 100 * found.mean, 100 * found.low, 100 * found.high
    if verdict == "missing":
        side = "ahead" if mean > 0 else "behind"
        return f"{side} by {abs(mean):.1f} points over {count(found.pairs, 'pair')}, too few for an interval"
    if verdict == "untested":
        side = "ahead of" if mean > 0 else "behind" if mean < 0 else "level with"
        return f"{side} it by {_points(abs(found.mean)).lstrip('+')} points ({low:+.1f} to {high:+.1f}, not tested)"
    p = f"p {equals(family.adjusted[name])}"
    if verdict == "open":
        return (
            f"not told apart from it: {_points(found.mean)} points ({_points(found.low)} to {_points(found.high)}, {p})"
        )
    if verdict == "worse":
        mean, low, high = -mean, -high, -low
    span = [f"{x:.1f}".replace("-0.0", "0.0") for x in (low, high)]
    return f"{verdict} by {mean:.1f} points ({span[0]} to {span[1]}, {p})"


def tally(family: Family, names: Sequence[str], label) -> str:
    """``better than 3 of 5 (a, b, c), worse than 1 (d), not told apart from 1 (e)``."""
    if not names:
        return "not compared yet"
    groups = (
        ("better", "better than"),
        ("worse", "worse than"),
        ("open", "not told apart from"),
        ("missing", "not judged yet against"),
    )
    if all(family.verdict(name) == "missing" for name in names):
        return f"not judged yet against {count(len(names), 'arm')}, each with too few pairs for an interval"
    parts = []
    for verdict, words in groups:
        members = [label(name) for name in names if family.verdict(name) == verdict]
        if members or verdict in ("better", "worse"):
            listed = f" ({', '.join(members)})" if members else ""
            parts.append(f"{words} {len(members)}{' of ' + str(len(names)) if not parts else ''}{listed}")
    return ", ".join(parts)


def excluded(found: Comparison) -> str:
    """What the interval rules out."""
    if math.isnan(found.low):
        return ""
    ahead, behind = 100 * max(found.high, 0), 100 * max(-found.low, 0)
    return f"an advantage above {ahead:.1f} and a disadvantage above {behind:.1f} points"


def equals(p: float | None) -> str:
    """``= 0.03`` or ``< 0.001``."""
    text = probability(p)
    return f"< {text[1:]}" if text.startswith("<") else f"= {text}"


def count(n: int, noun: str) -> str:
    """``1 pair``, ``2 pairs``."""
    return f"{n:,} {noun}" + ("" if n == 1 else "es" if noun.endswith("s") else "s")


def listing(items: Sequence[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + " and " + items[-1] if items else "none"


def _points(value: float) -> str:
    text = f"{100 * value:+.1f}"
    return "0.0" if text == "-0.0" or text == "+0.0" else text

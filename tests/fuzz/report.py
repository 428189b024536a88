"""What a run of the fuzzer says: counts, known findings, and a reproduction of everything else."""

from __future__ import annotations

from collections import Counter
from dataclasses import MISSING, dataclass, field, fields, is_dataclass


@dataclass
class Tally:
    """Of one target: draws made, how often each known finding came up, and failures in words."""

    target: str
    draws: int = 0
    seconds: float = 0.0
    known: Counter = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)

    def add(self, other: Tally) -> None:
        """Takes in what another process counted meanwhile."""
        self.draws += other.draws
        self.seconds = max(self.seconds, other.seconds)
        self.known += other.known
        self.failures += other.failures

    def __str__(self) -> str:
        rate = self.draws / max(self.seconds, 1e-9)
        lines = [f"{self.target}: {self.draws} draws in {self.seconds:.0f} s, {rate:.1f} a second"]
        lines += [f"  known, not mended: {name} ({count} draws)" for name, count in self.known.most_common()]
        lines += [f"FAILED {failure}" for failure in self.failures]
        lines.append(f"  {len(self.failures)} new findings" if self.failures else "  nothing new")
        return "\n".join(lines)


def as_code(value: object) -> str:
    """A draw as the Python that makes it: arguments that differ from their defaults."""
    if isinstance(value, tuple):
        return "(" + "".join(f"{as_code(one)}, " for one in value).strip() + ")"
    if not is_dataclass(value):
        return repr(value)
    given = []
    for one in fields(value):
        default = one.default if one.default_factory is MISSING else one.default_factory()
        if default is MISSING or getattr(value, one.name) != default:
            given.append(f"{one.name}={as_code(getattr(value, one.name))}")
    return f"{type(value).__name__}({', '.join(given)})"


def reproduction(seed: int, number: int, kind: str, what: str, draw: object) -> str:
    """A failure in words, with the code that shows it again."""
    return (
        f"{kind}, draw {number} of seed {seed}: {what}\n"
        "    from tests.fuzz.draw import Draw, Pass, Step\n"
        "    from tests.fuzz.judge import judge\n"
        f"    print(judge({as_code(draw)}))"
    )

"""Which steps are measured: every so many, or as many as keep the cost of measuring within a share of the time."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from gac.state import MAX, Numbers, Range

WARM_UP = 10
"""Steps that are always measured: the first mu move, and what measuring costs, come from them."""

MOST = 4096
"""The longest interval."""

AIM = 0.9
"""Share of the budget that is aimed at: trainers count less than all of the time to their steps, and GAC's own clock
does not see the calls that lead to it."""

PACE = 0.9
"""Share of what unmeasured steps leave of it that is spent as it comes; the rest is kept for when statistics move."""

RESERVE = 8
"""Measurements that are kept at most for when statistics move."""

RECENT = 3
"""Reports whose medians stand for what a step costs."""

FLOOR = 0.1
"""Measuring takes at least this share of what steps cost that are not measured, where those use the budget up."""

UNKNOWN = 0.05, 2.5e-5
"""What a step that is not measured is taken to cost before there was one: of one that is, and seconds; the lesser."""


class Costs(NamedTuple):
    """What steps cost since the last report, as means over the ranks: the measured step that begins it and the rest.

    Attributes:
        measured: seconds in GAC of the measured step.
        unmeasured: seconds in GAC of the others together.
        rest: seconds of all these steps outside GAC.
        steps: how many.
        moved: above 0 where the statistics of the measured step had moved.
    """

    measured: float
    unmeasured: float
    rest: float
    steps: float
    moved: float


class Cadence(ABC):
    """Decides step by step; every rank alike, from what all of them have been told.

    Attributes:
        measurements: steps measured so far.
    """

    counts_costs: ClassVar[bool]
    """Whether it goes by what steps cost."""

    measurements = 0

    @property
    @abstractmethod
    def interval(self) -> int:
        """Steps from one measurement to the next, at present."""

    @abstractmethod
    def is_due(self, step: int) -> bool:
        """Whether the step to come is to be measured; ``step``: its number, from 0."""

    def measured(self, costs: Costs | None) -> None:
        """A step was measured.

        Args:
            costs: of the steps before it, from all ranks; None where none were reported.
        """
        self.measurements += 1

    def passed(self, steps: int = 1) -> None:  # noqa: B027 - fixed intervals go by the number of the step
        """So many steps were not measured."""

    @abstractmethod
    def until_due(self, step: int) -> int:
        """Steps from this one on, which is to come, that are not measured."""

    def state_dict(self) -> dict[str, Tensor]:
        """What the decisions to come depend on, as :func:`entries` has it."""
        return _state(0, min(self.interval, MOST), self.measurements)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:  # noqa: B027
        """Goes on from what :meth:`state_dict` returned, of a cadence of either kind."""


class FixedCadence(Cadence):
    """Every ``interval``-th step, from the first on."""

    counts_costs = False

    def __init__(self, interval: int) -> None:
        self._interval = interval

    @property
    def interval(self) -> int:
        return self._interval

    def is_due(self, step: int) -> bool:
        self.measurements = -(-step // self._interval)
        return step % self._interval == 0

    def until_due(self, step: int) -> int:
        return -step % self._interval


class BudgetCadence(Cadence):
    """As many steps as a share of the time pays for.

    An account is kept: each step earns ``overhead`` (nine tenths of what was asked for, :data:`AIM`) times what it
    takes outside GAC and pays what GAC took. With ``m``
    and ``u`` the cost of a measured and an unmeasured step, ``T`` the time of a step outside GAC (medians of the newest
    reports) and ``B`` the balance, the next measurement is ``k`` steps away,

        k = ceil((m - u - B) / (overhead * T - u)),

    the first at which the account is not overdrawn. So the share keeps below ``overhead`` whatever steps do: if they
    become cheaper, the debt is paid by a longer interval. A tenth of what is left is kept, :data:`RESERVE`
    measurements' worth, and spent when statistics move by more than their standard errors explain. The first
    :data:`WARM_UP` steps are measured always and are not accounted for.

    Where steps that are not measured use the budget up, measuring less would not help: it then takes a tenth of what
    they cost.

    Args:
        overhead: the share, in (0, 1].
    """

    counts_costs = True

    def __init__(self, overhead: float) -> None:
        self.overhead = AIM * overhead
        self._interval = 1
        self._left = 0  # steps until one is measured
        self._balance = 0.0
        # of the newest reports, NaN where there was none: seconds of a measured step, of one that was not, outside GAC
        self._recent = {name: [math.nan] * RECENT for name in RECENT_OF}

    @property
    def interval(self) -> int:
        return self._interval

    def is_due(self, step: int) -> bool:
        return self._left <= 0

    def measured(self, costs: Costs | None) -> None:
        super().measured(costs)
        if costs is not None:
            self._take(costs)
        self._left = self._interval - 1

    def passed(self, steps: int = 1) -> None:
        self._left = max(self._left - steps, 0)

    def until_due(self, step: int) -> int:
        return self._left

    def _take(self, costs: Costs) -> None:
        steps = max(int(costs.steps), 1)
        self._push("measured", costs.measured)
        self._push("rest", costs.rest / steps)
        if steps > 1:
            self._push("unmeasured", costs.unmeasured / (steps - 1))
        if self.measurements < WARM_UP:
            return
        m, u, rest = self._usual("measured"), self._usual("unmeasured"), self._usual("rest")
        if all(map(math.isnan, self._recent["unmeasured"])):
            u = min(UNKNOWN[0] * m, UNKNOWN[1])
        earned = self.overhead * rest
        if self.measurements > WARM_UP:
            paid = costs.unmeasured + (costs.measured if self.measurements > WARM_UP + 1 else 0.0)
            self._balance += self.overhead * costs.rest - paid
        kept = RESERVE * m
        self._balance = min(max(self._balance, -kept), 2 * kept)
        present = self._balance
        if self.measurements > WARM_UP:
            present += earned - m  # of the step just measured, whose cost is not known yet
        pace = 1.0
        if costs.moved <= 0:
            present, pace = min(present, max(present - kept, 0.0)), PACE
        room = pace * (earned - u)
        if room < FLOOR * u:  # what steps cost that are not measured is no reason not to measure
            room, present = FLOOR * u, 0.0
        wanted = (m - u - present) / room if room > 0 else 1.0
        self._interval = int(min(max(math.ceil(wanted), 1), MOST))

    def _push(self, name: str, value: float) -> None:
        self._recent[name] = [*self._recent[name][1:], value]

    def _usual(self, name: str) -> float:
        """The median of the newest reports; 0 before the first."""
        return median([value for value in self._recent[name] if value == value] or [0.0])

    def state_dict(self) -> dict[str, Tensor]:
        return _state(
            self._left,
            self._interval,
            self.measurements,
            balance=self._balance,
            recent=[self._recent[name] for name in RECENT_OF],
        )

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self._left, self._interval, self.measurements = map(int, state["counts"].tolist())
        self._balance = float(state["balance"])
        self._recent = dict(zip(RECENT_OF, state["recent"].tolist(), strict=True))


RECENT_OF = ("measured", "unmeasured", "rest")
"""What reports tell of a step."""


def _state(
    left: int,
    interval: int,
    measurements: int,
    *,
    balance: float = 0.0,
    recent: Sequence[Sequence[float]] = ((math.nan,) * RECENT,) * len(RECENT_OF),
) -> dict[str, Tensor]:
    return {
        "counts": torch.tensor([left, interval, measurements], dtype=torch.float64),
        "balance": torch.tensor(balance, dtype=torch.float64),
        "recent": torch.tensor(recent, dtype=torch.float64),
    }


def entries() -> dict[str, Numbers]:
    """What a saved state may hold.

    ``counts``: steps until one is measured, interval, measurements so far; ``balance`` of the account in
    seconds; ``recent``: rows of :data:`RECENT_OF`, seconds a step, the newest last, NaN for none.
    """
    kind: dict[str, Any] = {"dtype": torch.float64, "device": torch.device("cpu")}
    counts = Range((0.0, 1.0, 0.0), (MOST, MOST, MAX), whole=True)
    return {
        "counts": Numbers((3,), range=counts, **kind),
        "balance": Numbers((), range=Range(), **kind),
        "recent": Numbers((len(RECENT_OF), RECENT), range=Range(0.0, unknown=True), **kind),
    }


HALF_LIFE = 200
"""Steps after which a step counts half in the share that the metrics tell."""


class Account:
    """What this rank's steps have cost: since the last report, and of late.

    Attributes:
        moved: whether the statistics of the last measured step had moved; a tensor is not read here.
        total: seconds in GAC so far.
    """

    def __init__(self) -> None:
        self.moved: Tensor | float = 0.0
        self.total = 0.0
        self._late = [0.0, 0.0]  # seconds in GAC and outside
        self._begin()

    def _begin(self) -> None:
        self._measured = self._unmeasured = self._rest = 0.0
        self._steps = 0

    def ended(self, gac: float, rest: float, *, measured: bool, steps: int = 1) -> None:
        """More steps have ended, of one kind: seconds in GAC, and outside."""
        if measured:
            self._measured += gac
        else:
            self._unmeasured += gac
        self.total += gac
        self._rest += rest
        self._steps += steps
        keep = 0.5 ** (steps / HALF_LIFE)
        self._late = [keep * self._late[0] + gac, keep * self._late[1] + rest]

    def late(self, gac: float) -> None:
        """Seconds in GAC of measured steps that have ended, which nobody knew then."""
        self._measured += gac
        self.total += gac
        self._late[0] += gac

    def report(self) -> list[float]:
        """The numbers of :class:`Costs` but ``moved``, of this rank; what follows is told in the next report."""
        found = [self._measured, self._unmeasured, self._rest, float(self._steps)]
        self._begin()
        return found

    def forget(self) -> None:
        """What the first steps cost says nothing about those to come."""
        self._late = [0.0, 0.0]

    @property
    def share(self) -> float:
        """Seconds in GAC over seconds outside, of late; NaN before the first step."""
        gac, rest = self._late
        return gac / rest if rest > 0 else math.nan

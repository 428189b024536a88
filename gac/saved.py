"""What the state of a mixer may hold, with the version of its form: for the mixer, and for whoever keeps its state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from gac import cadence
from gac.laws.controller import THEN, Controller
from gac.observe.temporal import MovingMeans
from gac.sequences.saved import SequencesEntry
from gac.state import Entry, ListOf, Numbers, Range, Table, Whole, like, read
from gac.statistics.uncertainty import StandardErrors, SuccessiveDifferences
from gac.statistics.worth import WORTH
from gac_kernels.arguments import accumulator_dtype

VERSION = 3
"""Of the form of a mixer's state: 2 has the cadence, and how old moving means are; 3 may have what is known of sources
and single demonstrations. One without a version is of 1."""


class MixerState:
    """The entry (:class:`gac.state.Entry`) of a mixer's state.

    Args:
        controller: whose law and steps they are.
        device: where it is kept.
        sketches: device and size of each of the mixer's moving means. Saved ones that are not as many, of another
            number of ranks or devices, are checked and left out: they start anew.
        exact: whether the means are of gradients as they are; in states of version 1 these had random signs, and start
            anew.
    """

    def __init__(
        self,
        controller: Controller,
        device: torch.device,
        sketches: Sequence[tuple[torch.device, int]] = (),
        *,
        exact: bool = False,
    ) -> None:
        dtype = accumulator_dtype(device)
        entries: dict[str, Entry] = {
            "version": Whole(1, VERSION),
            "controller": controller.entries(),
            "skipped": Numbers((), dtype, device, Range(0.0, whole=True)),
            "means": _Means([MovingMeans.entries(*sketch) for sketch in sketches]),
            "uncertainty": Table(StandardErrors(device, dtype).entries()),
        }
        earlier = [MovingMeans.entries(*sketch, aged=False) for sketch in sketches]
        self._first = Table(
            entries | {"means": _Means(earlier, aged=False, anew=exact)},
            together=[frozenset({"version"})],
        )
        entries["cadence"] = Table(cadence.entries())
        if controller.law.measures_worth:
            errors = SuccessiveDifferences(len(WORTH), device, dtype)
            entries["worth"] = Table({"means": entries["means"], "errors": Table(like(errors.state, errors.RANGES))})
        self._second = Table(dict(entries))
        entries["sequences"] = SequencesEntry(dtype)
        self._table = Table(entries, together=[frozenset({"sequences"})])

    def read(self, value: Any, at: str) -> dict[str, Any]:
        version = 1
        if isinstance(value, Mapping) and "version" in value:  # first: what a later version holds is not known here
            version = Whole(1).read(value["version"], f'{at}["version"]')
            if version > VERSION:
                raise ValueError(
                    f'{at}["version"] is {version}, and this gac knows states up to version {VERSION}: a newer gac '
                    "wrote it, which can read it"
                )
        return {1: self._first, 2: self._second}.get(version, self._table).read(value, at)


class _Means:
    """Moving means of each sketch, or of whatever there was."""

    def __init__(self, own: Sequence[Table], *, aged: bool = True, anew: bool = False) -> None:
        self._own, self._anew = own, anew
        self._any = ListOf(MovingMeans.entries(torch.device("cpu"), None, aged=aged))

    def read(self, value: Any, at: str) -> list[dict[str, Any]]:
        found = self._any.read(value, at)
        if len(found) != len(self._own):
            return [{} for _ in self._own]
        checked = [own.read(item, f"{at}[{k}]") for k, (own, item) in enumerate(zip(self._own, value, strict=True))]
        return [{} for _ in self._own] if self._anew else checked


def read_state(value: Any, entry: Entry) -> Any:
    """The parts of a mixer's state, checked whole and in copies on their devices.

    Args:
        value: what was saved.
        entry: a :class:`MixerState`.

    Raises:
        TypeError, ValueError: it cannot be a state of this mixer; the message names the entry and what to do.
    """
    return read(value, entry, then=THEN.format(whose="Mixer"))

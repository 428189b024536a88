"""Microbenchmarks: the gate, then every variant of a case in one interleaved loop, as rows of plain data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from time import monotonic
from typing import Any

import torch

from gac.bench.case import Case, Prepared, size_label
from gac.bench.cases import (
    LIST_OPERATIONS,
    OPERATIONS,
    PEER_KINDS,
    applies,
    drop_failing,
    model_case,
    prepare,
)
from gac.bench.inputs import Pools, free_bytes
from gac.bench.kronecker import TOKENS
from gac.bench.timing import Samples, quantile, ratio, ratio_interval, timer_for
from gac.plan.shapes import MODELS, LlamaShape

SIZES = tuple(1 << k for k in range(10, 27, 2))
"""1K to 64M elements."""

QUICK_SIZES = (1 << 10, 1 << 16, 1 << 22)

_MEMORY_SHARE = 0.45
"""Of the free memory: what inputs may take. The reference and peers that make copies need some, too."""

_MOST_ON_CPU = 5 << 30
"""Bytes of inputs on a CPU, whatever is free: far beyond every cache, and more would only take longer."""


@dataclass(frozen=True)
class Options:
    """What to run. ``seconds`` is spent on each case; after ``limit`` seconds no new case starts."""

    device: torch.device
    operations: Sequence[str] = OPERATIONS
    dtypes: Sequence[str] = ("bf16", "fp32")
    sizes: Sequence[int] = SIZES
    models: Sequence[str] = ("0.1B", "1B", "8B")
    peers: Sequence[str] = PEER_KINDS
    seconds: float = 0.5
    limit: float = float("inf")


def cases(options: Options) -> Iterator[Case | dict]:
    """Cases in the order of running; a dict is the row of one that memory does not allow.

    What is free is looked up once, before the first case: later the inputs of the case before are still there.
    """
    room, tokens = _room(options.device), TOKENS[options.device.type]
    for name in options.models:
        for operation in options.operations:
            for dtype in options.dtypes if operation in LIST_OPERATIONS else ():
                yield model_case(operation, dtype, MODELS[name], room, tokens) or _no_room(operation, dtype, name, room)
    for operation in options.operations:
        for dtype in options.dtypes:
            for elements in options.sizes:
                if applies(operation, dtype, elements):
                    case = Case(operation, dtype, elements)
                    yield case if case.memory() <= room else _no_room(operation, dtype, case.label, room)


def _room(device: torch.device) -> int:
    """Bytes that inputs may take now."""
    free = int(_MEMORY_SHARE * free_bytes(device))
    return free if device.type == "cuda" else min(free, _MOST_ON_CPU)


def _no_room(operation: str, dtype: str, label: str, room: int) -> dict:
    note = f"left out: {room / 2**30:.1f} GiB of memory may be taken, too little"
    return {"operation": operation, "dtype": dtype, "label": label, "note": note}


def run(options: Options, on_row: Callable[[dict], None] = lambda row: None) -> list[dict]:
    """Runs all cases and returns their rows; ``on_row`` sees each one at once.

    A case that reads as slower than a peer is measured again at the end, and all rounds count: what another program did
    to the machine for a second is over by then, a slow kernel is still slow.
    """
    deadline = monotonic() + options.limit
    pools, timer = Pools(options.device, cold=options.device.type != "cuda"), timer_for(options.device)
    rows: list[dict] = []
    last: tuple[str, LlamaShape | None] | None = None
    doubtful: list[tuple[int, Case, list[dict[str, Samples]]]] = []
    for case in cases(options):
        if isinstance(case, Case):
            if (case.operation, case.model) != last:
                pools.clear()
                last = (case.operation, case.model)
            looks: list[dict[str, Samples]] = []
            row = _late(case) if monotonic() > deadline else _attempt(case, pools, timer, options, looks)
            if _is_slower(row):
                doubtful.append((len(rows), case, looks))
        else:
            row = case
        rows.append(row)
        on_row(row)
    for index, case, looks in doubtful:
        if monotonic() <= deadline:
            pools.clear()
            again = _attempt(case, pools, timer, options, looks)
            if "variants" in again:
                rows[index] = again
                on_row(again)
    return rows


def _is_slower(row: dict) -> bool:
    """Than a peer, beyond noise."""
    return any(high < 1 for _, high in row.get("speedup_interval", {}).values())


def _attempt(case: Case, pools: Pools, timer: Any, options: Options, looks: list[dict[str, Samples]]) -> dict:
    """The row of a case, or why memory did not allow it."""
    try:
        return run_case(case, pools, timer, options, looks)
    except (MemoryError, torch.OutOfMemoryError) as error:
        pools.clear()
        return _head(case) | {"note": f"left out, out of memory: {str(error).strip().splitlines()[0][:120]}"}


def _late(case: Case) -> dict:
    return _head(case) | {"note": "left out: the time limit was reached"}


def _head(case: Case) -> dict:
    shapes = case.shapes
    elements = case.numel if case.operation == "kronecker_sketch" or not case.model else case.model.numel()
    return {
        "operation": case.operation,
        "dtype": case.dtype,
        "label": case.label,
        "elements": elements,
        "tensors": len(shapes),
        "note": case.note,
    }


def run_case(
    case: Case, pools: Pools, timer: Any, options: Options, looks: list[dict[str, Samples]] | None = None
) -> dict:
    """The row of one case; with a red gate it has neither ratios nor percentages.

    `looks` holds earlier measurements of the case, which count, too, and gets this one.
    """
    prepared = prepare(case, pools, options.peers)
    gate = prepared.gate()
    row = _head(case) | {
        "bytes": prepared.bytes,
        "read_bytes": prepared.read_bytes,
        "gate": {"ok": gate.ok, "error": gate.error, "checked": gate.checked},
        "omitted": prepared.omitted,
    }
    variants = {"gac": prepared.ours}
    if gate.ok:
        drop_failing(prepared)
        variants |= {f"read: {name}": call for name, call in prepared.readers.items()} | prepared.peers
    seconds = options.seconds * (3 if case.model else 1)
    looks = [] if looks is None else looks
    looks.append(timer.measure(variants, prepared.sets, seconds=seconds))
    row["variants"] = {
        name: Samples.joined(look[name] for look in looks if name in look).summary() for name in variants
    }
    return row | _derived(prepared, looks) if gate.ok else row


def _derived(prepared: Prepared, looks: Sequence[dict[str, Samples]]) -> dict:
    p50 = {name: quantile([t for look in looks for t in look[name].time], 0.5) for name in looks[-1]}
    limit = min((name for name in p50 if name.startswith("read: ")), key=p50.__getitem__)
    times_read = ratio(*_paired(looks, "gac", limit))
    peers = {name: _paired(looks, name, "gac") for name in prepared.peers}
    derived = {
        "gbps": prepared.bytes / p50["gac"] * 1e-9,
        "read": limit.removeprefix("read: "),
        "read_gbps": prepared.read_bytes / p50[limit] * 1e-9,
        "times_read": times_read,
        "percent_of_read": 100.0 * prepared.bytes / prepared.read_bytes / times_read,
        "speedup": {name: ratio(*pair) for name, pair in peers.items()},
        "speedup_interval": {name: ratio_interval(*pair) for name, pair in peers.items()},
    }
    if looks[-1]["gac"].wall:
        derived["speedup_wall"] = {name: ratio(*_paired(looks, name, "gac", "wall")) for name in prepared.peers}
    return derived


def _paired(
    looks: Sequence[dict[str, Samples]], first: str, second: str, clock: str = "time"
) -> tuple[list[float], list[float]]:
    """The samples of two variants in the rounds that both took part in."""
    pairs = [
        pair
        for look in looks
        if first in look and second in look
        for pair in zip(getattr(look[first], clock), getattr(look[second], clock), strict=False)
    ]
    return [one for one, _ in pairs], [other for _, other in pairs]


def describe(row: dict) -> str:
    """``sketch bf16 64M``."""
    return f"{row['operation']} {row['dtype']} {row['label']}"


__all__ = ["QUICK_SIZES", "SIZES", "Options", "cases", "describe", "run", "run_case", "size_label"]

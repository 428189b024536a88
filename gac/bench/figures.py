"""The figures to reach, looked up in results: what was asked, what was measured, whether it holds.

A result file is ``{"kernels": [rows], "step": [results], "host": {...}, ...}``; figures whose measurement is missing
are left out.
"""

from __future__ import annotations

from dataclasses import dataclass

from gac.bench.cases import LIST_OPERATIONS

_LARGEST = "64M"


@dataclass(frozen=True)
class Figure:
    """One figure: ``value`` against ``target`` as text, and whether it holds."""

    name: str
    target: str
    value: str
    ok: bool


def figures(results: dict) -> list[Figure]:
    """Every figure that the results allow."""
    gpu = results.get("device_type") == "cuda"
    rows = [row for row in results.get("kernels", []) if row.get("gate", {}).get("ok")]
    found = _gpu_kernels(rows) if gpu else _cpu_kernels(rows)
    for result in results.get("step", []):
        found += _step(result, gpu)
    host = results.get("host", {})
    if "hook" in host:
        found.append(_most("host time of a hook, per parameter", host["hook"]["hook"] * 1e6, 3.0, "us", 2))
    if "import" in host:
        found.append(_most("import gac on top of torch", host["import"]["p50"], 0.2, "s", 2))
    return found


def _most(name: str, value: float, target: float, unit: str, digits: int) -> Figure:
    return Figure(name, f"at most {target:g}{_space(unit)}", f"{value:.{digits}f}{_space(unit)}", value <= target)


def _least(name: str, value: float, target: float, unit: str, digits: int) -> Figure:
    return Figure(name, f"at least {target:g}{_space(unit)}", f"{value:.{digits}f}{_space(unit)}", value >= target)


def _space(unit: str) -> str:
    return unit if unit in ("%", "x") else f" {unit}"


def _row(rows: list[dict], operation: str, dtype: str, label: str) -> dict | None:
    wanted = (operation, dtype, label)
    return next((r for r in rows if (r["operation"], r["dtype"], r["label"]) == wanted), None)


def slowest_against_peers(rows: list[dict]) -> tuple[float, float, float, str] | None:
    """The speed-up over a peer that is least even at the upper bound of its interval: it, its bounds, where it is."""
    found = [
        (high, low, row["speedup"][peer], f"{row['operation']} {row['dtype']} {row['label']} against {peer}")
        for row in rows
        if row["operation"] != "kronecker_sketch"  # whose peers keep the signs that it makes anew
        for peer, (low, high) in row["speedup_interval"].items()
    ]
    if not found:
        return None
    high, low, value, where = min(found)
    return value, low, high, where


def _cpu_kernels(rows: list[dict]) -> list[Figure]:
    found = []
    for operation, dtype, most, what in (
        ("pair_moments", "fp32", 1.3, "reading both buffers"),
        ("sketch", "fp32", 1.2, "reading the buffer"),
        ("sketch", "bf16", 1.6, "reading the buffer"),
    ):
        row = _row(rows, operation, dtype, _LARGEST)
        if row:
            name = f"{operation}, {dtype}, {_LARGEST} elements, over {what}"
            found.append(_most(name, row["times_read"], most, "x", 2))
    row = _row(rows, "pair_moments", "fp32", _LARGEST)
    naive = row and row["speedup"].get("eager: norm, norm, norm(a-b)")
    if naive:
        found.append(_least("pair_moments over norm, norm, norm(a-b)", naive, 5.0, "x", 1))
    slowest = slowest_against_peers(rows)
    if slowest:
        value, low, high, where = slowest
        text = f"{value:.2f}x ({low:.2f} to {high:.2f})"
        found.append(Figure(f"least speed-up over any peer ({where})", "not below 1x beyond noise", text, high >= 1.0))
    return found


def _gpu_kernels(rows: list[dict]) -> list[Figure]:
    found = []
    for operation in LIST_OPERATIONS:
        row = _row(rows, operation, "bf16", "1B")
        if row is None or operation == "kronecker_sketch":  # which reads a block's activations: below
            continue
        name = f"{operation}, bf16, 1B list"
        found.append(_least(f"{name}, of the read limit", row["percent_of_read"], 90.0, "%", 1))
        if row.get("speedup_wall"):
            peer, value = min(row["speedup_wall"].items(), key=lambda item: item[1])
            found.append(_least(f"{name}, over its fastest peer ({peer})", value, 2.0, "x", 2))
    row = _row(rows, "kronecker_sketch", "bf16", "1B")
    if row:
        name = "kronecker_sketch, bf16, a block of 1B, of the read limit"
        found.append(_least(name, row["percent_of_read"], 80.0, "%", 1))
    return found


def _step(result: dict, gpu: bool) -> list[Figure]:
    sequences = result.get("estimator") == "sequence"
    name = f"{result['model']} {result['dtype']}, {result['tokens']} tokens a micro-batch"
    targets = {}
    if sequences:
        name += ", sequences"
        if gpu and result["model"] == "1B" and result["tokens"] == 8192:
            targets = {"10": 1.0}
    elif gpu and result["model"] == "1B" and result["tokens"] == 8192:
        targets = {"1": 0.7, "10": 0.1}
    elif not gpu and result["model"] == "10M" and result["tokens"] == 1024:
        targets = {"1": 0.5, "10": 0.1}
    key, what = ("whole_step", "whole step") if gpu else ("share_in_gac", "time in GAC over step time")
    found = []
    for interval, target in targets.items():
        value = 100 * result["intervals"][interval][key]
        found.append(_most(f"{what}, {name}, interval {interval}", value, target, "%", 3))
    if targets and "launches" in result:
        share = result["launches"]["measured"]["gac_kernel_seconds"] / result["arms"]["plain"]["device"]
        every = min(targets, key=int)
        what = f"GAC's kernels over device time, {name}, interval {every}"
        found.append(_most(what, 100 * share / int(every), targets[every], "%", 3))
    if "synchronizations" in result:
        verdict = result["synchronizations"]["gac"]
        found.append(Figure(f"host synchronisations, {name}", "none", verdict, verdict.startswith("none")))
    if result["model"] == "1B" and not sequences:
        share = 100 * result["sketch_bytes"] / result["gradient_bytes"]
        found.append(_most(f"sketches over gradient bytes, {name}", share, 0.5, "%", 2))
    return found

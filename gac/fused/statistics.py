"""Statistics of a step and their standard errors on Python floats; :mod:`gac.statistics` derives the formulas."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from math import isfinite

from gac.fused.arithmetic import NAN, clamp, divide, lerp, root
from gac.fused.state import Numbers
from gac.statistics.step import Statistics
from gac.statistics.sums import SumsOnHost
from gac.statistics.uncertainty import STEADY, SURPRISE, WITH_ERRORS, table_of_weights

FIELDS = Statistics.names()
UNMEASURED = {name: 0.0 if name in ("n_s", "n_r", "nonfinite") else NAN for name in FIELDS}
"""The statistics of a step that measured none."""


def statistics_of(sums: SumsOnHost, present: Sequence[bool], lone: Sequence[bool]) -> dict[str, float]:
    """What a step's sums come to, without standard errors.

    Args:
        sums: over contributions, devices and ranks.
        present: of SFT and RL, whether its weight is above 0.
        lone: of SFT and RL, whether its noise is that from time.
    """
    n = [count if there else 0.0 for count, there in zip(sums.n, present, strict=True)]
    noise = [NAN, NAN]
    for k in (0, 1):
        if lone[k]:
            noise[k] = sums.time_noise[k] if n[k] > 0 else NAN
        elif n[k] >= 2:
            noise[k] = clamp(sums.power[k] * sums.tokens[k] - sums.norms[k], 0.0) / (n[k] - 1)
    has_s, has_r = n[0] >= 1, n[1] >= 1
    norm_s2 = sums.norms[0] if has_s else NAN
    norm_r2 = sums.norms[1] if has_r else NAN
    dot = sums.norms[2] if has_s and has_r else NAN
    distance2 = clamp(norm_s2 + norm_r2 - 2 * dot, 0.0)
    return {
        "sigma_s2": noise[0],
        "sigma_r2": noise[1],
        "delta_g2": distance2 - (noise[0] + noise[1]),
        "distance2": distance2,
        "norm_s2": norm_s2,
        "norm_r2": norm_r2,
        "dot": dot,
        "n_s": n[0],
        "n_r": n[1],
        "nonfinite": sums.nonfinite,
    }


def cosine_of(statistics: Mapping[str, float]) -> float:
    """:attr:`gac.Statistics.cosine`."""
    return divide(statistics["dot"], root(statistics["norm_s2"]) * root(statistics["norm_r2"]))


@functools.cache
def _table() -> list[list[float]]:
    return table_of_weights().tolist()


def attach_errors(
    state: Numbers, statistics: dict[str, float], names: Sequence[str] = WITH_ERRORS
) -> tuple[Numbers, dict[str, float]]:
    """The next state of :class:`gac.statistics.uncertainty.SuccessiveDifferences`, and the statistics with ``*_se``.

    ``names`` are those of the estimates that get one, as many as the state has.
    """
    healthy = statistics["nonfinite"] == 0
    last, level, average, count = (list(state[name]) for name in ("last", "level", "average", "count"))
    errors = {}
    for k, name in enumerate(names):
        estimate = statistics[name]
        use = healthy and isfinite(estimate)
        if use:
            count[k] += 1
        of_level, of_average, factor = _table()[min(int(count[k]), STEADY)]
        squared = average[k]
        if use:
            level[k] = lerp(level[k], abs(estimate), of_level)
            if count[k] >= 2:
                difference = 0.0 if estimate == last[k] else divide(estimate - last[k], level[k])
                squared = difference * difference / 2
            last[k] = estimate
        average[k] = lerp(average[k], squared, of_average)
        errors[f"{name}_se"] = level[k] * root(average[k]) * factor
    return {"last": last, "level": level, "average": average, "count": count}, statistics | errors


def has_moved(last: Sequence[float], statistics: dict[str, float]) -> bool:
    """:func:`gac.statistics.uncertainty.has_moved`."""
    limit = SURPRISE * 2**0.5
    pairs = (
        (statistics[name] - before, statistics[f"{name}_se"]) for name, before in zip(WITH_ERRORS, last, strict=True)
    )
    return any(abs(difference) > limit * error for difference, error in pairs)

"""The coefficient estimator by its definitions, in plain Python."""

from __future__ import annotations

import math
import statistics as plain


def by_definition(
    logprobs, advantages, mask, is_expert, *, z_normalize: bool, phi: bool, trim: float
) -> dict[str, float]:
    """The definitions of :func:`gac.coefficient_statistics`, over lists."""
    demonstrations, rollouts = [], []
    for row in range(len(logprobs)):
        tokens = [k for k in range(logprobs.shape[1]) if mask[row, k]]
        if not tokens:
            continue
        logp = [float(logprobs[row, k]) for k in tokens]
        c_s = [-math.exp(x) * (1 - math.exp(x)) if phi else -1.0 for x in logp]
        expert = bool(is_expert[row])
        a = [0.0 if expert else float(advantages[row, k]) for k in tokens]
        (demonstrations if expert else rollouts).append((logp, c_s, [-x for x in a]))

    def variance(values: list[float], trim: float) -> float:
        cut = int(len(values) * trim) if len(values) >= 4 else 0
        kept = sorted(values)[cut : len(values) - cut]
        return max(plain.pvariance(kept), 1e-8) if values else math.nan

    compared = demonstrations + rollouts
    if z_normalize:
        compared = rollouts
        scales = []
        for column in (1, 2):
            values = [x for row in rollouts for x in row[column]]
            spread = plain.pvariance(values) if values else 0.0
            scales.append((plain.fmean(values) if values else 0.0, math.sqrt(spread) if spread > 1e-8 else 1.0))
        compared = [
            (None, *([(x - m) / s for x in row[c]] for c, (m, s) in zip((1, 2), scales, strict=True)))
            for row in rollouts
        ]
    squares = [plain.fmean([(a - b) ** 2 for a, b in zip(row[1], row[2], strict=True)]) for row in compared]
    return {
        "sigma_s2": variance([-plain.fmean(row[0]) for row in demonstrations], trim),
        "sigma_r2": variance([-plain.fmean(row[2]) for row in rollouts], 0.0),
        "delta_g2": plain.fmean(squares) if squares else math.nan,
        "n_s": float(len(demonstrations)),
        "n_r": float(len(rollouts)),
    }

"""The end of a step as one small program: from its sums to the weights of the next one.

Numbers are blocks of four lanes, either four numbers side by side or one of them four times: of the two kinds of value
that a program has, blocks are the ones on which every operation works in the interpreter, too.
"""

# Triton compiles this source: branches on constants stay nested and written out.

from __future__ import annotations

import triton
import triton.language as tl

from gac_kernels import step_vector
from gac_kernels.triton.gather_kernel import NORMS as _NORMS
from gac_kernels.triton.gather_kernel import _four
from gac_kernels.triton.kernels import _scalar

NOTHING, SUMS, STATISTICS = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
"""What a step has measured: nothing, sums of contributions, statistics by other means."""

_MU = tl.constexpr(step_vector.OFFSETS["mu"])
_MOVED = tl.constexpr(step_vector.OFFSETS["moved"])
_ALPHA = tl.constexpr(step_vector.OFFSETS["alpha"])
_KL = tl.constexpr(step_vector.OFFSETS["kl"])
_LAST = tl.constexpr(step_vector.OFFSETS["last"])
_LEVEL = tl.constexpr(step_vector.OFFSETS["level"])
_AVERAGE = tl.constexpr(step_vector.OFFSETS["average"])
_COUNT = tl.constexpr(step_vector.OFFSETS["count"])
_WAITING = tl.constexpr(step_vector.OFFSETS["waiting"])
_UNSETTLED = tl.constexpr(step_vector.OFFSETS["unsettled"])
_MUS = tl.constexpr(step_vector.OFFSETS["mus"])
_EVIDENCE = tl.constexpr(step_vector.OFFSETS["evidence"])
_SUMS = tl.constexpr(step_vector.OFFSETS["sums"])
_SQUARES = tl.constexpr(step_vector.OFFSETS["squares"])
_SKIPPED = tl.constexpr(step_vector.ROW.index("skipped"))

_CAP = tl.constexpr(step_vector.OPTIONS.index("cap"))
_MU_MIN = tl.constexpr(step_vector.OPTIONS.index("mu_min"))
_MU_MAX = tl.constexpr(step_vector.OPTIONS.index("mu_max"))
_NOISE = tl.constexpr(step_vector.OPTIONS.index("noise"))
_FORGET = tl.constexpr(step_vector.OPTIONS.index("forget"))
_PRIOR_WEIGHT = tl.constexpr(step_vector.OPTIONS.index("prior_weight"))
_PRIOR_SD = tl.constexpr(step_vector.OPTIONS.index("prior_sd"))
_UNKNOWN_WEIGHT = tl.constexpr(step_vector.OPTIONS.index("unknown_weight"))
_KL_TARGET = tl.constexpr(step_vector.OPTIONS.index("kl_target"))
_KL_DECAY = tl.constexpr(step_vector.OPTIONS.index("kl_decay"))
_HYSTERESIS = tl.constexpr(step_vector.OPTIONS.index("hysteresis"))
_ETA_UP = tl.constexpr(step_vector.OPTIONS.index("eta_up"))
_ETA_DOWN = tl.constexpr(step_vector.OPTIONS.index("eta_down"))
_ALPHA_MIN = tl.constexpr(step_vector.OPTIONS.index("alpha_min"))
_ALPHA_MAX = tl.constexpr(step_vector.OPTIONS.index("alpha_max"))
_SURPRISE = tl.constexpr(step_vector.OPTIONS.index("surprise"))
_RATES = tl.constexpr(step_vector.OPTIONS.index("rate_0"))

_STRIDE = tl.constexpr(step_vector.WEIGHT_STRIDE)


@triton.jit
def _one(block, idx, zero, LANE: tl.constexpr):
    """One number of four, four times."""
    return tl.sum(tl.where(idx == LANE, block, 0.0)) + zero


@triton.jit
def _is_finite(x):
    return tl.abs(x) < float("inf")


@triton.jit
def _clamp(x, low, high):
    """``x`` in ``[low, high]``; NaN stays NaN."""
    return tl.where(x < low, low, tl.where(x > high, high, x))


@triton.jit
def _above_0(x):
    """``x``, or 0 where it is below; NaN stays NaN."""
    return tl.where(x < 0.0, 0.0, x)


@triton.jit
def _lerp(a, b, weight):
    """As :func:`torch.lerp`: from whichever end is nearer."""
    return tl.where(weight < 0.5, a + weight * (b - a), b - (b - a) * (1.0 - weight))


@triton.jit
def finish_kernel(
    source,
    old,
    new,
    weights,
    weights_after,
    table,
    settings,
    alpha,
    alpha_high,
    alpha_low,
    prior,
    prior_high,
    prior_low,
    kl,
    kl_high,
    kl_low,
    lone_s,
    lone_r,
    SOURCE: tl.constexpr,
    AVERAGES: tl.constexpr,
    FOLLOWS_KL: tl.constexpr,
):
    """From what a step has measured to the weights of the next: ``new`` and ``weights_after``.

    ``source`` are sums (``[13]``) or statistics (the first ten of them), None for NOTHING. ``old`` and ``new`` are
    state vectors, ``weights`` those that the step's losses had. ``table`` ``[n, 3]`` has a row for each number of
    measurements, of weights of averages and of the factor of a standard error; the last one stays. ``settings`` are
    :data:`gac_kernels.step_vector.OPTIONS`. ``alpha`` counts unless FOLLOWS_KL; a ``prior`` that is NaN is none, one
    that comes as a tensor is clipped to [0, 1] and counts as ``mu`` where it is not finite. ``lone_s`` and ``lone_r``
    are above 0 where noise is that from time.

    ``gac.fused`` has the same on the host, line by line; ``gac.statistics`` and ``gac.laws.gac`` say why.
    """
    idx = tl.arange(0, 4)
    same = idx * 0
    three = idx < 3
    zero = tl.zeros([4], tl.float64)
    nan = zero + float("nan")
    noise = tl.load(settings + _NOISE + same)

    # statistics
    sigma_s2 = nan
    sigma_r2 = nan
    delta_g2 = nan
    distance2 = nan
    norm_s2 = nan
    norm_r2 = nan
    dot = nan
    n_s = zero
    n_r = zero
    nonfinite = zero
    if SOURCE == SUMS:
        # contributions of weight 0 leave no trace
        n_s = tl.where(tl.load(weights + same) > 0.0, tl.load(source + 4 + same), 0.0)
        n_r = tl.where(tl.load(weights + _STRIDE + same) > 0.0, tl.load(source + 5 + same), 0.0)
        nonfinite = tl.load(source + 6 + same)
        norm_s2 = tl.load(source + _NORMS + same)
        norm_r2 = tl.load(source + _NORMS + 1 + same)
        dot = tl.load(source + _NORMS + 2 + same)
        spread_s = _above_0(tl.load(source + same) * tl.load(source + 2 + same) - norm_s2)
        spread_r = _above_0(tl.load(source + 1 + same) * tl.load(source + 3 + same) - norm_r2)
        by_time_s = tl.where(n_s > 0.0, tl.load(source + _NORMS + 3 + same), nan)
        by_time_r = tl.where(n_r > 0.0, tl.load(source + _NORMS + 4 + same), nan)
        sigma_s2 = tl.where(zero + lone_s > 0.0, by_time_s, tl.where(n_s >= 2.0, spread_s / (n_s - 1.0), nan))
        sigma_r2 = tl.where(zero + lone_r > 0.0, by_time_r, tl.where(n_r >= 2.0, spread_r / (n_r - 1.0), nan))
        norm_s2 = tl.where(n_s >= 1.0, norm_s2, nan)
        norm_r2 = tl.where(n_r >= 1.0, norm_r2, nan)
        dot = tl.where((n_s >= 1.0) & (n_r >= 1.0), dot, nan)
        distance2 = _above_0(norm_s2 + norm_r2 - 2.0 * dot)
        delta_g2 = distance2 - (sigma_s2 + sigma_r2)
    if SOURCE == STATISTICS:
        sigma_s2 = tl.load(source + same)
        sigma_r2 = tl.load(source + 1 + same)
        delta_g2 = tl.load(source + 2 + same)
        distance2 = tl.load(source + 3 + same)
        norm_s2 = tl.load(source + 4 + same)
        norm_r2 = tl.load(source + 5 + same)
        dot = tl.load(source + 6 + same)
        n_s = tl.load(source + 7 + same)
        n_r = tl.load(source + 8 + same)
        nonfinite = tl.load(source + 9 + same)
    healthy = nonfinite == 0.0

    # standard errors
    last = tl.load(old + _LAST + idx)
    level = tl.load(old + _LEVEL + idx)
    average = tl.load(old + _AVERAGE + idx)
    count = tl.load(old + _COUNT + idx)
    errors = nan
    moved = zero
    if SOURCE != NOTHING:
        estimate = _four(idx, sigma_s2, sigma_r2, distance2, delta_g2)
        use = _is_finite(estimate) & healthy
        count = count + tl.where(use, 1.0, zero)
        at = table + 3 * tl.minimum(count, 1024.0).to(tl.int32)
        level = tl.where(use, _lerp(level, tl.abs(estimate), tl.load(at)), level)
        difference = tl.where(estimate == last, 0.0, (estimate - last) / level)  # 0 / 0 is no difference
        squared = tl.where(use & (count >= 2.0), difference * difference / 2.0, average)
        average = _lerp(average, squared, tl.load(at + 1))
        errors = level * tl.sqrt(average) * tl.load(at + 2)
        surprise = tl.load(settings + _SURPRISE + same)
        moved = tl.max(tl.where(tl.abs(estimate - last) > surprise * errors, 1.0, zero)) + zero
        last = tl.where(use, estimate, last)
    tl.store(new + _LAST + idx, last)
    tl.store(new + _LEVEL + idx, level)
    tl.store(new + _AVERAGE + idx, average)
    tl.store(new + _COUNT + idx, count)

    # the target's weight
    kept_alpha = tl.load(old + _ALPHA + same)
    kept_kl = tl.load(old + _KL + same)
    if FOLLOWS_KL:
        told = _scalar(kl, kl_high, kl_low) + zero
        decay = tl.load(settings + _KL_DECAY + same)
        smoothed = tl.where(_is_finite(kept_kl), decay * kept_kl + (1.0 - decay) * told, told)
        kept_kl = tl.where(_is_finite(told), smoothed, kept_kl)
        drift = _clamp(kept_kl / tl.load(settings + _KL_TARGET + same) - 1.0, zero - 1.0, zero + 1.0)
        band = tl.load(settings + _HYSTERESIS + same)
        up = tl.load(settings + _ETA_UP + same) * _above_0(drift - band)
        up = up * (tl.load(settings + _ALPHA_MAX + same) - kept_alpha)
        down = tl.load(settings + _ETA_DOWN + same) * _above_0(-drift - band)
        down = down * (kept_alpha - tl.load(settings + _ALPHA_MIN + same))
        kept_alpha = tl.where(_is_finite(kept_kl), kept_alpha + up - down, kept_alpha)
        target_alpha = kept_alpha
    else:
        target_alpha = _scalar(alpha, alpha_high, alpha_low) + zero
    tl.store(new + _ALPHA + same, kept_alpha)
    tl.store(new + _KL + same, kept_kl)

    # averages; of each lane sigma_s2, sigma_r2 and delta_g2 (of squares distance2), the last is never measured
    value = _four(idx, sigma_s2, sigma_r2, delta_g2, nan)
    use = _is_finite(value) & healthy & three
    sure = _is_finite(errors) & three
    squared_error = tl.where(sure, errors * errors, 0.0)
    waiting = tl.load(old + _WAITING + idx, mask=three, other=0.0) + 1.0
    unsettled = tl.load(old + _UNSETTLED + idx, mask=three, other=0.0)
    if AVERAGES == 2:
        evidence = tl.load(old + _EVIDENCE + same)
        evidence2 = tl.load(old + _EVIDENCE + 1 + same)
        if SOURCE != NOTHING:
            # the error, measured in this step, of what both averages of the steps before gave
            short = tl.load(old + _MUS + same)
            long = tl.load(old + _MUS + 1 + same)
            apart = long - short
            apart = tl.where(tl.abs(apart) * 1e9 > 1.0, apart, 0.0)  # 1e9 is a float32 number, 1e-9 is none
            wanted = target_alpha * delta_g2 + noise * sigma_r2
            whole = delta_g2 + noise * sigma_s2 + noise * sigma_r2
            better = apart * ((long + short) * whole - 2.0 * wanted)
            all_used = tl.min(tl.where(use | (idx == 3), 1.0, zero)) + zero
            longest = tl.max(waiting) + zero
            keep = tl.exp(-tl.load(settings + _FORGET + same) * longest)
            known = (all_used > 0.0) & _is_finite(better)
            evidence = tl.where(known, keep * evidence + better, evidence)
            evidence2 = tl.where(known, keep * keep * evidence2 + better * better, evidence2)
        tl.store(new + _EVIDENCE + same, evidence)
        tl.store(new + _EVIDENCE + 1 + same, evidence2)
    else:
        tl.store(new + _EVIDENCE + same, zero)
        tl.store(new + _EVIDENCE + 1 + same, zero)
    raw = nan
    error = nan
    short_raw = nan
    short_error = nan
    news = zero
    for i in tl.static_range(2):
        of_sums = _SUMS + 6 * i + idx
        of_squares = _SQUARES + 9 * i + idx
        total = tl.load(old + of_sums, mask=three, other=0.0)
        weight = tl.load(old + of_sums + 3, mask=three, other=0.0)
        known2 = tl.load(old + of_squares, mask=three, other=0.0)
        sure2 = tl.load(old + of_squares + 3, mask=three, other=0.0)
        all2 = tl.load(old + of_squares + 6, mask=three, other=0.0)
        if i < AVERAGES:
            if SOURCE != NOTHING:
                share = tl.load(settings + _RATES + 2 * i + 1 + same)
                keep = tl.exp(-tl.load(settings + _RATES + 2 * i + same) * waiting)
                first = weight == 0.0
                share2 = share * share
                keep2 = keep * keep
                total = tl.where(use, share * value + keep * total, total)
                weight = tl.where(use, share + keep * weight, weight)
                known2 = tl.where(use, share2 * squared_error + keep2 * known2, known2)
                sure2 = tl.where(use, tl.where(sure, share2, 0.0) + keep2 * sure2, sure2)
                all2 = tl.where(use, share2 + keep2 * all2, all2)
                if i == AVERAGES - 1:
                    unsettled = tl.where(use, tl.where(first, unsettled, keep * unsettled), unsettled)
                    news = tl.max(tl.where(use, unsettled * (share / weight), 0.0)) + zero
            smoothed = _above_0(total / weight)
            deviation = tl.sqrt(known2 * all2 / sure2) / weight
            mean_s2 = _one(smoothed, idx, zero, 0)
            mean_r2 = _one(smoothed, idx, zero, 1)
            mean_g2 = _one(smoothed, idx, zero, 2)
            raw = target_alpha * mean_g2 + noise * mean_r2
            raw = raw / (mean_g2 + noise * mean_s2 + noise * mean_r2)
            rest = (1.0 - noise) * raw
            lever = _four(idx, target_alpha - rest, target_alpha - noise - rest, raw - target_alpha, zero)
            part = lever * (deviation / (mean_g2 + noise * (mean_s2 + mean_r2)))
            error = tl.sqrt(tl.sum(tl.where(three, part * part, 0.0)) + zero)
            if i == 0:
                short_raw = raw
                short_error = error
        tl.store(new + of_sums, total, mask=three)
        tl.store(new + of_sums + 3, weight, mask=three)
        tl.store(new + of_squares, known2, mask=three)
        tl.store(new + of_squares + 3, sure2, mask=three)
        tl.store(new + of_squares + 6, all2, mask=three)
    if SOURCE != NOTHING:
        waiting = tl.where(use, 0.0, waiting)
    tl.store(new + _WAITING + idx, waiting, mask=three)
    tl.store(new + _UNSETTLED + idx, unsettled, mask=three)
    tl.store(new + _MUS + idx, _four(idx, short_raw, raw, zero, zero), mask=idx < 2)
    if AVERAGES == 2:
        ahead = tl.where(evidence2 > 0.0, evidence / tl.sqrt(evidence2), 0.0)
        follows = 1.0 / (1.0 + tl.exp(-2.0 * (ahead - 2.0)))
        error = tl.where(error == short_error, error, _lerp(error, short_error, follows))
        raw = _lerp(raw, short_raw, follows)

    # guardrails
    mu = tl.load(old + _MU + same)
    known = _is_finite(raw)
    leaning = _scalar(prior, prior_high, prior_low) + zero
    if prior is not None:
        leaning = tl.where(_is_finite(leaning), _clamp(leaning, zero, zero + 1.0), mu)
    leans = leaning == leaning
    set_weight = tl.load(settings + _PRIOR_WEIGHT + same)
    ratio = tl.load(settings + _PRIOR_SD + same) / error
    least = 1.0 / (1.0 + ratio * ratio)
    least = tl.where(least == least, least, tl.load(settings + _UNKNOWN_WEIGHT + same))
    of_prior = tl.where(set_weight == set_weight, set_weight, least)
    blend = tl.where(known, _lerp(raw, leaning, of_prior), leaning)
    target = tl.where(leans, blend, tl.where(known, raw, mu))
    news = tl.where(leans, tl.where(known, news * (1.0 - of_prior), 0.0), news)
    reach = tl.load(settings + _CAP + same) + news
    next_mu = mu + _clamp(target - mu, -reach, reach)
    next_mu = _clamp(next_mu, tl.load(settings + _MU_MIN + same), tl.load(settings + _MU_MAX + same))
    mu = tl.where(healthy, next_mu, mu)
    skipped = tl.load(old + _SKIPPED + same) + tl.where(healthy, 0.0, 1.0)
    tl.store(new + _MU + same, mu)
    tl.store(new + _MOVED + same, moved)

    # weights: quotients of float32 numbers that float64 rounds first come out the same
    of_s = mu.to(tl.float32)
    of_r = (1.0 - of_s.to(tl.float64)).to(tl.float32)
    pair = _four(idx, of_s, of_r, of_s, of_r).to(tl.float64)
    undone = tl.where(pair > 0.0, 1.0 / pair, 0.0)
    tl.store(weights_after + idx * _STRIDE, tl.where(idx < 2, pair, undone).to(tl.float32))

    cosine = dot / (tl.sqrt(norm_s2) * tl.sqrt(norm_r2))
    tl.store(new + idx, _four(idx, of_s.to(tl.float64), raw, error, leaning))
    tl.store(new + 4 + idx, _four(idx, skipped, sigma_s2, sigma_r2, delta_g2))
    tl.store(new + 8 + idx, _four(idx, distance2, norm_s2, norm_r2, dot))
    tl.store(new + 12 + idx, _four(idx, n_s, n_r, nonfinite, _one(errors, idx, zero, 0)))
    last_errors = _four(idx, _one(errors, idx, zero, 1), _one(errors, idx, zero, 2), _one(errors, idx, zero, 3), cosine)
    tl.store(new + 16 + idx, last_errors)

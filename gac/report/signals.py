"""Signal and noise of both branches, of the whole model and of each module, from the columns of a history."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gac.report.estimates import MEASURABLE, Estimate, estimate
from gac.statistics.by_module import COLUMNS, ModuleStatistics

WHOLE = "whole model"
BRANCHES = {"s": "sft", "r": "rl"}
_OF_WHOLE = ("delta_g2", "sigma_s2", "sigma_r2")


@dataclass(frozen=True)
class BranchSignal:
    """Signal and noise of one branch's gradient, of the whole model or of one module.

    Attributes:
        norm: ``|G|^2`` as observed, signal and noise together.
        signal: ``|g|^2``, unbiased; may be negative where it drowns.
        noise: ``sigma2``, noise of the gradient of one step.
        snr: ``|g|^2 / sigma2``; an upper bound where the signal is not measurable.
        noise_scale: ``B_simple`` in the report's unit; a lower bound where the signal is not measurable.
        noise_share: this module's part of the whole model's noise.
    """

    norm: Estimate
    signal: Estimate
    noise: Estimate
    snr: Estimate
    noise_scale: Estimate
    noise_share: Estimate


@dataclass(frozen=True)
class ModuleSummary:
    """One row of a report: the whole model or a module.

    ``cosine`` is NaN where either signal is not measurable, ``disagreement_share`` where the whole model's
    disagreement is not.
    """

    label: str
    sft: BranchSignal
    rl: BranchSignal
    cosine: Estimate
    disagreement: Estimate
    disagreement_share: Estimate


def contribution_counts(history: Sequence[ModuleStatistics]) -> Tensor | None:
    """``[T, 2]``: contributions of both branches in every step; None where some step does not tell."""
    wholes = [s.whole for s in history if s.whole is not None]
    if len(wholes) < len(history):
        return None
    counts = torch.tensor([[float(whole.n_s), float(whole.n_r)] for whole in wholes], dtype=torch.float64)
    return counts if bool((counts > 0).any()) else None


def series_of(
    history: Sequence[ModuleStatistics], counts: Tensor | None, sizes: Mapping[str, float] | None
) -> dict[str, Tensor]:
    """The columns of all steps, each ``[T, 1 + M]`` in float64 on the CPU, the whole model first.

    Beside those of a step: ``spread_b``, ``n_b * sigma_b2`` in the report's unit, and the numbers of the whole model
    that modules have shares of.
    """
    modules = torch.stack([s.values.to("cpu", torch.float64) for s in history])
    whole = modules.sum(1)
    for index, statistics in enumerate(history):
        if statistics.whole is not None:
            whole[index] = torch.stack([getattr(statistics.whole, name) for name in COLUMNS]).to("cpu", torch.float64)
    together = torch.cat([whole[:, None], modules], 1)
    series = dict(zip(COLUMNS, together.unbind(-1), strict=True))
    for k, (letter, branch) in enumerate(BRANCHES.items()):
        n = torch.ones(len(history), dtype=torch.float64) if counts is None else counts[:, k]
        size = sizes[branch] if sizes and counts is not None else 1.0
        series[f"spread_{letter}"] = n[:, None] * size * series[f"sigma_{letter}2"]
    for name in _OF_WHOLE:
        series[f"whole_{name}"] = series[name][:, :1].expand_as(series[name])
    return series


def summaries(labels: Sequence[str], series: Mapping[str, Tensor], weights: Tensor) -> list[ModuleSummary]:
    """Averages every column over steps and makes a row for each of ``labels``, the whole model first.

    Args:
        labels: of the ``1 + M`` rows.
        series: what :func:`series_of` returns, each ``[T, 1 + M]``.
        weights: ``[T]`` float64, of steps.
    """

    def over(function: Callable[..., Tensor], *names: str) -> list[Estimate]:
        value, se = estimate(function, [series[name] for name in names], weights)
        return [Estimate(v, e) for v, e in zip(value.tolist(), se.tolist(), strict=True)]

    identity, ratio = (lambda x: x), (lambda x, y: x / y)
    branches = {}
    for letter, name in BRANCHES.items():
        norm, sigma, spread = f"norm_{letter}2", f"sigma_{letter}2", f"spread_{letter}"
        branches[name] = [
            _branch(*row)
            for row in zip(
                over(identity, norm),
                over(lambda n, s: n - s, norm, sigma),
                over(identity, sigma),
                over(lambda n, s: (n - s) / s, norm, sigma),
                over(lambda n, s, k: k / (n - s), norm, sigma, spread),
                over(identity, spread),
                over(ratio, sigma, f"whole_{sigma}"),
                strict=True,
            )
        ]
    cosines = over(_cosine, "dot", "norm_s2", "sigma_s2", "norm_r2", "sigma_r2")
    disagreements = over(identity, "delta_g2")
    shares = over(ratio, "delta_g2", "whole_delta_g2")
    rows = []
    for label, sft, rl, cosine, disagreement, share in zip(
        labels, branches["sft"], branches["rl"], cosines, disagreements, shares, strict=True
    ):
        clear = sft.signal.measurable and rl.signal.measurable
        cosine = Estimate(min(max(cosine.value, -1.0), 1.0), cosine.se) if clear and cosine.known else Estimate()
        share = share if disagreements[0].measurable else Estimate()
        rows.append(ModuleSummary(label, sft, rl, cosine, disagreement, share))
    return rows


def _cosine(dot: Tensor, norm_s: Tensor, sigma_s: Tensor, norm_r: Tensor, sigma_r: Tensor) -> Tensor:
    return dot / ((norm_s - sigma_s) * (norm_r - sigma_r)).sqrt()


def _branch(
    norm: Estimate, signal: Estimate, noise: Estimate, snr: Estimate, scale: Estimate, spread: Estimate, share: Estimate
) -> BranchSignal:
    """Ratios over a signal that may be zero say nothing; what its upper end leaves possible is a bound."""
    if not signal.measurable:
        snr, scale = Estimate(), Estimate()
        if signal.upper > 0 and noise.value > 0:  # False where an error is not known
            snr = Estimate(signal.upper / noise.value, bound="<")
            scale = Estimate(spread.value / signal.upper, bound=">")
    return BranchSignal(norm, signal, noise, snr, scale, share)


def map_column(series: Mapping[str, Tensor], weights: Tensor) -> dict[str, Tensor]:
    """The numbers of :meth:`Report.maps` at one time, each ``[1 + M]``."""
    over = lambda function, *names: estimate(function, [series[name] for name in names], weights)
    difference, ratio = (lambda x, y: x - y), (lambda x, y: x / y)
    clear = {}
    for letter in BRANCHES:
        value, se = over(difference, f"norm_{letter}2", f"sigma_{letter}2")
        clear[letter] = value > MEASURABLE * se.nan_to_num()
    cosine = over(_cosine, "dot", "norm_s2", "sigma_s2", "norm_r2", "sigma_r2")[0].clamp(-1, 1)
    delta, error = over(lambda x: x, "delta_g2")
    share = torch.where(
        delta[0] > MEASURABLE * error[0].nan_to_num(), over(ratio, "delta_g2", "whole_delta_g2")[0], math.nan
    )
    share[0] = over(ratio, "delta_g2", "distance2")[0][0]
    return {
        "disagreement": share,
        "cosine": torch.where(clear["s"] & clear["r"], cosine, math.nan),
        "noise_sft": over(ratio, "sigma_s2", "norm_s2")[0],
        "noise_rl": over(ratio, "sigma_r2", "norm_r2")[0],
    }

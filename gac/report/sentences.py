"""A report's numbers in words."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from gac.report.estimates import Estimate, digits
from gac.report.signals import BranchSignal, ModuleSummary

TITLES = {"sft": "SFT", "rl": "RL"}

OPPOSED = 3.0
"""Standard errors below zero from which a cosine is called negative: among dozens of modules two are chance."""

_PAYS, _LITTLE = 1.5, 1.1
"""What twice the batch multiplies a step's progress by (at most 2) where it pays, and where it brings little."""

_ENOUGH = (2 - _LITTLE) / (2 * (_LITTLE - 1))
"""Batch over noise scale, hence SNR, from which twice the batch brings little: where :func:`_gain` is that."""

_MOST = 4
"""Places that a sentence names."""

_FEW = 0.5
"""Share of groups whose rewards differ below which most groups say nothing."""


class Findings(NamedTuple):
    """What sentences are made of.

    Attributes:
        whole: of the whole model. modules: in model order.
        batch: of a step, for ``"sft"`` and ``"rl"``. unit: what it counts; None where it is not known.
        informative_groups: share of the groups of rollouts whose rewards differ; NaN where it is not known.
    """

    whole: ModuleSummary
    modules: Sequence[ModuleSummary]
    batch: Mapping[str, float]
    unit: str | None
    informative_groups: float = math.nan


def sentences(report: Findings) -> list[str]:
    """What a reader should take away, a sentence or two for each branch and for their disagreement."""
    found = []
    for name, title in TITLES.items():
        branch: BranchSignal = getattr(report.whole, name)
        if not branch.norm.known:
            found.append(f"{title}: no gradient was measured.")
        elif branch.norm.value == 0:
            found.append(f"{title}: the gradient is zero.")
        elif not branch.noise.known:
            found.append(f"{title}: the noise is not known; it takes two contributions of the branch in a step.")
        else:
            found.append(_batch(report, name, title, branch) + _loudest(report, name))
    if report.informative_groups < _FEW:
        found.append(
            f"Most groups of rollouts say nothing: in {1 - report.informative_groups:.0%} of them all rewards are the "
            "same, their advantages are 0, and the RL gradient is that of the others alone. Prompts that are neither "
            "solved always nor never, or more rollouts for each, change that."
        )
    if any("noiseless" in sentence for sentence in found):
        found.append(
            "Progress is that of a quadratic model with the best step size for each batch (McCandlish et al. 2018): "
            "a guide to the batch size, not a forecast."
        )
    if report.whole.sft.norm.known and report.whole.rl.norm.known:
        found += _disagreement(report)
    return found


def _batch(report: Findings, name: str, title: str, branch: BranchSignal) -> str:
    """What a larger batch would bring: progress at B is 1/(1 + B_simple/B) of a noiseless step's."""
    batch = f" of {report.batch[name]:.4g} {report.unit}" if report.unit is not None else ""
    if branch.noise.value <= 0:
        return f"{title}: no noise was seen; a larger batch would change nothing."
    if not branch.snr.known:
        return f"{title}: the signal does not stand out from the noise in what was measured; measure more steps."
    now, gain = branch.snr.value / (1 + branch.snr.value), _gain(branch.snr.value)
    if branch.snr.bound:
        return (
            f"{title}: the signal cannot be told from the noise. With the present batch{batch} a step makes less than "
            f"{now:.0%} of the progress of a noiseless one; twice the batch would make it at least {gain:.2f} times "
            "as much."
        )
    pays = "would pay" if gain > _PAYS else "would bring little" if gain < _LITTLE else "would pay in part"
    text = (
        f"{title}: with the present batch{batch} a step makes about {now:.0%} of the progress of a noiseless one; "
        f"twice the batch would make it {gain:.2f} times as much: a larger batch {pays}."
    )
    if gain >= _LITTLE and report.unit is not None:
        most = digits(_ENOUGH * branch.noise_scale.value, 2)
        text += f" The noise scale says that batches above about {most} {report.unit} bring little."
    return text


def _gain(snr: float) -> float:
    """Progress of a step with twice the batch over that of one with the present, which has this ratio."""
    return 2 * (1 + snr) / (1 + 2 * snr)


def _loudest(report: Findings, name: str) -> str:
    """The module with the most noise, where it has more than twice an even part of it."""
    rows: list[tuple[Estimate, str]] = [(getattr(row, name).noise_share, row.label) for row in report.modules]
    known = [row for row in rows if row[0].known]
    if not known:
        return ""
    share, label = max(known, key=lambda row: row[0].value)
    if share.value * len(rows) < 2:
        return ""
    return f" The noisiest module is {label}, with {share.text(percent=True)} of the noise."


def _disagreement(report: Findings) -> list[str]:
    whole = report.whole
    if not whole.disagreement.known:
        return ["The disagreement of the branches was not measured: it needs the noise of both in the same step."]
    if not whole.disagreement.measurable:
        nothing = "No disagreement of the branches stands out from the noise"
        if math.isnan(whole.disagreement.se):
            return [nothing + "."]
        noise = whole.sft.noise.value + whole.rl.noise.value
        most = digits(whole.disagreement.upper, 2)
        return [f"{nothing}: |g_s - g_r|^2 is below {most}, beside a noise of {digits(noise, 2)} of both together."]
    found: list[str] = []
    ranked = [row for row in report.modules if row.disagreement_share.measurable]
    ranked.sort(key=lambda row: row.disagreement_share.value, reverse=True)
    if len(report.modules) > 1 and ranked:
        first = f"The branches disagree most in {ranked[0].label} ({ranked[0].disagreement_share.text(percent=True)}"
        first += " of the disagreement)"
        if len(ranked) > 1:
            first += f", then in {ranked[1].label} ({ranked[1].disagreement_share.text(percent=True)})"
        found.append(first + ".")
    opposed = [row for row in report.modules if row.cosine.known and row.cosine.value < -OPPOSED * row.cosine.se]
    if opposed:
        lowest = min(opposed, key=lambda row: row.cosine.value)
        found.append(
            f"Demonstrations pull against rewards in {places([row.label for row in opposed])}: the gradients oppose "
            f"each other in {len(opposed)} of {len(report.modules)} modules, most in {lowest.label} (cosine "
            f"{lowest.cosine.text()})."
        )
    return found


_LAYER = re.compile(r"(?:(?P<stack>.+)\.)?layers\.(?P<index>\d+)(?:\..*)?")


def places(labels: Sequence[str]) -> str:
    """Modules in a few words: ``layers 3 and 8 to 11, head``. A layer is named where any of its modules is.

    Args:
        labels: of modules, in model order, at least one.
    """
    layers: dict[str, list[int]] = {}
    others = []
    for label in labels:
        layer = _LAYER.fullmatch(label)
        if layer is None:
            others.append(label)
        else:
            layers.setdefault(layer["stack"] or "", []).append(int(layer["index"]))
    words = []
    for stack, indices in layers.items():
        runs: list[list[int]] = []
        for index in sorted(set(indices)):
            if runs and runs[-1][-1] == index - 1:
                runs[-1].append(index)
            else:
                runs.append([index])
        spans = [f"{run[0]} to {run[-1]}" if len(run) > 1 else str(run[0]) for run in runs]
        name = "layer" if spans == [str(indices[0])] else "layers"
        listed = ", ".join(spans[:-1]) + " and " + spans[-1] if len(spans) > 1 else spans[0]
        words.append(f"{stack} {name} {listed}".strip())
    shown = words + others[: max(_MOST - len(words), 1)]
    left = len(words) + len(others) - len(shown)
    return ", ".join(shown) + (f" and {left} more" if left else "")

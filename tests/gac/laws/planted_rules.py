"""Candidates beside the package's laws: rules from elsewhere, and laws with a part left out."""

from __future__ import annotations

from collections.abc import Callable
from math import isfinite

from gac.statistics.worth import WORTH
from tests.gac.laws.planted import Rows, answers_of

KEEP = 0.5 ** (1 / 69)
"""Of the averages; with the bounds and the start of law ``gac``."""


def _averaged(rule: Callable[[float, float, float, float], float]) -> Callable[[Rows], list[float]]:
    """``rule(mu, |g_s|^2, |g_r|^2, <g_s, g_r>)``, of averages of what is measured without bias."""

    def answer(rows: Rows) -> list[float]:
        sums, weights, mu, found = [0.0] * 3, [0.0] * 3, 0.5, []
        for row in rows:
            told = row["norm_s2"] - row["sigma_s2"], row["norm_r2"] - row["sigma_r2"], row["dot"]
            for k, value in enumerate(told):
                if isfinite(value):
                    sums[k], weights[k] = KEEP * sums[k] + (1 - KEEP) * value, KEEP * weights[k] + 1 - KEEP
            if all(weights):
                a, b, c = (total / weight for total, weight in zip(sums, weights, strict=True))
                mu = min(max(rule(mu, max(a, 1e-12), max(b, 1e-12), c), 0.05), 0.95)
            found.append(mu)
        return found

    return answer


def _meta(mu: float, a: float, b: float, c: float) -> float:
    """The gradient of the reward by ``mu``, of what RL's own step is worth, at a rate of 0.01."""
    return mu + 0.01 * (c - b) / b


def _mgda(mu: float, a: float, b: float, c: float) -> float:
    """The shortest mixture of both gradients (Desideri 2012; Sener and Koltun 2018)."""
    return (b - c) / max(a + b - 2 * c, 1e-12)


def _pcgrad(mu: float, a: float, b: float, c: float) -> float:
    """Each gradient without what opposes the other (Yu et al. 2020)."""
    of_s, of_r = 1 - min(c, 0.0) / a, 1 - min(c, 0.0) / b
    return of_s / (of_s + of_r)


def _equal(mu: float, a: float, b: float, c: float) -> float:
    """Equal lengths of both gradients: GradNorm (Chen et al. 2018) where both losses fall alike."""
    return b**0.5 / (a**0.5 + b**0.5)


def _without_products(rows: Rows) -> list[float]:
    blank = dict.fromkeys(WORTH, float("nan"))
    return answers_of("aim")([row | blank for row in rows])


CANDIDATES: dict[str, Callable[[Rows], list[float]]] = {
    "gac": answers_of("gac"),
    "gac alpha=0": answers_of("gac", alpha=0.0),
    "meta": _averaged(_meta),
    "MGDA": _averaged(_mgda),
    "PCGrad": _averaged(_pcgrad),
    "equal lengths": _averaged(_equal),
    "aim": answers_of("aim"),
    "aim alpha=0.5": answers_of("aim", alpha=0.5),
    "aim, one step": _without_products,
}
"""By their names in docs/laws.md."""

PARTS = ("aim alpha=0.5", "aim, one step")
"""Law ``aim`` with its aim pinned, and without products over steps."""
TELLING = ("rl-noise", "sft-beside", "sft-opposed", "quiet-teacher", "quiet-opposed", "unit-100", "learned-noise-stays")
"""Situations that these are judged in."""


def is_judged(candidate: str, situation: str) -> bool:
    """Whether the page has a figure of it."""
    return candidate not in PARTS or situation in TELLING

"""Laws that only the study needs: the default law with one part taken out, or another aim."""

import contextlib
from collections.abc import Iterator

import torch

from gac.laws.base import Law, Step, number, register, unit_interval, unregister
from gac.laws.gac import GacLaw
from gac.statistics import Statistics


class NoDisagreementLaw(GacLaw):
    """The default law that takes both gradients to point the same way: ``mu = sigma_r2 / (sigma_s2 + sigma_r2)``."""

    def _smoothed(self) -> torch.Tensor:
        smoothed = super()._smoothed()
        return smoothed * torch.tensor([1.0, 1.0, 0.0]).to(smoothed)


class NoVarianceLaw(GacLaw):
    """The default law that takes both gradients to be free of noise: mu goes to ``alpha``, whatever is measured."""

    def _smoothed(self) -> torch.Tensor:
        smoothed = super()._smoothed()
        return smoothed * torch.tensor([0.0, 0.0, 1.0]).to(smoothed)


class DirectionLaw(Law):
    """The mu whose mixed gradient points best, for optimizers such as Adam that divide its length out again.

    The default law takes the least ``E|G(mu) - g*|^2`` about ``g* = alpha*g_s + (1-alpha)*g_r``; it may buy a small
    error with a short gradient. Without regard to length, the weights that maximise ``E<G, g*> / sqrt(E|G|^2)`` of
    ``G = x*G_s + y*G_r`` solve ``M (x, y) = v`` up to a factor, with ``M`` the second moments ``E|G_s|^2``,
    ``E<G_s, G_r>``, ``E|G_r|^2`` and ``v = (<g_s, g*>, <g_r, g*>)``; then ``mu = x / (x + y)``. Where both gradients
    are orthogonal this weighs each branch by the share of signal in it. There is one average, of half-life 69 steps,
    clamped at 0 after averaging, so that ``half_life=69`` is the form to compare it with; bounds and start are the
    default law's. A step may move mu by the cap and the newest measurement's share in the average, which goes to 0.01
    and not, as in the default law, to 0.
    """

    def __init__(self, half_life: float = 69.0, alpha: float = 0.5, cap: float = 0.02) -> None:
        super().__init__(0.5)
        self.half_life = number("half_life", half_life, 1e-3, 1e9)
        self.alpha = unit_interval("alpha", alpha)
        self.cap = unit_interval("cap", cap)
        self.state["sums"] = torch.zeros(6, dtype=torch.float64)  # norm_s2, norm_r2, dot, sigma_s2, sigma_r2; weight

    def update(self, statistics: Statistics | None, step: Step) -> torch.Tensor:
        mu = self.mu
        if statistics is None:
            return mu
        names = ("norm_s2", "norm_r2", "dot", "sigma_s2", "sigma_r2")
        told = torch.stack([getattr(statistics, name) for name in names] + [torch.ones_like(statistics.dot)]).to(mu)
        use = torch.isfinite(told).all() & (statistics.nonfinite == 0)
        keep = 2.0 ** (-1 / self.half_life)
        self.state["sums"] = torch.where(use, keep * self.state["sums"] + (1 - keep) * told, self.state["sums"])
        *sums, weight = self.state["sums"].unbind()
        norm_s2, norm_r2, dot, sigma_s2, sigma_r2 = (value / weight for value in sums)
        signal_s2, signal_r2 = (norm_s2 - sigma_s2).clamp(min=0.0), (norm_r2 - sigma_r2).clamp(min=0.0)
        along_s = self.alpha * signal_s2 + (1 - self.alpha) * dot
        along_r = self.alpha * dot + (1 - self.alpha) * signal_r2
        x = (norm_r2 * along_s - dot * along_r).clamp(min=0.0)
        y = (norm_s2 * along_r - dot * along_s).clamp(min=0.0)
        raw = x / (x + y)
        reach = self.cap + (1 - keep) / weight  # the first measurements may move it further
        moved = (mu + (raw - mu).clamp(-reach, reach)).clamp(0.05, 0.95)
        self.record("raw", raw)
        self.record("mu", torch.where(use & torch.isfinite(raw), moved, mu))
        return self.mu


LAWS = {
    "gac-no-disagreement": NoDisagreementLaw,
    "gac-no-variance": NoVarianceLaw,
    "gac-direction": DirectionLaw,
}


@contextlib.contextmanager
def registered() -> Iterator[None]:
    """These laws can be named inside, and are gone from the registry afterwards."""
    for name, law in LAWS.items():
        register(name)(law)
    try:
        yield
    finally:
        for name in LAWS:
            unregister(name)

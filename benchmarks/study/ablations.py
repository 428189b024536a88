"""Laws that only the study needs: the default law with one part taken out."""

import torch

from gac.laws.base import register
from gac.laws.gac import GacLaw


@register("gac-no-disagreement")
class NoDisagreementLaw(GacLaw):
    """The default law that takes both gradients to point the same way: ``mu = sigma_r2 / (sigma_s2 + sigma_r2)``."""

    def _smoothed(self) -> torch.Tensor:
        smoothed = super()._smoothed()
        return smoothed * torch.tensor([1.0, 1.0, 0.0]).to(smoothed)


@register("gac-no-variance")
class NoVarianceLaw(GacLaw):
    """The default law that takes both gradients to be free of noise: mu goes to ``alpha``, whatever is measured."""

    def _smoothed(self) -> torch.Tensor:
        smoothed = super()._smoothed()
        return smoothed * torch.tensor([0.0, 0.0, 1.0]).to(smoothed)

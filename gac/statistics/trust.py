"""How sure it is that a teacher points the way of the reward, from an inner product and its standard error."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def probability_right(c: Tensor, error: Tensor, scale: Tensor, prior: float) -> Tensor:
    """Probability that ``c`` is above 0, of a teacher who is right, useless or wrong; the prior where unknown.

    Right: ``c`` is half-normal of this scale above 0. Useless: it is 0. Wrong: half-normal below 0. The last two share
    what the prior leaves. ``c`` is measured with a Gaussian error. The scale is not taken to be below that: a sign that
    is measured counts, whatever is known of the lengths.

    Args:
        c, error, scale: of one shape, any float dtype; ``error`` NaN or 0 where nothing is known.
        prior: in (0, 1).
    """
    t, share = c / error, scale.square() / (scale.square() + error.square())
    known = torch.isfinite(t) & (error > 0)
    t, share = torch.where(known, t, 0.0), torch.where(known, share.nan_to_num(0.0).clamp(min=0.5), 0.0)
    log_k = 0.5 * torch.log1p(-share.clamp(max=1 - 1e-15)) + 0.5 * t.square() * share
    u = t * share.sqrt()
    right = math.log(2 * prior) + log_k + torch.special.log_ndtr(u)
    wrong = math.log(1 - prior) + log_k + torch.special.log_ndtr(-u)
    useless = torch.full_like(wrong, math.log((1 - prior) / 2))
    return torch.sigmoid(right - torch.logaddexp(wrong, useless))

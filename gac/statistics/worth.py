"""What steps were worth: inner products of a step's gradients with those of the steps before it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

WORTH = ("worth_ss", "worth_sr", "worth_rs", "worth_rr")
"""The four products: whose loss, then whose steps."""


@dataclass(frozen=True)
class Worth:
    """Inner products of a step's gradients with the averages of earlier ones, in units of the squared gradient norm.

    With ``M_b`` the average of branch b's gradients of earlier steps, weights of losses divided out, ``<G_r, M_s>`` is
    what SFT's part in the optimizer's latest steps was worth to the reward, at the point they have led to, for each
    unit of learning rate (``docs/laws.md``).

    Attributes:
        values: ``[4]``, in the order of :data:`WORTH`: ``<G_s, M_s>``, ``<G_s, M_r>``, ``<G_r, M_s>``, ``<G_r, M_r>``;
            NaN where a branch has no gradient now or had none before.
        errors: ``[4]``, standard errors; NaN where unknown.
    """

    values: Tensor
    errors: Tensor

"""The sequences that a pass tells ``mixer.observe_tokens``, and what the coefficient estimator has to make of them."""

from __future__ import annotations

import random

import torch
from torch import Tensor

from tests.fuzz.draw import Pass
from tests.gac.statistics.coefficients import by_definition

LENGTH = 4


def sequences(one: Pass) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probabilities, advantages, mask and who is a demonstration: some are empty, some NaN."""
    r, generator = random.Random(one.seed), torch.Generator().manual_seed(one.seed)
    rows = one.rows or 0
    dtype = r.choice((torch.float32, torch.float64, torch.bfloat16))
    logprobs = -2 * torch.rand(rows, LENGTH, generator=generator, dtype=torch.float64)
    advantages = torch.randn(*r.choice(((rows,), (rows, LENGTH))), generator=generator, dtype=torch.float64)
    mask = torch.arange(LENGTH) < torch.randint(0, LENGTH + 1, (rows, 1), generator=generator)
    is_expert = torch.rand(rows, generator=generator) < r.choice((0.0, 0.4, 0.4, 1.0))
    if r.random() < 0.05 and rows:
        logprobs[0, 0] = float("nan")
    return logprobs.to(dtype), advantages.to(dtype), mask, is_expert


def coefficients(passes: list[Pass], *, always: bool) -> tuple[dict[str, float] | None, bool]:
    """The statistics of the sequences that these passes tell, and whether a token that counts is not finite.

    Without any they are None, or, ``always``, those of no sequence.
    """
    told = [sequences(one) for one in passes if one.rows is not None]
    if not told and not always:
        return None, False
    told.append(sequences(Pass("sft", 0, rows=0)))
    logprobs, mask, is_expert = (
        torch.cat([each[k].double() if k == 0 else each[k] for each in told]) for k in (0, 2, 3)
    )
    advantages = torch.cat([_wide(each[1].double()) for each in told])
    sick = bool((mask & ~torch.isfinite(logprobs)).any())
    if sick:
        return {}, True
    return by_definition(logprobs, advantages, mask, is_expert, z_normalize=True, phi=True, trim=0.1), False


def _wide(advantages: Tensor) -> Tensor:
    return advantages if advantages.dim() == 2 else advantages[:, None].expand(-1, LENGTH)

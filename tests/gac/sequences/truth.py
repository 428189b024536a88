"""Mixed batches of small models, and the statistics of their rows from float64 gradients of one row at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from tests.gac.models import VOCABULARY
from tests.gac.truth import statistics


@dataclass(frozen=True)
class Batch:
    """Rows of a mixed batch: ``weights`` are what a row's loss has within the loss of its branch."""

    ids: Tensor
    is_expert: Tensor
    weights: Tensor

    def __getitem__(self, rows) -> Batch:
        return replace(self, ids=self.ids[rows], is_expert=self.is_expert[rows], weights=self.weights[rows])


def mixed(rows: int = 6, length: int = 8, *, seed: int = 0) -> Batch:
    """Half demonstrations, in mixed order; rollouts have advantages of both signs."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCABULARY, (rows, length), generator=generator)
    is_expert = torch.randperm(rows, generator=generator) < rows // 2
    advantages = torch.randn(rows, generator=generator)
    weights = torch.where(is_expert, 1.0, advantages) / torch.where(is_expert, is_expert.sum(), (~is_expert).sum())
    return Batch(ids, is_expert, weights)


def row_losses(model: nn.Module, ids: Tensor) -> Tensor:
    """``[B]``: the mean NLL of the next token in each row."""
    logp = model(input_ids=ids).logits[:, :-1].log_softmax(-1)
    return -logp.gather(-1, ids[:, 1:, None])[..., 0].mean(1)


def losses(model: nn.Module, batch: Batch, rows=row_losses) -> dict[str, Tensor]:
    """The arguments of ``mixer.mixed_loss``."""
    weighted = rows(model, batch.ids) * batch.weights
    return {"sft_loss": weighted[batch.is_expert].sum(), "rl_loss": weighted[~batch.is_expert].sum()}


def row_gradients(model: nn.Module, batch: Batch, rows=row_losses) -> list[Tensor]:
    """The flat gradient of each row's part of its branch's loss, in float64, a row at a time."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    found = []
    for k in range(len(batch.ids)):
        loss = batch.weights[k] * rows(model, batch.ids[k : k + 1])[0]
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        flat = [torch.zeros_like(p) if g is None else g for g, p in zip(gradients, parameters, strict=True)]
        found.append(torch.cat([g.double().flatten() for g in flat]))
    return found


def expected(model: nn.Module, batches: Sequence[Batch], groups=None, rows=row_losses) -> dict[str, float]:
    """The fields of gac.Statistics; rows of a branch with one number of ``groups`` are one contribution."""
    contributions: dict[bool, dict] = {True: {}, False: {}}
    number = 0
    for batch in batches:
        for k, gradient in enumerate(row_gradients(model, batch, rows)):
            label = ("row", number) if groups is None or groups[number] < 0 else groups[number]
            own = contributions[bool(batch.is_expert[k])]
            own[label] = own.get(label, 0.0) + gradient
            number += 1
    return statistics(*(list(contributions[branch].values()) for branch in (True, False)))


def assert_close(found, wanted: dict[str, float], rel: float = 2e-4) -> None:
    """Within rounding of float32 passes, in units of the largest number."""
    scale = max(abs(v) for name, v in wanted.items() if name not in ("n_s", "n_r") and v == v)
    for name, value in wanted.items():
        got = float(getattr(found, name))
        if value != value:
            assert got != got, name
        else:
            assert abs(got - value) <= rel * (scale if name not in ("n_s", "n_r") else 1.0), (name, got, value)

"""The sketch's own error: none on average over signs, small in a single step (``pytest -rP`` prints the figures)."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import gac
from tests.gac.models import VOCABULARY
from tests.gac.sequences.truth import Batch, expected, losses, mixed

SUMS = ("sigma_s2", "sigma_r2", "delta_g2", "distance2", "norm_s2", "norm_r2", "dot")


class EveryKind(nn.Module):
    """Each kind of layer, wider than its sketch: tied head, positions, biases, both norms, and biases by themselves."""

    def __init__(self, width: int = 72):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCABULARY, width)
        self.positions = nn.Embedding(24, width)
        self.norm, self.last = nn.LayerNorm(width), nn.RMSNorm(width)
        self.up, self.down = nn.Linear(width, 90), nn.Linear(90, width, bias=False)
        self.shift = nn.Linear(width, 90)
        self.shift.weight.requires_grad_(False)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, input_ids):
        x = self.embed(input_ids) + self.positions(torch.arange(input_ids.shape[1]))
        x = x + self.down(torch.tanh(self.up(self.norm(x))) * torch.tanh(self.shift(x)))
        return SimpleNamespace(logits=self.head(self.last(x)))


def draws(model, batch: Batch, steps: int, **options) -> torch.Tensor:
    """``[steps, 7]``: the statistics of one batch under the signs of each step, and ``mu*`` as the last column."""
    mixer = gac.patch(model, estimator="sequence", law="fixed", mu=0.4, report_interval=None, **options)
    rows = []
    for _ in range(steps):
        with mixer.batch(is_expert=batch.is_expert):
            mixer.mixed_loss(**losses(model, batch)).backward()
        mixer.step()
        rows.append([float(getattr(mixer.statistics, name)) for name in SUMS])
        model.zero_grad()
    mixer.unpatch()
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_unbiased_over_signs(share):
    """Steps with signs (and layers) of their own: every mean within 4 standard errors of the truth.

    1,100 steps of this size have the standard errors of 2,000 with a sketch of 8.
    """
    model, batch = EveryKind(), mixed(6, 7)
    wanted = expected(model, [batch])
    found = draws(model, batch, 1100, sketch_size=16, sequences={"layer_share": share})
    error = found.std(0) / math.sqrt(len(found))
    for k, name in enumerate(SUMS):
        z = float((found[:, k].mean() - wanted[name]) / error[k])
        print(f"share {share}, {name}: {float(found[:, k].mean()):.4f} of {wanted[name]:.4f}, z = {z:.2f}")
        assert abs(z) < 4, name
        assert float(found[:, k].std()) > 0.01 * abs(wanted[name]), "a sketch indeed"


def optimum(row: torch.Tensor) -> torch.Tensor:
    """``mu* = (delta_g2 / 2 + sigma_r2) / distance2``."""
    sigma_r2, delta_g2, distance2 = row[..., 1], row[..., 2], row[..., 3]
    return (delta_g2 / 2 + sigma_r2) / distance2


def test_error_of_one_step():
    """A Llama shape of 1.6 M parameters: at the default size the noise errs by less than 10% a step, mu by .05."""
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=512, hidden_size=128, intermediate_size=512, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    batch = mixed(16, 32)
    truth = expected(model, [batch])
    wanted = torch.tensor([truth[name] for name in SUMS], dtype=torch.float64)
    found = draws(model, batch, 20, sketch_size=32)
    relative = (found / wanted - 1).square().mean(0).sqrt()
    off = (optimum(found) - optimum(wanted)).square().mean().sqrt()
    figures = ", ".join(f"{name} {float(e):.1%}" for name, e in zip(SUMS, relative, strict=True))
    print(f"{figures}, mu {float(off):.3f}")
    assert relative[0] < 0.10
    assert relative[1] < 0.10
    assert off < 0.05


def test_a_fixed_seed_repeats_a_step_and_others_differ():
    model, batch = EveryKind(), mixed(6, 7)
    fixed = draws(model, batch, 3, sketch_size=8, sequences={"seed": 5})
    assert torch.equal(fixed[0], fixed[1])
    new = draws(model, batch, 3, sketch_size=8)
    assert not torch.equal(new[0], new[1])
    assert torch.equal(new, draws(model, batch, 3, sketch_size=8)), "the step is the seed"

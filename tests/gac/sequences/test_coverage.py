"""What is not seen is named, at the patch or in the first batch, and nothing else is measured in its place."""

from __future__ import annotations

import re
import warnings
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import gac
from tests.gac.models import VOCABULARY
from tests.gac.sequences.truth import assert_close, expected, losses, mixed, row_losses
from tests.gac.truth import statistics as truth_of

WIDTH = 16


class Base(nn.Module):
    """Embedding, something in the middle, and a head."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.fill()

    def fill(self):
        pass

    def middle(self, x):
        return x

    def forward(self, input_ids):
        return SimpleNamespace(logits=self.head(self.middle(self.embed(input_ids))))


class Attention(Base):
    """Reads its projections' weights without calling them."""

    def fill(self):
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    def middle(self, x):
        return x + self.attention(x, x, x, need_weights=False)[0]


class FunctionalHead(Base):
    """Applies the head's weight a second time, as a fused loss does."""

    def middle(self, x):
        return x + torch.nn.functional.linear(x, self.head.weight) @ self.head.weight


class Experts(Base):
    """Sends every other token of the batch, in another order, through a layer."""

    def fill(self):
        self.expert = nn.Linear(WIDTH, WIDTH)

    def middle(self, x):
        flat = x.reshape(-1, WIDTH)
        chosen = torch.arange(len(flat) - 1, 0, -2)
        return (flat.index_add(0, chosen, self.expert(flat[chosen]))).view_as(x)


class Own(Base):
    """A parameter that no layer has."""

    def fill(self):
        self.scale = nn.Parameter(torch.ones(WIDTH))

    def middle(self, x):
        return x * self.scale


def patched(model, **options):
    return gac.patch(model, estimator="sequence", sketch_size=64, law="fixed", mu=0.3, **options)


def step(mixer, model, batch):
    with mixer.batch(is_expert=batch.is_expert):
        mixer.mixed_loss(**losses(model, batch)).backward()
    mixer.step()
    return mixer.statistics


@pytest.mark.parametrize(
    ("kind", "at_patch", "in_batch"),
    [
        (Attention, ["attention.in_proj_weight", "attention.in_proj_bias"], ["attention.out_proj.weight"]),
        (FunctionalHead, [], ["head.weight"]),
        (Experts, [], ["expert.weight"]),
        (Own, ["scale"], []),
    ],
)
def test_named_and_left_out(kind, at_patch, in_batch):
    model, batch = kind(), mixed()
    measured = [name for name, _ in model.named_parameters() if not any(n in name for n in (*at_patch, *in_batch))]
    shared = {Attention: "out_proj", Experts: "expert"}.get(kind, "?")  # its bias is a column of its weight
    measured = [name for name in measured if shared not in name]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        mixer = patched(model)
        assert set(mixer.coverage.unseen) == set(at_patch)
        found = [step(mixer, model, batch), step(mixer, model, batch)]
    texts = " ".join(str(w.message) for w in said)
    assert all(repr(name) in texts for name in (*at_patch, *in_batch)), texts
    assert len(said) == bool(at_patch) + bool(in_batch), "each once"
    share = 1 - sum(model.get_parameter(name).numel() for name in mixer.coverage.unseen) / sum(
        p.numel() for p in model.parameters()
    )
    assert mixer.coverage.share == pytest.approx(share)
    mixer.unpatch()
    for name, p in model.named_parameters():
        p.requires_grad_(name in measured)
    wanted = expected(model, [batch])
    for statistics in found:
        assert_close(statistics, wanted)


def test_a_model_of_which_nothing_is_seen():
    with pytest.raises(ValueError, match=re.escape("sees no trainable parameter") + ".*weight_hh_l0"):
        patched(nn.LSTM(8, 8))


def test_norms_of_libraries_are_known_by_their_gradient():
    """Whatever their class is called: Gemma's scales by ``1 + weight``, and its gradient is the same."""
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    from gac.sequences.normalization import normalization_of

    class Doubled(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(8))
            self.eps = 1e-6

        def forward(self, x):
            return 2 * x * self.weight

    for known in (LlamaRMSNorm(8), GemmaRMSNorm(8), nn.RMSNorm(8), nn.LayerNorm(8), nn.LayerNorm(8, bias=False)):
        assert normalization_of(known) is not None, known
    for other in (Doubled(), nn.PReLU(8), nn.BatchNorm1d(8), nn.GroupNorm(2, 8), nn.Linear(1, 8)):
        assert normalization_of(other) is None, other


def wrong(message: str, error=ValueError):
    return pytest.raises(error, match=message)


def test_wrong_arguments_are_named():
    model, batch = Base(), mixed()
    mixer = patched(model)
    good = {"is_expert": batch.is_expert}
    for error, message, change in (
        (TypeError, "is_expert must be bool", {"is_expert": [1, 0, 1, 0, 1, 0]}),
        (ValueError, r"is_expert must have shape \[B\]", {"is_expert": batch.is_expert[None]}),
        (ValueError, r"groups must have shape \[6\]", {"groups": [1, 2]}),
        (TypeError, "groups must be whole numbers", {"groups": [0.5] * 6}),
        (ValueError, "tokens must be finite and not negative", {"tokens": [1.0, 2.0, -1.0, 1.0, 1.0, 1.0]}),
        (ValueError, "sources must have an entry for each of the 6 rows", {"sources": ["a"]}),
        (ValueError, "lengths and cu_seqlens say the same", {"lengths": [1] * 6, "cu_seqlens": range(7)}),
        (ValueError, r"cu_seqlens must have shape \[7\]", {"cu_seqlens": [0, 1, 2]}),
        (ValueError, "must not be negative", {"lengths": [1, 2, -1, 1, 1, 1]}),
        (ValueError, "lengths and position_ids say the same", {"lengths": [1] * 6, "position_ids": [0] * 6}),
        (ValueError, "again at 0 for each of the 6 rows of is_expert, and do so 2 times", {"position_ids": [0, 1, 0]}),
        (ValueError, "and do so 7 times", {"position_ids": [0, 0, 0, 0, 0, 0, 0, 1]}),
        (ValueError, r"position_ids must have shape \[T\]", {"position_ids": [[0, 1], [0, 1]]}),
        (TypeError, "position_ids must be whole numbers", {"position_ids": [0.0, 1.0]}),
    ):
        with wrong(message, error), mixer.batch(**good | change):
            pass
    with wrong("is_expert has 4 rows, and the model was called with 6"), mixer.batch(is_expert=batch.is_expert[:4]):
        mixer.mixed_loss(**losses(model, batch)).backward()
    mixer.step()


def test_wrong_order_is_named():
    model, batch = Base(), mixed()
    mixer = patched(model)
    with wrong("belong inside `with mixer.batch", RuntimeError):
        mixer.mixed_loss(**losses(model, batch))
    with wrong("outside a branch", RuntimeError):
        losses(model, batch)["sft_loss"].backward()
    with wrong("lacks the weights of its branches", RuntimeError), mixer.batch(is_expert=batch.is_expert):
        losses(model, batch)["sft_loss"].backward()
    with wrong("inside `with mixer.batch", RuntimeError), mixer.batch(is_expert=batch.is_expert):  # noqa: SIM117
        with mixer.batch(is_expert=batch.is_expert):
            pass
    with wrong("inside `with mixer.batch", RuntimeError), mixer.batch(is_expert=batch.is_expert), mixer.sft():
        pass
    with wrong("inside `with mixer.sft", RuntimeError), mixer.sft(), mixer.batch(is_expert=batch.is_expert):
        pass
    with wrong("each row is a contribution"), mixer.sft(tokens=5):
        pass
    with wrong("whose weight nobody has read", RuntimeError), mixer.sft():
        losses(model, batch)["sft_loss"].backward()
    with wrong("mixer.step.. inside `with mixer.batch", RuntimeError), mixer.batch(is_expert=batch.is_expert):
        mixer.step()


def test_a_backward_pass_after_the_batch_is_named():
    model, batch = Base(), mixed()
    mixer = patched(model)
    with wrong("call backward before the batch ends", RuntimeError), mixer.batch(is_expert=batch.is_expert):
        mixer.mixed_loss(**losses(model, batch))
    with mixer.batch(is_expert=batch.is_expert):
        pass  # nothing was mixed, nothing is missed


def test_lengths_beyond_the_tokens_are_named():
    model = nn.Linear(8, 4)
    mixer = patched(model)
    with wrong("lengths add up to 30 tokens, and the model was called with 20"):  # noqa: SIM117
        with mixer.batch(is_expert=[True, False], lengths=[10, 20]):
            y = model(torch.randn(1, 20, 8))[0]
            mixer.mixed_loss(sft_loss=y[:10].sum(), rl_loss=y[10:].sum()).backward()


def test_options_are_checked():
    for error, message, options in (
        (ValueError, "sketch_size must be one of 8, 16, 32, 64", {"sketch_size": 20}),
        (ValueError, "layer_share must be a number above 0", {"sequences": {"layer_share": 0}}),
        (TypeError, "seed of sequences must be an int", {"sequences": {"seed": 0.5}}),
        (ValueError, 'metric="optimizer" reads gradients of parameters', {"metric": "optimizer"}),
        (ValueError, "has hooks on layers", {"hooks": False}),
    ):
        with wrong(message, error):
            gac.patch(Base(), estimator="sequence", **options)
    mixer = gac.patch(Base())
    with wrong('needs gac.patch\\(model, estimator="sequence"\\)', RuntimeError), mixer.batch(is_expert=[True]):
        pass


class ChosenHead(Base):
    """Its head gets every other position, and the last row none but one."""

    def forward(self, input_ids):
        hidden = self.embed(input_ids)
        chosen = torch.zeros(input_ids.shape, dtype=torch.bool)
        chosen[:, 1::2] = True
        chosen[-1] = False
        chosen[-1, 3] = True
        with self.mixer.selected(chosen.sum(1)) if self.mixer else nullcontext():
            scores = self.head(hidden[chosen])
        logits = hidden.new_zeros(*input_ids.shape, VOCABULARY)
        logits[chosen] = scores
        return SimpleNamespace(logits=logits)

    mixer = None


def test_a_head_that_gets_chosen_positions_is_seen_where_they_are_told():
    batch, model = mixed(), ChosenHead()
    wanted = expected_together(batch)
    mixer = patched(model)
    model.mixer = mixer
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with mixer.batch(is_expert=batch.is_expert):
            mixer.mixed_loss(**losses(model, batch)).backward()
    mixer.step()
    assert mixer.coverage.share == 1
    assert_close(mixer.statistics, wanted)
    in_batch = mixer.batch(is_expert=batch.is_expert)
    with pytest.raises(ValueError, match="a number for each of the 6 rows"), in_batch, mixer.selected([1, 2]):
        pass


def expected_together(batch):
    """Of rows whose gradients are taken one by one from a call with all of them."""
    model = ChosenHead()
    per_row = row_losses(model, batch.ids) * batch.weights
    parameters = list(model.parameters())
    found = {True: [], False: []}
    for k, loss in enumerate(per_row):
        gradients = torch.autograd.grad(loss, parameters, retain_graph=True)
        found[bool(batch.is_expert[k])].append(torch.cat([g.double().flatten() for g in gradients]))
    return truth_of(found[True], found[False])


def test_lengths_of_chosen_positions_are_checked():
    mixer = patched(Base())
    with pytest.raises(TypeError, match="whole numbers"), mixer.selected([0.5]):
        pass
    with pytest.raises(ValueError, match="must not be negative"), mixer.selected([1, -1]):
        pass
    other = gac.patch(Base(), estimator="sketch")
    with pytest.raises(RuntimeError, match=r"mixer\.selected needs"), other.selected([1]):
        pass

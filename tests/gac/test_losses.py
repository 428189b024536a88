import pytest
import torch
import torch.nn.functional as F

from gac import losses
from gac.losses import count_label_tokens, sft_token_loss


def batch(dtype=torch.float64, seed=0, shape=(3, 7), vocabulary=11):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(*shape, vocabulary, generator=generator, dtype=torch.float64).to(dtype)
    labels = torch.randint(0, vocabulary, shape, generator=generator)
    labels[0, :4] = -100
    labels[1, 5:] = -100
    return logits.requires_grad_(), labels


def naive(logits, labels, phi=False):
    logp = torch.log_softmax(logits[:, :-1], dim=-1)
    targets = labels[:, 1:]
    kept = targets != -100
    nll = -logp.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    weight = (torch.exp(-nll) * (1 - torch.exp(-nll))).detach() if phi else torch.ones_like(nll)
    return (weight * nll)[kept].sum() / kept.sum()


@pytest.mark.parametrize("phi", [False, True])
@pytest.mark.parametrize("chunk_bytes", [1, 4 * 11 * 5, 1 << 20])
def test_loss_and_gradient_equal_the_plain_form(monkeypatch, phi, chunk_bytes):
    monkeypatch.setattr(losses, "_CHUNK_BYTES", chunk_bytes)
    logits, labels = batch()
    other = logits.detach().clone().requires_grad_()
    loss, expected = sft_token_loss(logits, labels, phi=phi), naive(other, labels, phi)
    (3 * loss).backward()
    (3 * expected).backward()
    torch.testing.assert_close(loss, expected, rtol=1e-13, atol=0)
    torch.testing.assert_close(logits.grad, other.grad, rtol=1e-11, atol=1e-15)


def test_gradcheck():
    logits, labels = batch(shape=(2, 4), vocabulary=5)
    assert torch.autograd.gradcheck(lambda x: sft_token_loss(x, labels), (logits,))


def test_equals_torch_cross_entropy_in_fp32():
    logits, labels = batch(torch.float32)
    expected = F.cross_entropy(logits[:, :-1].reshape(-1, 11), labels[:, 1:].reshape(-1))
    torch.testing.assert_close(sft_token_loss(logits, labels), expected)


def test_bf16_logits_use_an_fp32_log_softmax():
    logits, labels = batch(torch.bfloat16)
    reference = logits.detach().double().requires_grad_()
    loss = sft_token_loss(logits, labels)
    loss.backward()
    naive(reference, labels).backward()
    assert loss.dtype == torch.float32
    assert logits.grad.dtype == torch.bfloat16
    torch.testing.assert_close(loss.double(), naive(reference, labels), rtol=1e-6, atol=0)
    # one rounding to bf16 (8 bits of mantissa) per element
    torch.testing.assert_close(logits.grad.double(), reference.grad, rtol=2**-8, atol=0)


def test_micro_batches_with_a_window_count_add_up_to_the_token_mean():
    logits, labels = batch()
    total = count_label_tokens(labels)
    parts = sum(sft_token_loss(logits[i : i + 1], labels[i : i + 1], num_tokens=total) for i in range(3))
    torch.testing.assert_close(parts, sft_token_loss(logits, labels), rtol=1e-13, atol=0)
    assert total == (labels[:, 1:] != -100).sum()


@pytest.mark.parametrize("num_tokens", [None, 0, torch.tensor(0)])
def test_no_label_tokens_give_zero_with_a_graph(num_tokens):
    logits, labels = batch()
    loss = sft_token_loss(logits, torch.full_like(labels, -100), num_tokens=num_tokens, phi=True)
    loss.backward()
    assert loss == 0
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_ignored_positions_may_hold_anything():
    logits, labels = batch()
    poisoned = logits.detach().clone()
    poisoned[0, :3], poisoned[:, -1] = float("nan"), float("inf")  # positions whose target is -100 or absent
    poisoned.requires_grad_()
    loss = sft_token_loss(poisoned, labels)
    loss.backward()
    torch.testing.assert_close(loss, naive(logits, labels), rtol=1e-13, atol=0)
    assert poisoned.grad.isfinite().all()


def test_mismatched_shapes_are_named():
    logits, labels = batch()
    with pytest.raises(ValueError, match=r"\(3, 7, 11\) and \(3, 6\)"):
        sft_token_loss(logits, labels[:, :-1])

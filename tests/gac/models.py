"""Small real models for the tests, built from configurations."""

from __future__ import annotations

import torch

VOCABULARY = 48

ARCHITECTURES = [(family, tied) for family in ("qwen2", "llama", "gpt2") for tied in (True, False)]


def tiny_model(
    family: str = "qwen2", *, tied: bool = True, seed: int = 0, dtype: torch.dtype = torch.float32, width: int = 32
):
    """A causal language model of about 50,000 parameters at the default width."""
    import transformers

    torch.manual_seed(seed)
    if family == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=VOCABULARY, n_positions=32, n_embd=width, n_layer=2, n_head=4, tie_word_embeddings=tied,
            attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0,
        )  # fmt: skip
        model = transformers.GPT2LMHeadModel(config)
    else:
        kind = {"qwen2": "Qwen2", "llama": "Llama"}[family]
        config = getattr(transformers, f"{kind}Config")(
            vocab_size=VOCABULARY, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32, tie_word_embeddings=tied,
        )  # fmt: skip
        model = getattr(transformers, f"{kind}ForCausalLM")(config)
    return model.to(dtype)


def tokens(count: int, seed: int, *, rows: int = 2, length: int = 8) -> list[torch.Tensor]:
    """``count`` micro-batches ``[rows, length]``."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, VOCABULARY, (rows, length), generator=generator) for _ in range(count)]


def sft_loss(model, batch: torch.Tensor) -> torch.Tensor:
    """Mean NLL of the next token."""
    return model(input_ids=batch, labels=batch).loss


def rl_loss(model, batch: torch.Tensor) -> torch.Tensor:
    """A policy-gradient loss with fixed advantages of both signs."""
    logp = model(input_ids=batch).logits[:, :-1].float().log_softmax(-1)
    taken = logp.gather(-1, batch[:, 1:, None]).squeeze(-1)
    advantages = torch.linspace(-1.0, 1.0, batch.shape[0], device=batch.device)
    return -(advantages[:, None] * taken).mean()


def float64_gradient(loss: torch.Tensor, parameters) -> torch.Tensor:
    """The flat gradient by torch.autograd.grad, in float64."""
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    return torch.cat(
        [
            (torch.zeros_like(p) if g is None else g).double().flatten()
            for g, p in zip(gradients, parameters, strict=True)
        ]
    )

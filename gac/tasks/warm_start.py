"""A short supervised phase before the hybrid one."""

from collections.abc import Callable, Sequence
from typing import Any


def warm_start(
    model: Any,
    tokenizer: Any,
    demonstrations: Sequence[dict[str, Any]],
    *,
    steps: int,
    batch_size: int,
    lr: float,
    seed: int,
    max_length: int | None = None,
    on_step: Callable[[int, float], None] | None = None,
) -> float:
    """Trains `model` in place with AdamW on the completion tokens of `demonstrations`; returns the last batch's loss.

    The order of the demonstrations follows from `seed` alone and no other random number is drawn, so two calls on the
    same machine give the same model. `on_step` gets the step number (from 1) and the loss.
    """
    import torch

    from gac.losses import sft_token_loss
    from gac.trainers.demonstrations import DemonstrationCollator, EpochSampler

    if steps <= 0:
        return float("nan")
    collate = DemonstrationCollator(tokenizer, demonstrations, max_length=max_length)
    sampler = EpochSampler(len(demonstrations), seed)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=lr, weight_decay=0.0)
    training = model.training
    model.train()
    loss = torch.zeros(())
    for step in range(steps):
        for group in optimizer.param_groups:
            # a linear ramp, then a linear descent to a tenth: the hybrid phase starts from a settled model
            group["lr"] = lr * min(1.0, (step + 1) / 20) * (1.0 - 0.9 * step / steps)
        batch = collate(sampler.take(step * batch_size, batch_size)).to(model.device)
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
        loss = sft_token_loss(logits, batch.labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if on_step is not None:
            on_step(step + 1, loss.item())
    model.train(training)
    return loss.item()

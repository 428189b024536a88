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
    rows_at_once: int | None = None,
    bf16: bool = False,
    on_step: Callable[[int, float], None] | None = None,
) -> float:
    """Trains `model` in place with AdamW on the completion tokens of `demonstrations`; returns the last batch's loss.

    The order of the demonstrations follows from `seed` alone and no other random number is drawn, so two calls on the
    same machine give the same model.

    Args:
        rows_at_once: demonstrations in a forward pass; a batch that has more is accumulated. Default: all of it.
        bf16: forward passes under autocast.
        on_step: gets the step number (from 1) and the loss.
    """
    import torch

    from gac.losses import count_label_tokens, sft_token_loss
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
        rows = sampler.take(step * batch_size, batch_size)
        pieces = [
            collate(rows[at : at + (rows_at_once or batch_size)]).to(model.device)
            for at in range(0, batch_size, rows_at_once or batch_size)
        ]
        tokens = sum(count_label_tokens(piece.labels) for piece in pieces) if len(pieces) > 1 else None
        losses = []
        for piece in pieces:
            with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
                logits = model(input_ids=piece.input_ids, attention_mask=piece.attention_mask, use_cache=False).logits
            losses.append(sft_token_loss(logits, piece.labels, num_tokens=tokens))
            losses[-1].backward()
            del logits  # of the next piece there are as many
        loss = torch.stack([each.detach() for each in losses]).sum() if len(losses) > 1 else losses[0]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if on_step is not None:
            on_step(step + 1, loss.item())
    model.train(training)
    return loss.item()

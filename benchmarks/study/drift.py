"""How far a policy has moved from where it started."""

from collections.abc import Sequence
from typing import Any

PROMPTS = 64
"""Of the held-out problems: the same in every evaluation."""


def mean_kl(policy: Any, initial: Any, tokenizer: Any, rows: Sequence[dict[str, Any]], length: int) -> float:
    """``KL(policy || initial)`` in nats, mean over the tokens of the policy's own samples at temperature 1.

    At every position the divergence of the two next-token distributions is summed over the whole vocabulary, which has
    the sampled log ratio's expectation and less noise. Samples come from a random state of their own.

    Args:
        rows: problems with a ``prompt``; the first `PROMPTS` are used.
        length: most tokens of a sample.
    """
    import torch
    from transformers import GenerationConfig

    from gac.tasks.evaluation import encode_prompts, inference_mode_of

    batch = encode_prompts(tokenizer, [row["prompt"] for row in rows[:PROMPTS]])
    start = batch["input_ids"].shape[1]
    settings = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        max_new_tokens=length,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]), inference_mode_of(policy), inference_mode_of(initial):
        torch.manual_seed(0)
        tokens = policy.generate(**batch, generation_config=settings)
        ended = (tokens[:, start:] == tokenizer.eos_token_id).cumsum(1)
        # up to and with the first end token
        sampled = (ended - (tokens[:, start:] == tokenizer.eos_token_id).to(ended.dtype)) == 0
        mask = torch.cat([batch["attention_mask"], sampled.to(batch["attention_mask"].dtype)], dim=1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        logs = [
            model(input_ids=tokens, attention_mask=mask, position_ids=positions, use_cache=False)
            .logits[:, start - 1 : -1]
            .log_softmax(-1)
            for model in (policy, initial)
        ]
        divergence = (logs[0].exp() * (logs[0] - logs[1])).sum(-1)
        return (divergence * sampled).sum().item() / sampled.sum().item()

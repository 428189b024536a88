"""What ``auto`` stands for and how contributions are read: the rules, in numbers alone."""

from __future__ import annotations

EXACT_BYTES = 32 * 2**20
"""``auto`` is exact where its fp32 buffers take at most this much ..."""

EXACT_SHARE = 0.05
"""... or this share of the model's own parameters (LoRA)."""

EXACT_BYTES_REDUCED = 2**20
"""Where ranks hold replicas the buffers also travel between them: ``auto`` is exact there up to this size."""


def reads_running_sums(*, exact: bool, ranks: int, sharded: bool, managed: bool, in_place: bool) -> bool:
    """Whether contributions are differences of what was accumulated.

    Not where the engine reduces the gradient in place before the next pass (replicas on several ranks) or takes it
    away, and not for the exact estimator where the gradient itself is at hand: that saves two of its buffers.

    Args:
        exact: the estimator. ranks, sharded, managed: see :class:`gac.observe.topology.Topology`.
        in_place: False where gradients are handed over in buffers.
    """
    return sharded or not in_place or (ranks == 1 and not exact and not managed)


def choose_estimator(
    estimator: str, *, elements: int, model_bytes: int, ranks: int, sharded: bool, running: bool
) -> str:
    """What an estimator's name stands for on this rank.

    Args:
        estimator: ``auto`` is decided, everything else stands for itself.
        elements: trainable ones on this rank. model_bytes: of all parameters on it.
        ranks, sharded: see :class:`gac.observe.topology.Topology`.
        running: whether the exact estimator would read running sums, which takes two buffers more.
    """
    if estimator != "auto":
        return estimator
    buffers = 4 * (4 if running else 2) * elements
    if ranks > 1 and not sharded:
        return "exact" if buffers <= EXACT_BYTES_REDUCED else "sketch"
    return "exact" if buffers <= max(EXACT_BYTES, EXACT_SHARE * model_bytes) else "sketch"

"""Trainers with a supervised and a reinforcement branch. Importing this package loads neither transformers nor TRL."""

from importlib import import_module
from typing import Any

_HOMES = {
    "GacCallback": "callback",
    "HybridGRPOConfig": "hybrid_grpo",
    "HybridGRPOTrainer": "hybrid_grpo",
    "MixedBatch": "mixed_batch",
}
__all__ = ["GacCallback", "HybridGRPOConfig", "HybridGRPOTrainer", "MixedBatch"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

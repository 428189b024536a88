"""Trainers with a supervised and a reinforcement branch. Importing this package loads neither transformers nor TRL."""

from typing import Any

__all__ = ["HybridGRPOConfig", "HybridGRPOTrainer"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from gac.trainers import hybrid_grpo

        return getattr(hybrid_grpo, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

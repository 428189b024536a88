"""What a plan is made for."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from gac.observe.choice import choose_estimator, reads_running_sums
from gac.options import METRICS
from gac.plan.device import Device
from gac.plan.error import Noise
from gac.plan.parameters import Parameters
from gac.sequences.options import SIZES

SHARDINGS = ("ddp", "fsdp")
ESTIMATORS = ("auto", "sketch", "exact", "sequence")
"""Estimators that read gradients, or what makes them."""

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Setup:
    """What is asked for.

    Attributes:
        parameters: of the model.
        trainable: trainable ones; None: all. Fewer are taken for LoRA adapters.
        tokens: per micro-batch and rank. micro_batches: per branch, rank and step.
        length: tokens of a sequence, and sketch_size: of its sketches, for ``sequence``.
        interval: steps between measurements.
        dtype: of the gradients; a key of :data:`DTYPES`.
        metric: ``optimizer`` also reads Adam's second moments.
        alpha, half_life, momentum: of law ``gac``; the momentum is that of the optimizer.
    """

    parameters: Parameters
    device: Device
    trainable: int | None = None
    ranks: int = 1
    sharding: str = "ddp"
    tokens: int = 8192
    micro_batches: int = 4
    length: int = 1024
    sketch_size: int = 32
    interval: int = 1
    dtype: str = "bf16"
    estimator: str = "auto"
    metric: str = "gradient"
    alpha: float = 0.5
    half_life: float | None = None
    momentum: float = 0.9
    noise: Noise = field(default_factory=Noise)

    def __post_init__(self) -> None:
        known = {"sharding": SHARDINGS, "dtype": tuple(DTYPES), "estimator": ESTIMATORS, "metric": METRICS}
        for name, values in known.items():
            if getattr(self, name) not in values:
                raise ValueError(f"unknown {name} {getattr(self, name)!r}; known: {', '.join(values)}")
        for name in ("ranks", "tokens", "micro_batches", "length", "interval"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.estimator == "sequence":
            self._check_sequences()
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha must be in [0, 1], got {self.alpha}")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must be at least 0 and below 1, got {self.momentum}")
        if self.half_life is not None and not self.half_life > 0:
            raise ValueError(f"half_life must be positive, got {self.half_life}")
        if self.trainable is not None and not 1 <= self.trainable <= self.parameters.total:
            raise ValueError(
                f"trainable must be from 1 to the model's {self.parameters.total:,} parameters, got {self.trainable}"
            )

    def _check_sequences(self) -> None:
        if self.sketch_size not in SIZES:
            raise ValueError(f"sketch_size must be one of {', '.join(map(str, SIZES))}, got {self.sketch_size}")
        if self.metric != "gradient":
            raise ValueError('estimator="sequence" measures gradients: leave metric="optimizer" out')
        if self.trainable not in (None, self.parameters.total):
            raise ValueError(
                f"trainable={self.trainable} with estimator sequence: shapes of adapters are not known here, and its "
                "sketches go by shape. Leave trainable out"
            )

    @property
    def sequences(self) -> int:
        """Of a micro-batch."""
        return max(1, self.tokens // self.length)

    @property
    def observed(self) -> Parameters:
        """The trainable parameters, whole."""
        if self.trainable in (None, self.parameters.total):
            return self.parameters
        return self.parameters.adapters(self.trainable)

    @property
    def itemsize(self) -> int:
        """Bytes of a gradient element."""
        return DTYPES[self.dtype].itemsize

    @property
    def sharded(self) -> bool:
        """Whether each rank holds a piece of every contribution."""
        return self.sharding == "fsdp" and self.ranks > 1

    def on_this_rank(self, parameters: Parameters) -> Parameters:
        """What the rank that holds most has of them."""
        return parameters.shard(self.ranks) if self.sharded else parameters

    def chosen_estimator(self) -> str:
        """What ``auto`` stands for, by the rule of :func:`gac.patch`."""
        if self.estimator == "sequence":
            return self.estimator
        return choose_estimator(
            self.estimator,
            elements=self.on_this_rank(self.observed).total,
            model_bytes=self.on_this_rank(self.parameters).total * self.itemsize,
            ranks=self.ranks,
            sharded=self.sharded,
            running=reads_running_sums(
                exact=True, ranks=self.ranks, sharded=self.sharded, managed=False, in_place=True
            ),
        )

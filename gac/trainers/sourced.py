"""Demonstrations that weigh what their source is worth by its gradient: ``sft_weights="source"``."""

from __future__ import annotations

from typing import Any, cast

import torch

from gac.sequences.source_trust import SourceTrust
from gac.trainers.demonstrations import DemonstrationBatch, DemonstrationCollator
from gac.trainers.scored import ScoredGRPOTrainer

MOST_SOURCES = 64
"""Sources that are told apart: each needs demonstrations in many steps."""


class SourcedGRPOTrainer(ScoredGRPOTrainer):
    """`ScoredGRPOTrainer` that can also weigh demonstrations by their source's gradient beside that of the rewards."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._trust: SourceTrust | None = None
        self._ended = 0  # steps with sources, in this run

    def trust_sources(self, demonstrations: DemonstrationCollator) -> None:
        """Has the sources followed. Raises ValueError where they cannot be told apart, or not alike on all ranks."""
        column = demonstrations.source_column
        if hasattr(demonstrations.demonstrations, "column_names"):
            labels = list(dict.fromkeys(demonstrations.demonstrations[column]))
        else:
            labels = list(dict.fromkeys(row[column] for row in demonstrations.demonstrations))
        if len(labels) > MOST_SOURCES:
            raise ValueError(
                f"sft_weights='source': column {column!r} has {len(labels)} labels, and at most {MOST_SOURCES} sources "
                "are told apart"
            )
        named = cast("dict[str, Any]", self.args.gac_sequences or {}).get("sources")
        if self.accelerator.num_processes > 1 and not named:
            raise ValueError(
                "sft_weights='source' on several ranks: weights must be alike on all of them, so name the sources: "
                f"gac_sequences={{'sources': [...]}} with {labels!r} and those of the rollouts"
            )
        self._trust = SourceTrust(labels)

    @property
    def source_trust(self) -> SourceTrust | None:
        """What is known of sources; None unless ``sft_weights="source"``."""
        return self._trust

    def weights_of(self, batch: DemonstrationBatch) -> torch.Tensor | None:
        """As the base class."""
        if self._trust is None or batch.sources is None:
            return super().weights_of(batch)
        weights = self._trust.weights(batch.sources)
        self._told += weights.tolist()
        return weights.to(self.accelerator.device, torch.float32)

    def _detach(self) -> None:
        super()._detach()
        self._ended = 0

    def end_optimizer_step(self) -> None:
        """As the base class; the step's sources are taken in, and what is known of them is logged."""
        if self._trust is not None:
            self._log_sources(self._trust)
        super().end_optimizer_step()
        if self._trust is not None:
            ended, step = self._mixer_of_run.newest_sources()
            if step is not None and ended != self._ended:
                self._trust.take(step)
            self._ended = ended

    def _log_sources(self, trust: SourceTrust) -> None:
        series = self._metrics["train"]
        for label, known in trust.known().items():
            series[f"gac/source_weight/{label}"].append(known.weight)
            series[f"gac/source_trust/{label}"].append(known.probability)

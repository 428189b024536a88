"""Demonstrations that the reward functions judge, as they judge rollouts: ``sft_weights="reward"``."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from gac.losses import IGNORE_INDEX
from gac.trainers.demonstrations import DemonstrationBatch, DemonstrationCollator
from gac.trainers.patched import PatchedGRPOTrainer
from gac.trainers.rendering import split_conversation
from gac.trainers.values import DemonstrationValues, prompt_key

_LOGS = ("_log_completion_extra", "_log_metric")
"""TRL's methods that reward functions log rollouts with."""


class ScoredGRPOTrainer(PatchedGRPOTrainer):
    """`PatchedGRPOTrainer` that knows what demonstrations are worth by its reward functions.

    Every demonstration is scored once, when it is drawn first, in a batch with the others of its optimizer step: the
    reward functions are called for it as for a rollout, with its row's columns.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._values: DemonstrationValues | None = None
        self._judged: DemonstrationCollator | None = None
        self._drawn: list[int] = []  # demonstrations of the step under way, on all ranks
        self._told: list[float] = []  # their weights on this rank, where rewards do not make them

    def judge(self, demonstrations: DemonstrationCollator) -> None:
        """Has the demonstrations scored. Raises ValueError where the reward functions cannot be asked about them."""
        if self.environments is not None:
            raise ValueError(
                "sft_weights='reward' scores demonstrations by the reward functions, and those of environments look at "
                "what a rollout left there: leave it out"
            )
        _as_rollout(demonstrations.demonstrations[0], "sft_dataset row 0")
        self._judged, self._values = demonstrations, DemonstrationValues(len(demonstrations))

    @property
    def judges(self) -> bool:
        """Whether demonstrations are scored."""
        return self._values is not None

    def rescore_demonstrations(self) -> None:
        """Has every demonstration scored again when it is drawn next: the data, or what rewards it, have changed.

        Raises:
            RuntimeError: demonstrations are not scored; see ``sft_weights``.
        """
        if self._values is None:
            raise RuntimeError("rescore_demonstrations: demonstrations are not scored; set sft_weights='reward'")
        self._values.forget_scores()

    # -- rewards ------------------------------------------------------------------------------------------------------

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        if self._values is None or not self.model.training:
            return super()._generate_and_score_completions(inputs)
        keys = self._keys([row["prompt"] for row in inputs])
        output = super()._generate_and_score_completions(inputs)
        assert self._rewards is not None
        self._values.take_rollouts(keys, self._rewards)
        return output

    def score(self, own: Sequence[int], drawn: Sequence[int]) -> None:
        """The demonstrations of the step that begins, by their numbers: this rank's and, in their order, all ranks'.

        Raises:
            ValueError: the reward functions cannot score them; the message says why.
        """
        values, judged = self._values, self._judged
        assert values is not None
        assert judged is not None
        self._drawn = list(drawn)
        if values.are_scored(drawn):  # alike on all ranks
            return
        rows = [judged.demonstrations[index] for index in own]
        pairs = [_as_rollout(row, f"sft_dataset row {index}") for index, row in zip(own, rows, strict=True)]
        labels = [judged.encode(index)[1] for index in own]
        ids = [[label for label in row if label != IGNORE_INDEX] for row in labels]
        prompts, completions = (list(part) for part in zip(*pairs, strict=True))
        with self._unlogged():
            try:
                self._calculate_rewards(rows, prompts, completions, ids)
            except (TypeError, KeyError) as error:
                raise ValueError(
                    f"sft_weights='reward': a reward function could not score demonstrations ({error}): sft_dataset "
                    f"needs the columns that it reads, and has {sorted(map(str, rows[0]))}"
                ) from error
        assert self._rewards is not None
        values.take_scores(drawn, self._keys(prompts), self._rewards)

    def _keys(self, prompts: Sequence[Any]) -> list[int]:
        """:func:`prompt_key` of the prompts of all ranks, in the order of rewards."""
        own = torch.tensor([prompt_key(prompt) for prompt in prompts], device=self.accelerator.device)
        return self.accelerator.gather(own).tolist()

    @contextlib.contextmanager
    def _unlogged(self) -> Iterator[None]:
        """What reward functions log is of rollouts: tables and means must not hold demonstrations."""
        for name in _LOGS:
            setattr(self, name, lambda *args, **kwargs: None)
        try:
            yield
        finally:
            for name in _LOGS:
                delattr(self, name)

    # -- weights ------------------------------------------------------------------------------------------------------

    def weights_of(self, batch: DemonstrationBatch) -> torch.Tensor | None:
        """``[B]`` float32 on the device: what the losses of these demonstrations are multiplied by; None for 1."""
        if batch.weights is not None:
            weights = torch.tensor(batch.weights)
            self._told += batch.weights
        elif self._values is not None and batch.index is not None:
            weights = self._values.weights(batch.index)
        else:
            return None
        return weights.to(self.accelerator.device, torch.float32)

    def _log_weights(self) -> None:
        """The step's weights for the log, their mean and its standard error, and the mean reward.

        Of all ranks where rewards make the weights, else of this one.
        """
        series = self._metrics["train"]
        weights = torch.tensor(self._told, dtype=torch.float64)
        self._told.clear()
        if self._values is not None and self._drawn:
            weights = self._values.weights(self._drawn)
            series["gac/sft_reward"].append(float(self._values.scores(self._drawn).nanmean()))
        if len(weights):
            series["gac/sft_weight"].append(float(weights.mean()))
        if len(weights) > 1:
            series["gac/sft_weight_se"].append(float(weights.std() / len(weights) ** 0.5))

    def end_optimizer_step(self) -> None:
        """As the base class; the weights of the step's demonstrations are logged."""
        self._log_weights()
        super().end_optimizer_step()


def _as_rollout(row: Any, where: str) -> tuple[Any, Any]:
    """A row's prompt and completion as reward functions get those of a rollout.

    Raises ValueError for a row that has no prompt of its own.
    """
    if {"prompt", "completion"} <= set(row):
        return row["prompt"], row["completion"]
    if "messages" in row:
        return split_conversation(row["messages"], where)
    raise ValueError(
        f"sft_weights='reward' scores completions of prompts: {where} needs 'prompt' and 'completion', or 'messages'; "
        f"it has {sorted(map(str, row))}"
    )

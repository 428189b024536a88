"""Writes a run's metrics, TensorBoard events and progress while transformers' trainer runs."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from transformers import TrainerCallback

from gac.runs.console import Reporter
from gac.runs.folder import MetricsFile


class RunCallback(TrainerCallback):
    """Evaluates every so many steps and after the last one, and records each step as one line.

    A step's ``seconds`` run from its first micro-batch to the end of the optimizer step, rollouts included and
    evaluation excluded.
    """

    def __init__(
        self,
        trainer: Any,
        metrics: MetricsFile,
        events: Path,
        reporter: Reporter,
        *,
        evaluate: Callable[[], float],
        eval_every: int,
        accuracy: float,
    ):
        self._trainer = trainer
        self._metrics = metrics
        last = metrics.records[-1]["step"] if metrics.records else 0
        # events beyond the checkpoint belong to steps that are run again
        self._events = SummaryWriter(str(events), purge_step=last + 1 if last else None)
        self._reporter = reporter
        self._evaluate = evaluate
        self._eval_every = eval_every
        self._accuracy = accuracy
        self._begin = 0.0
        self._extra: dict[str, float] = {}

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._begin = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        end = time.perf_counter()
        self._extra = {"seconds": end - self._begin}
        if state.global_step % self._eval_every == 0 or state.global_step == state.max_steps:
            self._accuracy = self._extra["accuracy"] = self._evaluate()
            self._extra["eval_seconds"] = time.perf_counter() - end

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not logs or "loss" not in logs:  # the summary that transformers logs at the end
            return
        record = {"step": state.global_step, "estimator": self._trainer.mixer.estimator, **logs, **self._extra}
        self._metrics.append(record)
        if control.should_save:
            self._metrics.sync()
        for name, value in record.items():
            if name != "step" and isinstance(value, (int, float)):
                self._events.add_scalar(name if "/" in name else f"train/{name}", value, state.global_step)
        self._reporter.advance(
            state.global_step,
            milestone="accuracy" in self._extra,
            reward=record.get("reward"),
            accuracy=self._accuracy,
            mu=record.get("gac/mu"),
        )

    def close(self) -> None:
        """Closes the files."""
        self._events.close()
        self._metrics.close()

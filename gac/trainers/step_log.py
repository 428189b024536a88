"""What the hybrid trainer logs: the mixer's numbers of each step, and the history of module statistics."""

from typing import Any, cast

import torch

from gac.report import append_record
from gac.statistics import ModuleStatistics
from gac.trainers.checkpoints import CheckpointedGRPOTrainer

_COUNTERS = ("step", "skipped")
"""Metrics that count: logged with their newest value, where the others are averaged over the logging window."""


class LoggedGRPOTrainer(CheckpointedGRPOTrainer):
    """`CheckpointedGRPOTrainer` that logs what was measured in each step, under ``gac/``."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._last_metrics: dict[str, Any] = {}
        self._recorded: ModuleStatistics | None = None
        self._informative: float | None = None  # share of the last generation's groups whose rewards differ

    def end_optimizer_step(self) -> None:
        """Ends the mixer's step and takes its numbers for the log."""
        self._record_modules()
        super().end_optimizer_step()
        constant = self._metrics["train"].get("frac_reward_zero_std")
        if constant:  # else they were logged since, and a later step trains on the same generation
            self._informative = 1.0 - constant[-1]
        metrics = self._mixer_of_run.metrics()
        self._last_metrics = {f"gac/{name}": metrics[name] for name in _COUNTERS if name in metrics}
        series = self._metrics["train"]
        for name, value in metrics.items():
            if isinstance(value, (int, float)) and name not in _COUNTERS:
                series[f"gac/{name}"].append(float(value))
        if self._sft_window_loss is not None:
            # a device scalar until it is logged: TRL's own metrics wait for the device, ours need not
            series["gac/sft_loss"].append(self._sft_window_loss)

    def _record_modules(self) -> None:
        """Writes the newest statistics by module. Called a step later, when they wait for nothing any more."""
        modules = self._mixer_of_run.modules
        if modules is not None and modules is not self._recorded:
            modules.informative_groups = self._informative  # no generation has come since its step
        if modules is not None and modules is not self._recorded and self.args.should_save:
            append_record(self.args.gac_report_dir or cast(str, self.args.output_dir), modules)
        self._recorded = modules

    def _detach(self) -> None:
        if self.mixer is not None:
            self._record_modules()
        super()._detach()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """TRL's logging, with the metrics of the mix under ``gac/``."""
        if self.model.training and "loss" in logs:
            losses = self._metrics["train"].get("gac/sft_loss")
            if losses:
                mean = torch.stack([loss.float() for loss in losses]).mean()
                self._metrics["train"]["gac/sft_loss"] = [self.accelerator.gather(mean).mean().item()]
            constant = self._metrics["train"].get("frac_reward_zero_std")  # of groups, at each generation
            if constant:
                self._metrics["train"]["gac/informative_groups"] = [1.0 - sum(constant) / len(constant)]
            # what was not measured (NaN) is left out rather than logged as a number
            for name in [key for key, values in self._metrics["train"].items() if key.startswith("gac/")]:
                if all(value != value for value in self._metrics["train"][name]):
                    del self._metrics["train"][name]
            logs.update(self._last_metrics)
        super().log(logs, start_time)

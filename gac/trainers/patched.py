"""The mixer of the hybrid trainer: on the model while training runs, and ended with each optimizer step."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, cast

import torch
from accelerate.utils import DistributedType
from transformers import TrainerCallback

import gac
from gac.observe.topology import fsdp2_modules
from gac.trainers.grouped_grpo import GroupedGRPOTrainer

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule


class PatchedGRPOTrainer(GroupedGRPOTrainer):
    """`GroupedGRPOTrainer` whose model is patched while `train` runs and left without hooks afterwards.

    Attributes:
        mixer: of the run under way; after it, the same one with its last values. None before the first run.

    Raises:
        ValueError: DeepSpeed or FSDP1, except with ``estimator="sequence"``.
    """

    optimizer: torch.optim.Optimizer  # while training runs

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._require_measurable_engine()
        self._sharded: list[FSDPModule] = []
        self._mixer_state: dict[str, Any] | None = None
        self.mixer: gac.Mixer | None = None
        # first, so that a callback of the user sees the new mu in the same event
        self.callback_handler.callbacks.insert(0, _MixerStep(self))

    def _require_measurable_engine(self) -> None:
        if self.args.estimator == "sequence":  # one backward pass, at layers: whatever becomes of gradients in it
            return
        if self.accelerator.distributed_type == DistributedType.DEEPSPEED:
            raise ValueError(
                "under accelerate, DeepSpeed takes its optimizer step within the last backward pass, and a branch "
                "would still be to come: use estimator='sequence', which has one pass for both, or use DDP (accelerate "
                "launch --multi_gpu) or FSDP2 (--use_fsdp --fsdp_version 2)"
            )
        if self.is_fsdp_enabled and self.accelerator.state.fsdp_plugin.fsdp_version == 1:
            raise ValueError(
                "FSDP1 flattens parameters and frees their gradients, so that branches cannot be measured; use FSDP2 "
                "(accelerate launch --use_fsdp --fsdp_version 2), or estimator='sequence'"
            )

    @property
    def _mixer_of_run(self) -> gac.Mixer:
        if self.mixer is None:
            raise RuntimeError("the mixer exists from the beginning of trainer.train() on")
        return self.mixer

    # -- from the beginning of training to its end --------------------------------------------------------------------

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        prepared = super()._prepare_for_training(*args, **kwargs)
        self._sharded = cast("list[FSDPModule]", fsdp2_modules(self.model_wrapped))
        law, options = self.args.law_and_options()
        self.mixer = gac.patch(
            self.model_wrapped,  # so that data parallelism is seen
            law=law,
            estimator=self.args.estimator,
            overhead=self.args.gac_overhead,
            interval=self.args.gac_interval,
            metric=self.args.gac_metric,
            report_interval=self.args.gac_report_interval,
            scaler=self.accelerator.scaler,  # of fp16=True, else None
            carries_out_rules=True,
            **self._of_sequences(),
            **options,
        )
        self.mixer.follow(self.optimizer)  # the trainer ends the mixer's steps itself
        self._rule.attach(self.mixer.controller.law)
        if self._mixer_state is not None:
            self.mixer.load_state_dict(self._mixer_state)
        return prepared

    def _of_sequences(self) -> dict[str, Any]:
        """Options of :func:`gac.patch` for ``estimator="sequence"``."""
        options = dict(cast("dict[str, Any]", self.args.gac_sequences or {}))
        size = {"sketch_size": options.pop("sketch_size")} if "sketch_size" in options else {}
        return size | ({"sequences": options} if options else {})

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super()._inner_training_loop(*args, **kwargs)
        finally:
            self._detach()

    def _detach(self) -> None:
        """Takes the mixer off the model, whether training came to its end or not."""
        if self.mixer is not None:
            with contextlib.suppress(RuntimeError):  # an exception in mid-step leaves nothing worth keeping
                self._mixer_state = self.mixer.state_dict()
            self.mixer.unpatch()

    # -- steps --------------------------------------------------------------------------------------------------------

    def end_optimizer_step(self) -> None:
        """Called after each step of the optimizer, before anything is logged or saved."""
        self._rule.end_step()
        mixer = self._mixer_of_run
        signals: dict[str, Any] = {name: self._mean_of_step(name) for name in mixer.controller.law.needs}
        mixer.step(**signals)

    def _mean_of_step(self, name: str) -> float:
        """Mean over the step's micro-batches of a number that TRL has brought to the host: ``kl`` or ``entropy``."""
        values = self._metrics["train"][name][-self.current_gradient_accumulation_steps :]
        return sum(values) / len(values)

    def _reduce_in_every_backward(self) -> None:
        """Where accumulation turned that off, FSDP2 would reduce the branches' gradients together."""
        for module in self._sharded:
            module.set_requires_gradient_sync(True, recurse=False)

    def _no_sync(self, model: Any, *, last: bool) -> contextlib.AbstractContextManager[Any]:
        """For a backward pass that need not synchronise: under DDP, all but the last of a micro-step."""
        return contextlib.nullcontext() if last or self._sharded else self.accelerator.no_sync(model=model)


class _MixerStep(TrainerCallback):
    """Ends the mixer's step after the optimizer's, before anything is logged or saved."""

    def __init__(self, trainer: PatchedGRPOTrainer) -> None:
        self._trainer = trainer

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer.end_optimizer_step()

"""GAC in a transformers ``Trainer``: a callback that owns the mixer, its steps, its metrics and its checkpoints.

A callback never sees a loss, so weighting it stays in the trainer's ``compute_loss``, three ways:

- one loss over a mixed batch: ``callback.mixer.mixed_loss(sft_loss=..., rl_loss=...)`` and ``observe_tokens(...)``; the
  coefficient estimator is used;
- one loss over a mixed batch with ``estimator="sequence"``: ``training_step`` runs forward and backward pass inside
  ``with callback.mixer.batch(is_expert=..., groups=...):``; statistics are measured on the gradients of sequences;
- one pass per branch: ``training_step`` runs each inside ``with callback.mixer.sft():`` or ``.rl():``, and
  ``compute_loss`` returns ``callback.mixer.weigh(loss)``; statistics are measured on the gradients.

Order of events in transformers 5: clipping, ``on_pre_optimizer_step``, the optimizer, ``on_optimizer_step`` (here the
mixer steps), ``zero_grad``, ``on_step_end``, ``on_log``, ``_save_checkpoint``, ``on_save``. So what is logged and what
is saved at a step both include it, and no contribution is open when the state is taken.
"""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import TrainerCallback

import gac
from gac.files import load_state, save_whole
from gac.laws.controller import Controller
from gac.options import ESTIMATORS
from gac.saved import MixerState
from gac.state import Table, Text, Unchanged, Whole
from gac.trainers.mixed_batch import coefficient_mixer

if TYPE_CHECKING:
    from transformers import Trainer

STATE_FILE = "gac_state.pt"
"""Written into each checkpoint folder, as its last file."""

_COUNTERS = ("step", "skipped")
"""Logged with their newest value; everything else is the mean since the last log."""


class GacCallback(TrainerCallback):
    """Keeps a mixer for the time of ``trainer.train()``: hooks live only that long.

    Use :meth:`attach`, so that metrics reach the loggers of ``report_to``. Given as ``callbacks=[...]`` instead, the
    callback runs after them, and its metrics reach ``trainer.state.log_history`` alone.

    A second ``train()`` goes on from the state that the first ended with. A resumed one loads the checkpoint's, from
    `resume_from`, ``args.resume_from_checkpoint`` or ``output_dir/checkpoint-<step>``, whichever is there first.

    Args:
        law, estimator: as for :func:`gac.patch`. With ``"coefficient"`` no hook touches the model, which may
            then be sharded in any way.
        resume_from: checkpoint folder given to ``train(resume_from_checkpoint=...)`` when it is not in ``output_dir``:
            a callback is not told.
        **options: further options of :func:`gac.patch`, and of the law.

    Raises:
        TypeError, ValueError: unknown law, estimator or option.
    """

    def __init__(
        self,
        *,
        law: str = "gac",
        estimator: str = "auto",
        resume_from: str | None = None,
        **options: Any,
    ) -> None:
        if estimator not in ESTIMATORS:
            raise ValueError(f"unknown estimator {estimator!r}; known: {', '.join(ESTIMATORS)}")
        of_patch = {"overhead", "interval", "process_group", "metric", "report_interval", "coefficient"}
        of_patch |= {"sketch_size", "sequences"}
        self._of_controller = {"law": law} | {k: v for k, v in options.items() if k not in of_patch}
        controller = Controller(**self._of_controller)
        self.resume_from = resume_from
        self._needs = controller.law.needs
        self._estimator = estimator
        self._options = {"law": law, **options}
        self._mixer: gac.Mixer | None = None
        self._state: dict | None = None
        self._observed: dict[str, list[float | Tensor]] = {name: [] for name in self._needs}
        self._window: dict[str, list[float]] = {}

    @property
    def mixer(self) -> gac.Mixer:
        """The mixer. Raises RuntimeError before the first ``train()``."""
        if self._mixer is None:
            raise RuntimeError("GacCallback.mixer exists from the beginning of trainer.train() on")
        return self._mixer

    def attach(self, trainer: Trainer) -> GacCallback:
        """Puts the callback before all others, so that loggers see what it adds to the logs. Returns the callback."""
        callbacks = trainer.callback_handler.callbacks
        if self in callbacks:
            callbacks.remove(self)
        callbacks.insert(0, self)
        return self

    def observe(self, *, kl: float | Tensor | None = None, entropy: float | Tensor | None = None) -> None:
        """Tells a law that follows them the policy's KL or entropy in a micro-batch, in nats per token."""
        for name, value in (("kl", kl), ("entropy", entropy)):
            if value is not None and name in self._observed:
                self._observed[name].append(value.detach() if isinstance(value, Tensor) else value)

    # -- events -------------------------------------------------------------------------------------------------------

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        if args.fp16 and self._estimator != "coefficient":
            raise ValueError(
                "fp16=True scales the loss by a factor that changes during training, which the statistics would see; "
                'use bf16=True, or estimator="coefficient"'
            )
        saved = self._read(args, state) if state.global_step > 0 else self._state
        if self._mixer is not None:
            self._mixer.unpatch()  # an exception ended the last run
        options = dict(self._options)
        if self._estimator == "coefficient":
            self._mixer = coefficient_mixer(args.device, **options)
        else:
            self._mixer = gac.patch(model, estimator=self._estimator, **options)
        if optimizer is not None:
            self._mixer.follow(getattr(optimizer, "optimizer", optimizer))
        self._window.clear()
        if saved is not None:
            try:
                self._mixer.load_state_dict(saved)
            except BaseException:
                self._mixer.unpatch()
                raise

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        missing = [name for name in self._needs if not self._observed[name]]
        if missing:
            raise RuntimeError(
                f"law={self._options['law']!r} follows {' and '.join(missing)}: call callback.observe("
                f"{missing[0]}=...) in compute_loss"
            )
        self.mixer.step(**{name: sum(values) / len(values) for name, values in self._observed.items()})
        for values in self._observed.values():
            values.clear()
        for name, value in self.mixer.metrics().items():
            if isinstance(value, (int, float)):
                self._window.setdefault(name, []).append(float(value))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not logs or "loss" not in logs:  # of evaluation, or the summary at the end
            return
        metrics = {}
        for name, values in self._window.items():
            known = [value for value in values if value == value]  # NaN: not measured
            if known:
                metrics[f"gac/{name}"] = known[-1] if name in _COUNTERS else sum(known) / len(known)
        self._window.clear()
        logs.update(metrics)
        if state.log_history:
            state.log_history[-1].update(metrics)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not args.should_save:
            return
        path = os.path.join(args.output_dir, f"checkpoint-{state.global_step}", STATE_FILE)
        saved = {"mixer": self.mixer.state_dict(), "step": state.global_step, "log": _fingerprint(state)}
        save_whole(saved, path)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._state = self.mixer.state_dict()
        self.mixer.unpatch()

    def _read(self, args: Any, state: Any) -> dict:
        """The mixer's state of the checkpoint that this run resumes."""
        places = [self.resume_from, args.resume_from_checkpoint]
        places = [place for place in places if isinstance(place, str) and os.path.isdir(place)]
        folder = (places or [os.path.join(args.output_dir, f"checkpoint-{state.global_step}")])[0]
        path = os.path.join(folder, STATE_FILE)
        if not os.path.isfile(path):
            raise ValueError(
                f"training resumes at step {state.global_step}, but there is no {path}. If the checkpoint is "
                "elsewhere, set callback.resume_from to its folder; if it was written without GacCallback or was cut "
                "short, resume from another"
            )
        controller = Controller(**self._of_controller)
        entries = {"mixer": Unchanged(MixerState(controller, torch.device("cpu"))), "step": Whole(), "log": Text()}
        saved = load_state(path, Table(entries), then="resume from another checkpoint, or set callback.resume_from")
        if saved["step"] != state.global_step or saved["log"] != _fingerprint(state):
            raise ValueError(
                f"{path} belongs to another run than the checkpoint that training resumes (step {saved['step']}, not "
                f"{state.global_step}, or other logs): set callback.resume_from to the right folder"
            )
        return saved["mixer"]


def _fingerprint(state: Any) -> str:
    """The newest log entry: what tells two runs apart that were saved at the same step."""
    return json.dumps(state.log_history[-1:], sort_keys=True)

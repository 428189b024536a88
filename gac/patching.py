"""``gac.patch``: from a model and options to the mixer that watches it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from gac.mixer import Mixer
from gac.options import Options
from gac.sequences.options import SequenceOptions
from gac.statistics.coefficient import CoefficientOptions


def patch(
    model: nn.Module,
    *,
    law: str = "gac",
    estimator: str = "auto",
    overhead: float | None = None,
    interval: int | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    process_group: dist.ProcessGroup | None = None,
    metric: str = "gradient",
    report_interval: int | None = 10,
    coefficient: Mapping[str, Any] | None = None,
    scaler: torch.amp.GradScaler | None = None,
    hooks: bool = True,
    carries_out_rules: bool = False,
    name: str | None = None,
    sketch_size: int = 32,
    sequences: Mapping[str, Any] | None = None,
    **law_options: Any,
) -> Mixer:
    """Watches the gradients of ``model`` and sets the weight ``mu`` of its SFT branch from them.

    Hooks are put on the parameters that require gradients now; the model's outputs, parameters and ``state_dict`` stay
    as they are, and the accumulated gradient is bit for bit that of ``(weight * loss).backward()``. Patch before
    wrapping in ``torch.compile`` or after, but after freezing parameters, adding adapters and moving the model to its
    device. Gradients that are there when a step begins, or that somebody writes between its passes, are read once more.

    Args:
        model: any module with floating-point parameters on one or several devices.
        law: how mu follows from the statistics; a name of :func:`gac.laws.available`.
        estimator: ``"sketch"`` (random projection, no buffer of the gradient's size), ``"exact"`` (two fp32 buffers of
            the trainable parameters' size), ``"coefficient"`` (the paper's proxies from token coefficients, see
            :meth:`Mixer.observe_tokens`; no hooks), ``"sequence"`` (a sketch of every sequence's gradient, taken at the
            layers; for mixed batches too, see :meth:`Mixer.batch`) or ``"auto"``: exact where the buffers are small,
            else the sketch, and the coefficients in steps whose losses were mixed before their backward pass
            (:meth:`Mixer.mixed_loss`).
        overhead: share of a step's time that measuring may take, 0.01 unless said otherwise: the first ten steps are
            measured, then every one where that is within the share, every k-th where it is not. Which these are
            depends on the time that steps take (:class:`gac.cadence.BudgetCadence`).
        interval: measure in every ``interval``-th optimizer step instead, whatever it costs; runs can then be repeated
            to the bit. Steps that are not measured run without hooks, and a backward pass outside a branch goes
            unnoticed in them.
        optimizer: the one that steps the model: :meth:`Mixer.step` is called after each of its steps, and
            :meth:`Mixer.follow` takes its momentum and second moments now. Without it, call ``mixer.step()`` yourself;
            the first ``torch.optim`` optimizer that steps a parameter of the model is then followed. Engines that step
            copies of the parameters (DeepSpeed, Megatron) hide their momentum: pass ``momentum=0.9`` for Adam.
        process_group: the ranks that train replicas of the model (as in DDP); the default group when several processes
            run. Sharded models (FSDP2, tensor parallelism) bring their device mesh: patch after ``fully_shard``.
        metric: ``"gradient"``, or ``"optimizer"`` to measure in the space of Adam's steps: each element divided by
            ``sqrt(v) + eps``, with the second moments of the optimizer that is followed. Measuring begins once it has
            taken a few steps.
        report_interval: every so many measured steps are also taken apart by module, for :meth:`Mixer.report`; None:
            never.
        coefficient: options of the coefficient estimator: ``z_normalize``, ``phi``, ``trim``; see
            :func:`gac.coefficient_statistics`.
        scaler: whose ``scale`` multiplies the losses (AMP in float16): contributions are divided by it.
        hooks: False for trainers that keep gradients in buffers of their own: hand them over with
            :meth:`Mixer.observe` after each backward pass.
        carries_out_rules: for trainers that carry out, per prompt or token, what the laws of docs/rules.md ask for;
            nobody else can use these laws.
        name: put before the names of the mixer's metrics (``critic/mu``), to tell several mixers of a process apart.
        sketch_size: rows and columns of a layer's sketch with ``estimator="sequence"``: 8, 16, 32 or 64.
        sequences: further options of that estimator: ``seed``, ``layer_share``; see
            :class:`gac.sequences.options.SequenceOptions`.
        **law_options: options of the law.

    Returns:
        The mixer; also a context manager that unpatches at its end.

    Raises:
        TypeError, ValueError: wrong arguments, or a model without trainable parameters.
        RuntimeError: some parameter is patched already.
    """
    options = Options(
        law=law,
        law_options=law_options,
        estimator=estimator,
        interval=interval,
        overhead=overhead,
        optimizer=_with_hooks(optimizer),
        process_group=process_group,
        metric=metric,
        report_interval=report_interval,
        coefficient=CoefficientOptions(**(coefficient or {})),
        scaler=scaler,
        hooks=hooks,
        carries_out_rules=carries_out_rules,
        name=name,
        sequences=SequenceOptions(sketch_size=sketch_size, **(sequences or {})),
    )
    return Mixer(model, options)


def _with_hooks(optimizer: Any) -> Any:
    """The optimizer whose hooks run when a step is taken: accelerate's wrapper is one by its class alone, without any,
    and leaves out the steps that a scaler skips."""
    while isinstance(optimizer, torch.optim.Optimizer) and not hasattr(optimizer, "_optimizer_step_post_hooks"):
        if not hasattr(optimizer, "optimizer"):
            raise TypeError(
                f"{type(optimizer).__name__} is an optimizer without hooks: its __init__ must call that of "
                "torch.optim.Optimizer. Or leave optimizer= out and call mixer.step() after each of its steps"
            )
        optimizer = optimizer.optimizer
    return optimizer

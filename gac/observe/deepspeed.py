"""What DeepSpeed's ZeRO does to parameters and gradients, read off the parameters; DeepSpeed is never imported here."""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Iterable

import torch
from torch import nn

ACCUMULATES_SINCE = (0, 19, 0)
"""The release from which ZeRO-1/2 add up all micro-batches under optimizer offload.

Before, ZeRO-2 kept the gradients of the first and of the last backward pass of a step alone (pull request 7967), and
where several passes met ``gradient_accumulation_steps: 1``, those of the last (7981, which names ZeRO-1 too).
"""

_MARKS = ("ds_id", "_hp_mapping")  # of a parameter under ZeRO-3; of one under ZeRO-1/2 or the bfloat16 optimizer


def is_managed(parameters: Iterable[nn.Parameter]) -> bool:
    """Whether DeepSpeed takes the gradients of some of these parameters away while a backward pass runs."""
    return any(hasattr(parameter, mark) for parameter in parameters for mark in _MARKS)


def whole_numel(parameter: nn.Parameter) -> int:
    """Elements of a parameter's gradient; ZeRO-3 leaves the parameter itself empty between its uses."""
    return getattr(parameter, "ds_numel", parameter.numel())


def check(model: nn.Module, *, optimizer: torch.optim.Optimizer | None, in_optimizer_space: bool) -> None:
    """Refuses options that ZeRO has no place for, and warns of releases that lose gradients.

    Raises:
        ValueError: ``optimizer=``, which DeepSpeed steps once for each of its groups; ``metric="optimizer"``, whose
            moments it keeps in flat pieces of its own.
    """
    if in_optimizer_space:
        raise ValueError(
            'metric="optimizer" reads second moments parameter by parameter, but DeepSpeed keeps them in flat pieces: '
            'use metric="gradient"'
        )
    if optimizer is not None:
        raise ValueError(
            "optimizer= would end a step several times, as DeepSpeed steps it once for each group of parameters: leave "
            "it out and call mixer.step() after the engine.step() that ends the accumulation"
        )
    _warn_of_lost_gradients(model)


def _warn_of_lost_gradients(model: nn.Module) -> None:
    """A warning where the release of DeepSpeed that trains ``model`` loses micro-batches under optimizer offload."""
    package = sys.modules.get("deepspeed")
    if package is None:
        return
    found = re.match(r"(\d+)\.(\d+)\.(\d+)", package.__version__)
    if found is None or tuple(map(int, found.groups())) >= ACCUMULATES_SINCE:
        return
    for module in model.modules():
        if not isinstance(module, package.DeepSpeedEngine) or not module.zero_cpu_offload():
            continue
        stage, steps = module.zero_optimization_stage(), module.gradient_accumulation_steps()
        if (stage in (1, 2) and steps == 1) or (stage == 2 and steps > 2):
            fixed = ".".join(map(str, ACCUMULATES_SINCE))
            warnings.warn(
                f"DeepSpeed {package.__version__} drops gradients of micro-batches under ZeRO-{stage} with optimizer "
                f"offload and gradient_accumulation_steps {steps}: mu is measured on all of them, the optimizer steps "
                f"with a part. Install deepspeed>={fixed}, or turn offload_optimizer off",
                UserWarning,
                stacklevel=5,
            )

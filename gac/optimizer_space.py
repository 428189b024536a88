"""The space in which Adam takes its steps: each element of a gradient divided by ``sqrt(v) + eps``."""

from __future__ import annotations

import torch
from torch import Tensor, nn

_KEYS = ("max_exp_avg_sq", "exp_avg_sq")  # with amsgrad, the maximum is what Adam divides by


class SecondMoments:
    """The second moments ``v`` that an optimizer of the Adam family keeps.

    Args:
        optimizer: ``torch.optim.Adam``, ``AdamW`` or one with their state (``exp_avg_sq`` beside ``step``), all groups
            with the same ``eps`` and ``beta2``.

    Raises:
        TypeError: no such optimizer. ValueError: groups with different ``eps`` or ``beta2``.
    """

    def __init__(self, optimizer: torch.optim.Optimizer | None) -> None:
        groups = getattr(optimizer, "param_groups", None)
        if not groups or not all("betas" in group and "eps" in group for group in groups):
            raise TypeError(
                'metric="optimizer" needs optimizer=, an optimizer of the Adam family (with betas and eps); got '
                f"{type(optimizer).__name__}"
            )
        constants = {(group["betas"][1], group["eps"]) for group in groups}
        if len(constants) > 1:
            raise ValueError(
                'metric="optimizer" needs one beta2 and one eps for all parameter groups; got (beta2, eps) = '
                f"{sorted(constants)}"
            )
        self._optimizer = optimizer
        self.beta2, self.eps = map(float, next(iter(constants)))

    def of(self, parameter: nn.Parameter) -> Tensor | None:
        """``v`` of a parameter, in its shape; None before its first step.

        Raises TypeError where the optimizer keeps something else, such as quantised moments.
        """
        state = self._optimizer.state.get(parameter)
        if not state:
            return None
        for key in _KEYS:
            if key in state:
                return state[key]
        raise TypeError(
            f'metric="optimizer" reads exp_avg_sq of the optimizer\'s state; {type(self._optimizer).__name__} has '
            f"{sorted(map(str, state))}"
        )

    @property
    def ready(self) -> bool:
        """Whether the optimizer has taken a step: before it, no ``v`` exists."""
        return any("step" in state or _KEYS[1] in state for state in self._optimizer.state.values())

    def correction(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """``1 - beta2^t`` after ``t`` steps, 0-dim: makes squares of ``x / sqrt(v)`` those of Adam's unbiased ``v``."""
        steps = (state["step"] for state in self._optimizer.state.values() if "step" in state)
        step = next(steps, None)
        if step is None:
            raise TypeError(
                f'metric="optimizer" reads "step" of the optimizer\'s state; {type(self._optimizer).__name__} has none'
            )
        if isinstance(step, Tensor) and step.device.type != "cpu":
            return 1.0 - self.beta2 ** step.to(device=device, dtype=dtype, non_blocking=True)
        return torch.full((), 1.0 - self.beta2 ** float(step), dtype=dtype, device=device)

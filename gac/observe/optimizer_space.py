"""The space in which Adam takes its steps: each element of a gradient divided by ``sqrt(v) + eps``."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

WARM_UP = 10
"""Steps of the optimizer before the first that is measured.

``v`` of an element from ``t`` gradients scatters as a chi-square with ``t`` degrees of freedom, and ``x^2 / v`` has no
mean up to 2 and no variance up to 4: a few elements whose first gradients happened to be small would be all that is
measured. At 10, an even 25% is left.
"""

_KEYS = ("max_exp_avg_sq", "exp_avg_sq")  # with amsgrad, the maximum is what Adam divides by


class SecondMoments:
    """The second moments ``v`` that an optimizer of the Adam family keeps.

    Adam moves an element by ``lr * m / (sqrt(v / (1 - beta2^t)) + eps)`` (Kingma and Ba 2015), ``t`` the steps that its
    parameter has taken. Gradients of a step are measured with the ``v`` and ``t`` that the steps before have left, the
    newest that exist while the gradients are being computed. Kernels read ``v`` as it lies in memory and know no ``t``:
    they get ``eps * sqrt(1 - beta2^t)`` for ``eps``, and the squares that they find are multiplied by ``1 - beta2^t``.
    Both together are Adam's own denominator. :meth:`correction` fixes ``t`` for a step; the moments of a parameter
    with another ``t`` (a layer that one branch alone trains, one that was unfrozen late) are rescaled to it, in a copy.

    Parameters with fewer than :data:`WARM_UP` steps are left out, as those that the optimizer never met. So are
    elements whose ``v`` is 0, such as an untied embedding's row until its token has occurred: kernels count them as 0.

    Where the optimizer counts steps on an accelerator (``fused``, ``capturable``), the host waits for ``t`` until there
    are :data:`WARM_UP`, and then no more. All parameters are then taken to have made equally many steps, and Adam's
    ``eps`` is used as it is: in terms of its denominator ``eps / sqrt(1 - beta2^t)``, which matters only in the first
    steps and where ``sqrt(v)`` is as small as that.

    Args:
        optimizer: ``torch.optim.Adam``, ``AdamW`` or one with their state (``exp_avg_sq`` beside ``step``), all groups
            with the same ``eps`` and ``beta2``.

    Attributes:
        beta2: of the optimizer.
        eps: what kernels add to ``sqrt(v)`` in the present step.

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
        self._optimizer = optimizer
        self.beta2, self.eps = self._constants()
        self._step: float | None = None  # that v is scaled to; None where only the device knows
        self._warm = False

    def _constants(self) -> tuple[float, float]:
        """``beta2`` and ``eps`` of all groups."""
        constants = {(group["betas"][1], group["eps"]) for group in self._optimizer.param_groups}
        if len(constants) > 1:
            raise ValueError(
                'metric="optimizer" needs one beta2 and one eps for all parameter groups; got (beta2, eps) = '
                f"{sorted(constants)}"
            )
        beta2, eps = next(iter(constants))
        return float(beta2), float(eps)

    def of(self, parameter: nn.Parameter) -> Tensor | None:
        """``v`` of a parameter, in its shape; None before it has taken :data:`WARM_UP` steps.

        Raises TypeError where the optimizer keeps something else, such as quantised moments.
        """
        state = self._optimizer.state.get(parameter)
        if not state:
            return None
        key = next((key for key in _KEYS if key in state), None)
        if key is None:
            raise TypeError(
                f'metric="optimizer" reads exp_avg_sq of the optimizer\'s state; {type(self._optimizer).__name__} has '
                f"{sorted(map(str, state))}"
            )
        step = _on_host(state.get("step"))
        if step is None or step == self._step:
            return state[key]
        if step < WARM_UP:
            return None
        return state[key] * (self._corrected(self._step) / self._corrected(step))

    @property
    def ready(self) -> bool:
        """Whether the optimizer has taken :data:`WARM_UP` steps.

        Raises TypeError where it does not count them in its state.
        """
        steps = self._steps()
        if steps and not self._warm:
            self._warm = (self._count(steps) or float(steps[0])) >= WARM_UP
        return bool(steps) and self._warm

    def _steps(self) -> list[Tensor | float]:
        """The counts of all parameters that the optimizer has met."""
        states = self._optimizer.state.values()
        steps = [state["step"] for state in states if "step" in state]
        if not steps and any(states):
            raise TypeError(
                f'metric="optimizer" reads "step" of the optimizer\'s state; {type(self._optimizer).__name__} has none'
            )
        return steps

    def correction(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Begins a step: what its squares are to be multiplied by, ``1 - beta2^t``, 0-dim.

        Raises ValueError for groups that were added with another ``eps`` or ``beta2``.
        """
        self.beta2, eps = self._constants()
        steps = self._steps()
        self._step = self._count(steps)
        if self._step is None:
            self.eps = eps
            return 1.0 - self.beta2 ** steps[0].to(device=device, dtype=dtype, non_blocking=True)
        factor = self._corrected(self._step)
        self.eps = eps * math.sqrt(factor)
        return torch.full((), factor, dtype=dtype, device=device)

    @staticmethod
    def _count(steps: list[Tensor | float]) -> float | None:
        """The most steps that a parameter has taken; None where only the device knows."""
        return None if _on_host(steps[0]) is None else max(map(float, steps))

    def _corrected(self, step: float) -> float:
        return 1.0 - self.beta2**step


def _on_host(step: Tensor | float | None) -> float | None:
    """A count of steps, unless an accelerator holds it."""
    if step is None or (isinstance(step, Tensor) and step.device.type != "cpu"):
        return None
    return float(step)

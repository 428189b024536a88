"""The hooks on a model's parameters: on all of them, on one, or on none."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from gac.observe.accumulated import Accumulated

_graph_task_id = torch._C._current_graph_task_id

OnGradient = Callable[[int, Tensor], None]
OnAccumulated = Callable[[nn.Parameter], None]


class Hooks:
    """Puts hooks on and takes them off.

    Backward passes that :meth:`gac.Mixer.backward` runs need none where running sums are read: their begin and end are
    known, and what they wrote is told by tensors' identities and versions. Once a whole step consisted of such passes,
    a single hook is enough: the *sentinel*, on the parameter that the passes reach first. A pass that somebody else
    runs meets it there, before anything else of it has happened, and gets its hooks back.

    Args:
        parameters: of the model.
        accumulated: makes the hook of a parameter's index that runs after accumulation.
        gradient: told a parameter's index and its incoming gradient; None where running sums are read.
        sentinel: told the parameter's index when the lone hook runs.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        accumulated: Callable[[int], OnAccumulated],
        gradient: OnGradient | None,
        sentinel: Callable[[int], None],
    ) -> None:
        self._parameters, self._accumulated = parameters, accumulated
        self._gradient, self._told = gradient, sentinel
        self._handles: list[RemovableHandle] = []
        self.sentinel: int | None = None
        """The parameter that alone has a hook; None where all have."""

    def put_on(self, sentinel: int | None = None) -> None:
        """Puts a hook on every parameter, or on the sentinel alone, unless that is how it is."""
        if self._handles and sentinel == self.sentinel:
            return
        self.remove()
        self.sentinel = sentinel
        if sentinel is not None:
            hook = functools.partial(self._on_sentinel, sentinel)
            self._handles.append(self._parameters[sentinel].register_post_accumulate_grad_hook(hook))
            return
        for index, parameter in enumerate(self._parameters):
            if self._gradient is not None:
                self._handles.append(parameter.register_hook(functools.partial(self._gradient, index)))
            self._handles.append(parameter.register_post_accumulate_grad_hook(self._accumulated(index)))

    def _on_sentinel(self, index: int, _: nn.Parameter) -> None:
        self._told(index)

    def remove(self) -> None:
        """Takes the hooks off.

        Where none is left on a parameter's gradient, torch would still wrap the gradient for Python, in every pass.
        """
        while self._handles:
            self._handles.pop().remove()
        if self._gradient is not None:
            for parameter in self._parameters:
                if parameter._backward_hooks is not None and not parameter._backward_hooks:
                    parameter._backward_hooks = None


class Guided:
    """Whether a model's passes are all run by the mixer, so that the sentinel is enough.

    Args:
        hooks: of the model. accumulated: what its gradients were when they were noted last.

    Attributes:
        first: the parameter that all passes of a measured step reached first; None where hooks are needed.
    """

    def __init__(self, hooks: Hooks, accumulated: Accumulated) -> None:
        self._hooks, self._accumulated = hooks, accumulated
        self.first: int | None = None
        self._met: int | None = None  # in the step under way
        self._alike = True
        self._for_good = False  # somebody else runs passes, or did what looks like it
        self._task = -1  # of the newest pass that met the sentinel

    @property
    def alone(self) -> bool:
        """Whether the sentinel alone has a hook."""
        return self._hooks.sentinel is not None

    def met(self, index: int, *, guided: bool) -> None:
        """The first hook of a pass ran on this parameter; or, for the sentinel, the only one."""
        self._alike &= guided and self._met in (None, index)
        self._met = index
        self._task = _graph_task_id()

    def lost(self) -> None:
        """Hooks are needed from now on."""
        self.first, self._for_good = None, True

    def written(self) -> list[int]:
        """What a guided pass wrote, where no hook could tell."""
        return self._accumulated.written() if self.alone else []

    def was_overtaken(self) -> bool:
        """Whether something has written gradients that ran, or may have run, before the loss of a pass was met."""
        if not self.alone or not self._accumulated.changed():
            return False
        self.lost()
        return True

    def was_passed_by(self) -> bool:
        """Whether gradients were written that no guided pass wrote, perhaps by a pass that missed the sentinel.

        Passes are numbered through the process: where the next number is one above that of the last guided pass, no
        other has run, and somebody clipped, scaled or cleared.
        """
        if not self.alone or not self._accumulated.changed():
            return False
        before, self._task = self._task, _next_task()
        if before >= 0 and self._task == before + 1:
            return False
        self.lost()
        return True

    def step_ended(self) -> None:
        """What the passes of a measured step showed."""
        if self._met is not None:
            self.first = self._met if self._alike and not self._for_good else None
        self._met, self._alike = None, True


def _next_task() -> int:
    """The number of a backward pass that is run to find it out."""
    found: list[int] = []
    with torch.enable_grad(), torch.inference_mode(False):
        probe = torch.zeros((), requires_grad=True)
        probe.register_hook(lambda _: found.append(_graph_task_id()))
        (probe * 1).backward()
    return found[0]

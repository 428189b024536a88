"""The hooks on a model's parameters: on all of them, on one, or on none."""

from __future__ import annotations

import functools
import operator
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from gac.observe.accumulated import Accumulated
from gac.observe.arriving import Arriving

_graph_task_id = torch._C._current_graph_task_id
_trains = operator.attrgetter("requires_grad")

OnGradient = Callable[[int, Tensor], None]
OnAccumulated = Callable[[nn.Parameter], None]


class _Kind:
    """One kind of hooks as torch keeps them: in a dictionary that is an attribute of the parameter."""

    get: Callable[[nn.Parameter], Any]
    put: Callable[[nn.Parameter, Any], None]
    register: Callable[[nn.Parameter, Any], RemovableHandle]
    leaves_whole: bool
    """Whether a dictionary that holds nothing else is taken off and put on as a whole."""


class _Gradient(_Kind):
    leaves_whole = True  # for an empty one torch would still wrap the gradient for Python, in every pass

    get = operator.attrgetter("_backward_hooks")
    register = staticmethod(nn.Parameter.register_hook)

    @staticmethod
    def put(parameter: nn.Parameter, hooks: Any) -> None:
        parameter._backward_hooks = hooks


class _Accumulated(_Kind):
    leaves_whole = False  # torch would keep it: its attribute takes no leave

    get = operator.attrgetter("_post_accumulate_grad_hooks")
    register = staticmethod(nn.Parameter.register_post_accumulate_grad_hook)

    @staticmethod
    def put(parameter: nn.Parameter, hooks: Any) -> None:
        parameter._post_accumulate_grad_hooks = hooks


_Both = tuple["Places", "Places"]
"""Hooks on incoming and on accumulated gradients."""


class Hooks:
    """Puts hooks on and takes them off.

    Backward passes that :meth:`gac.Mixer.backward` runs need none where running sums are read: their begin and end are
    known, and what they wrote is told by tensors' identities and versions. Once a whole step consisted of such passes,
    a single hook is enough: the *sentinel*, on the parameter that the passes reach first. A pass that somebody else
    runs meets it there, before anything else of it has happened, and gets its hooks back. Where gradients are taken as
    they arrive, every parameter keeps hooks beside it that do no more than put what they are told on a list.

    Args:
        parameters: of the model.
        accumulated: makes the hook of a parameter's index that runs after accumulation.
        gradient: told a parameter's index and its incoming gradient; None where running sums are read.
        sentinel: told the parameter's index when the lone hook runs.
        arriving: keeps incoming gradients beside the sentinel; of no use where running sums are read.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        accumulated: Callable[[int], OnAccumulated],
        gradient: OnGradient | None,
        sentinel: Callable[[int], None],
        arriving: Arriving,
    ) -> None:
        self._parameters, self._accumulated = parameters, accumulated
        self._gradient, self._told, self._arriving = gradient, sentinel, arriving
        self._lone: RemovableHandle | None = None
        self._full: _Both | None = None  # what was put on once is kept
        self._light: _Both | None = None
        self._on: _Both | None = None  # those of them that are on
        self.sentinel: int | None = None
        """The parameter that alone has a hook; None where all have."""

    @property
    def count(self) -> int:
        """How many hooks are on."""
        return (self._lone is not None) + (0 if self._on is None else sum(map(len, self._on)))

    def put_on(self, sentinel: int | None = None) -> None:
        """Puts a hook on every parameter, or on the sentinel alone, unless that is how it is."""
        if sentinel is not None and self._gradient is not None and not all(map(_trains, self._parameters)):
            if self._on is not None:
                return  # one that was frozen, and may thaw, cannot get a new hook and has an old one
            sentinel = None
        if sentinel == self.sentinel and (self._lone is not None or self._on is not None):
            return
        self.remove()
        self.sentinel = sentinel
        if sentinel is None:
            told = self._gradient
            of = None if told is None else lambda index: functools.partial(told, index)
            self._full = self._put(self._full, of, self._accumulated)
            return
        hook = functools.partial(self._on_sentinel, sentinel)
        self._lone = self._parameters[sentinel].register_post_accumulate_grad_hook(hook)  # runs before those on lists
        if self._gradient is not None:
            self._arriving.clear()
            self._light = self._put(self._light, self._arriving.on_gradient, self._arriving.on_accumulated)

    def _put(
        self,
        known: _Both | None,
        gradient: Callable[[int], Callable[[Tensor], None]] | None,
        accumulated: Callable[[int], OnAccumulated],
    ) -> _Both:
        """Puts hooks on, which are made where they are not known."""
        self._on = found = known or (Places(_Gradient), Places(_Accumulated))
        if known is not None:
            for places in known:
                places.put_on()
            return known
        try:
            for index, parameter in enumerate(self._parameters):
                if gradient is not None:
                    found[0].first(parameter, gradient(index))
                found[1].first(parameter, accumulated(index))
        except BaseException:
            self.remove()
            raise
        return found

    def _on_sentinel(self, index: int, _: nn.Parameter) -> None:
        self._told(index)

    def remove(self) -> None:
        """Takes the hooks off."""
        if self._lone is not None:
            self._lone.remove()
            self._lone = None
        if self._on is not None:
            for places in self._on:
                places.take_off()
            self._on = None


class Places:
    """Where hooks of one kind stand, one for each parameter: torch's own dictionaries, by which it knows them.

    They come and go with the steps that are measured, and between large matrix products no cache holds anything of
    them: what is touched is what it costs.

    Args:
        kind: of hooks.
    """

    def __init__(self, kind: type[_Kind]) -> None:
        self._kind = kind
        self._of: list[tuple[nn.Parameter, int, Any, dict[int, Any]]] = []  # parameter, key, hook, dictionary

    def __len__(self) -> int:
        return len(self._of)

    def first(self, parameter: nn.Parameter, hook: Any) -> None:
        """Puts a hook on for the first time. Raises RuntimeError for a parameter that requires no gradient."""
        handle = self._kind.register(parameter, hook)
        self._of.append((parameter, handle.id, hook, self._kind.get(parameter)))

    def put_on(self) -> None:
        """Puts the hooks on again; raises as :meth:`first`, with none put on."""
        get, put = self._kind.get, self._kind.put
        for parameter, _, hook, _ in self._of:
            if not parameter.requires_grad:
                self._kind.register(parameter, hook)  # raises
        for k, (parameter, key, hook, own) in enumerate(self._of):
            present = get(parameter)
            if present is None:
                own[key] = hook
                put(parameter, own)
            else:
                present[key] = hook
                if present is not own:  # somebody else's
                    self._of[k] = parameter, key, hook, present

    def take_off(self) -> None:
        """Takes the hooks off, and leaves those of others."""
        get, put = self._kind.get, self._kind.put
        whole = self._kind.leaves_whole
        for k, (parameter, key, hook, own) in enumerate(self._of):
            if whole and len(own) == 1 and key in own and get(parameter) is own:
                put(parameter, None)
                continue
            own.pop(key, None)
            if whole:
                if not own and get(parameter) is own:
                    put(parameter, None)
                self._of[k] = parameter, key, hook, OrderedDict({key: hook})


class Guided:
    """Whether a model's passes are all run by the mixer, so that the sentinel is enough.

    Args:
        hooks: of the model. accumulated: what its gradients were when they were noted last.
        arriving: where incoming gradients are kept; None where running sums are read.

    Attributes:
        first: the parameter that all passes of a measured step reached first; None where hooks are needed.
    """

    def __init__(self, hooks: Hooks, accumulated: Accumulated, arriving: Arriving | None) -> None:
        self._hooks, self._accumulated, self._arriving = hooks, accumulated, arriving
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

    def written(self) -> Mapping[int, Tensor | None] | None:
        """What a guided pass wrote, where no hook could tell: incoming gradients, or None for running sums.

        None for all where it cannot be told apart; hooks are needed then.
        """
        if not self.alone:
            return {}
        if self._arriving is None:
            return dict.fromkeys(self._accumulated.written())
        found = self._arriving.take()
        if found is None:
            self.lost()
        return found

    def _changed(self) -> bool:
        if not self.alone:
            return False
        if self._arriving is None:
            return self._accumulated.changed()
        if self._arriving.waiting():
            return True
        self._arriving.clear()  # of torch.autograd.grad
        return False

    def met_by_another(self, index: int) -> tuple[Mapping[int, Tensor | None], bool]:
        """A pass that is not guided met the sentinel, which has this index: its gradients so far, whether there may be
        others than its own."""
        self.lost()
        if self._arriving is None:
            return {index: None}, bool(self._accumulated.changed_besides(index))
        own: dict[int, Tensor | None] = {index: self._arriving.take_one(index)}
        if not self._arriving.waiting():
            return own, False
        earlier = self._arriving.take() if _graph_task_id() == self._task + 1 else None  # no other pass has run
        return own if earlier is None else earlier | own, earlier is None

    def was_overtaken(self) -> bool:
        """Whether something has written gradients that ran, or may have run, before the loss of a pass was met."""
        if not self._changed():
            return False
        self.lost()
        return True

    def was_passed_by(self) -> bool:
        """Whether gradients were written that no guided pass wrote, perhaps by a pass that missed the sentinel.

        Passes are numbered through the process: where the next number is one above that of the last guided pass, no
        other has run, and somebody clipped, scaled or cleared. What was accumulated was so by a pass.
        """
        if not self._changed():
            return False
        before, self._task = self._task, _next_task()
        if before >= 0 and self._task == before + 1 and self._arriving is None:
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

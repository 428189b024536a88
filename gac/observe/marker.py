"""A mark on a loss that tells when its backward pass begins and ends."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gac.observe.contribution import Tokens

if TYPE_CHECKING:
    from gac.observe.observer import Observer

_graph_task_id = torch._C._current_graph_task_id
_queue_callback = torch.autograd.Variable._execution_engine.queue_callback


def mark(observer: Observer, loss: Tensor, tokens: Tokens) -> Tensor:
    """The loss, whose backward pass will be a contribution of the branch under way that counts for ``tokens``."""
    return _Mark.apply(loss, MarkedPass(observer, tokens))


class MarkedPass:
    """The backward pass of a loss that was marked.

    Args:
        observer: within a branch. tokens: what the contribution counts for; None: what the branch was entered with.
    """

    def __init__(self, observer: Observer, tokens: Tokens) -> None:
        self._observer, self._branch, self._seen = observer, observer.branch, observer.seen
        self._tokens, self._task = tokens, -1

    def begin(self) -> bool:
        """The pass begins; False where nobody has to be told of its end."""
        observer = self._observer
        if observer.branch is not self._branch or observer.seen is not self._seen:
            assert self._branch is not None
            entered = "outside a branch" if observer.branch is None else f"in the {observer.branch.value} branch"
            raise RuntimeError(
                f"a loss that mixer.weigh has weighted for the {self._branch.value} branch is taken back {entered}, or "
                "in a later step: run its backward pass before its branch is left"
            )
        self._task = _graph_task_id()
        return observer.begin_marked(self._task, self._tokens)

    def end(self) -> None:
        """It has ended."""
        self._observer.end_marked(self._task)


class _Mark(torch.autograd.Function):
    """Passes a loss through, and its gradient too, at which the pass begins.

    A callback that is queued while callbacks run comes after those of the engine and of DDP.
    """

    @staticmethod
    def forward(ctx: Any, loss: Tensor, marked: MarkedPass) -> Tensor:
        ctx.marked = marked
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        if ctx.marked.begin():
            end = ctx.marked.end
            _queue_callback(lambda: _queue_callback(end))
        return gradient, None

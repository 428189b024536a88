"""The modes of torch that a step ends in, whatever mode the caller is in."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch

_set_grad_enabled, _is_grad_enabled = torch._C._set_grad_enabled, torch.is_grad_enabled


class Lasting:
    """Context without gradients whose tensors backward passes may save: never those of inference mode.

    The same as ``torch.inference_mode(False), torch.no_grad()``, at the price of what is not so already: between large
    matrix products both cost more than the law.
    """

    __slots__ = ("_grad", "_mode")

    def __enter__(self) -> None:
        self._mode: Any = None
        if torch.is_inference_mode_enabled():
            self._mode = torch.inference_mode(False)
            self._mode.__enter__()
        self._grad = _is_grad_enabled()
        _set_grad_enabled(False)

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        _set_grad_enabled(self._grad)
        if self._mode is not None:
            self._mode.__exit__(kind, value, traceback)
